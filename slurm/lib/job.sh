# What mmscale's batch scripts do. Read by bash; reading it does nothing but define functions.
# The scripts set `repo`, the folder that holds slurm/, before they read this.

for part in rendezvous signals progress requeue; do
    . "$repo/slurm/lib/$part.sh" || exit 1
done

restarts=${SLURM_RESTART_COUNT:-0} # SLURM leaves it unset in the first attempt
token=$SLURM_JOB_ID.$restarts

say() { echo "[$(date '+%F %T')] [$token] $*"; }

fail() { # CODE TEXT...: ends the job, which is not requeued then
    local code=$1
    shift
    say "FAILED: $*" >&2
    exit "$code"
}

read_site() { # settings of the cluster, see slurm/site.env.example; assignments after this call win
    VENV='' MODULES='' CONTAINER='' CONTAINER_RUNTIME=apptainer MOUNTS='' PROCS_PER_NODE='' LEAD_S=120
    local site=${MMSCALE_SITE:-}
    if [ -z "$site" ] && [ -f "$repo/slurm/site.env" ]; then site=$repo/slurm/site.env; fi
    [ -z "$site" ] || . "$(realpath "$site")" || fail 2 "expected a site file at MMSCALE_SITE=$site, which cannot be read; correct the path"
}

enter_environment() { # modules, virtual environment and container, on this node and for srun
    if [ -n "$MODULES" ]; then
        set +u # neither profiles nor modules are written for it
        type module >/dev/null 2>&1 || . /etc/profile
        # shellcheck disable=SC2086  # a list of words
        module load $MODULES || fail 2 "MODULES=$MODULES cannot be loaded; correct it in site.env"
        set -u
    fi
    if [ -z "$VENV" ] && [ -x "$repo/.venv/bin/python" ]; then VENV=$repo/.venv; fi
    [ -z "$VENV" ] || export PATH="$VENV/bin:$PATH"
    inside=() srun_options=()
    [ -n "$CONTAINER" ] || return 0
    case $CONTAINER_RUNTIME in
        apptainer) inside=(apptainer exec ${SLURM_GPUS_ON_NODE:+--nv} ${MOUNTS:+--bind "$MOUNTS"} "$CONTAINER") ;;
        pyxis) srun_options=(--container-image="$CONTAINER" ${MOUNTS:+--container-mounts="$MOUNTS"}) ;;
        *) fail 2 "expected CONTAINER_RUNTIME=apptainer or pyxis, found $CONTAINER_RUNTIME; correct it in site.env" ;;
    esac
}

ask_mmscale() { # MODULE ARGUMENTS...: what a torch-free module of mmscale prints, run on this node
    if [ ${#srun_options[@]} -gt 0 ]; then
        srun --overlap --nodes=1 --ntasks=1 --export=ALL "${srun_options[@]}" python -m "$@"
    else
        "${inside[@]}" python -m "$@"
    fi
}

in_one_task() { # COMMAND...: one task on one node, in the environment of the site
    srun --nodes=1 --ntasks=1 --export=ALL ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        "${srun_options[@]}" "${inside[@]}" "$@"
}

train_job() { # CONFIG [a.b=value ...]: trains, and sees to it that the run goes on until it is finished
    [ $# -ge 1 ] || fail 2 "expected CONFIG [a.b=value ...] behind the script's name, found nothing; give the YAML file of a run"
    catch_signals
    enter_environment
    local answer
    answer=$(ask_mmscale mmscale.cluster.batch run "$@") || fail 2 "the config was refused, see the line above"
    steps=${answer%% *} run=${answer#* }
    start_attempt
    launch "$@"
    finish_attempt
}

eval_job() { # MODEL DATASET...: one dataset per array task; the last task to end merges the answers
    [ $# -ge 2 ] || fail 2 "expected MODEL DATASET... behind the script's name, found $# words; name a model and its datasets"
    local model=$1 device=cpu
    shift
    [ "${SLURM_ARRAY_TASK_MIN:-}-${SLURM_ARRAY_TASK_MAX:-}-${SLURM_ARRAY_TASK_COUNT:-}" = "0-$(($# - 1))-$#" ] ||
        fail 2 "expected one array task per dataset, found $# datasets and another array; submit with --array=0-$(($# - 1))"
    local dataset=${*:$((SLURM_ARRAY_TASK_ID + 1)):1} out=eval-$SLURM_ARRAY_JOB_ID
    local answers
    answers=$out/$(printf %05d "$SLURM_ARRAY_TASK_ID").jsonl
    [ -e "$dataset/manifest.json" ] || fail 2 "expected a dataset in $dataset, found no manifest.json there; correct the path"
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || device=cuda
    enter_environment
    mkdir -p "$out" || exit 1
    say "$dataset -> $answers"
    in_one_task mmscale eval "$model" "$dataset" --out "$answers.part" --device "$device" ||
        fail 1 "mmscale eval on $dataset; the reason stands above"
    mv "$answers.part" "$answers" || exit 1
    ask_mmscale mmscale.eval.merge "$out" --parts $#
}

consolidate_job() { # RUN OUT [options of mmscale consolidate]
    enter_environment
    in_one_task mmscale consolidate "$@" || fail 1 "mmscale consolidate; the reason stands above"
}
