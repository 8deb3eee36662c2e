# Where the ranks of an attempt meet.

node_names() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

head_address() { # the address of the first node: its name alone need not resolve
    local head address
    head=$(node_names | head -n 1)
    address=$(ask_controller scontrol show node --oneliner "$head" | field NodeAddr)
    echo "${address:-$head}"
}

# another port for each attempt: the old one may be held by TIME_WAIT or by ranks of an attempt that will not die
rendezvous_port() { echo $((20000 + (7 * SLURM_JOB_ID + restarts) % 10000)); }

# SLURM numbers the steps of each attempt from 0, so that a late signal for a step of the attempt before (from an srun on a node that
# was frozen, or kept by slurmctld for a node that did not answer) would hit this one: steps of two attempts in a row have two numbers
skip_step_number() {
    [ $((restarts % 2)) -eq 0 ] || timeout 60 srun --nodes=1 --ntasks=1 true || say "a step that does nothing has failed; the run starts anyway"
}

launch() { # CONFIG [a.b=value ...]: one agent per node, until all of them have ended
    local address agent
    address=$(head_address) || fail 1 "SLURM's controller does not say where the first node is"
    agent=("${inside[@]}" mmscale launch --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
        --master-addr "$address" --master-port "$(rendezvous_port)")
    MMSCALE_KILL_WAIT_S=$(ask_controller scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
    export MMSCALE_ATTEMPT=$token MMSCALE_LEAD_S=$lead_s MMSCALE_END_TIME=$ends_at MMSCALE_KILL_WAIT_S
    say "nodes $SLURM_JOB_NODELIST, rank 0 at $address:$(rendezvous_port), logs $run/logs/$token.node*.log"
    skip_step_number
    # The inner shell ignores USR1 and hands that on: a step that is signalled while the agent starts must not die of it.
    # It alone knows the number of its node, which goes behind the agent's command, in front of CONFIG.
    # --wait: agents end together, so one that is silent so much later has lost its slurmstepd, and srun would wait for it for long.
    # shellcheck disable=SC2016
    run_step srun --kill-on-bad-exit=1 --wait=30 --export=ALL --nodes="$SLURM_NNODES" --ntasks-per-node=1 \
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_options[@]}" \
        --output="${run//%/%%}/logs/$token.node%n.log" --open-mode=append \
        bash -c 'trap "" USR1; n=$1; shift; exec "${@:1:n}" --node-rank "$SLURM_NODEID" "${@:n+1}"' \
        agent ${#agent[@]} "${agent[@]}" "$@"
}
