# What this shell does when it is signalled. bash runs a trap only between commands, so srun runs in the background.
#
# USR1   comes LEAD_S seconds before the time limit, to this shell alone: the agents are told, which save and stop
# TERM   comes at a requeue, a cancellation or the end of a node; SLURM sends it to the agents too: it is only remembered

asked=''     # the signal that came first
step_pid=''  # srun, while it runs
messenger='' # tells the agents, while they have not answered

catch_signals() { # before srun: without a trap USR1 kills this shell
    trap 'on_signal USR1' USR1
    trap 'on_signal TERM' TERM
}

on_signal() { # NAME
    asked=${asked:-$1} # the first one says why
    say "got SIG$1"
    tell_agents
}

tell_agents() { # sends USR1 until every agent has confirmed it: the step, or the agent's handler, may not be there yet
    if [ "$asked" != USR1 ] || [ -z "$step_pid" ] || [ -n "$messenger" ]; then return; fi
    (
        trap - USR1 TERM
        until all_agents_heard; do
            scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null # without --batch: the steps, not this shell
            sleep 2
        done
    ) &
    messenger=$!
}

all_agents_heard() {
    local files=("$run/attempts/$token"/signal-*.json)
    [ -e "${files[0]}" ] && [ ${#files[@]} -ge "$SLURM_NNODES" ]
}

run_step() { # COMMAND...: runs it to its end and sets rc, which is for the log alone
    rc=143
    [ "$asked" != TERM ] || return 0 # the job is being taken away: SLURM would not start the step
    "$@" &
    step_pid=$!
    tell_agents # of a signal that came before the step
    while :; do # `wait` returns early when a trap runs
        wait "$step_pid"
        rc=$?
        kill -0 "$step_pid" 2>/dev/null || break
    done
    step_pid=''
    [ -z "$messenger" ] || kill "$messenger" 2>/dev/null
}
