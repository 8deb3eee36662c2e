# How a run goes on after an attempt: the job is requeued, or the next job of a chain starts.

go_on() {
    local bad next
    bad=$(ask_mmscale mmscale.cluster.batch bad-nodes "$run")
    if [ "$mode" = chain ]; then
        next=$(ask_controller squeue --me --noheader --states=PENDING --name="$submission" --format=%A)
        [ -n "$next" ] || fail 1 "the run is not finished and no job of the chain $submission is left; submit again to go on"
        exclude "$bad" "$next"
    else
        requeue || fail 1 "SLURM refuses to requeue this job; use a chain of jobs (mmscale submit --chain K)"
        exclude "$bad" "$SLURM_JOB_ID" # SLURM takes this only for a pending job
    fi
    exit 0
}

requeue() { # puts this job back into the queue; SLURM then ends this shell
    local answer end=$((SECONDS + 300))
    while [ $SECONDS -lt $end ]; do
        answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) && return 0
        case $answer in
            *[Pp]ending*) return 0 ;;                            # an earlier try has worked, its answer was lost
            '' | *[Cc]ontact* | *[Tt]imed\ out* | *Terminated*) ;; # the controller is down, or a signal ended scontrol
            *)
                say "scontrol requeue: $answer"
                return 1
                ;;
        esac
        sleep 2
        # SLURM may have done it itself meanwhile: another requeue would end the attempt that it has started
        [ "$(ask_controller show_job | field Restarts)" = "$restarts" ] || return 0
    done
    return 1
}

exclude() { # NODES JOBS: the jobs will not run on the nodes (a list with commas; empty = none)
    local job known
    [ -n "$1" ] || return 0
    for job in $2; do
        known=$(ask_controller scontrol show job --oneliner "$job" | field ExcNodeList)
        [ "$known" != '(null)' ] || known=''
        again_for 20 scontrol update JobId="$job" ExcNodeList="${known:+$known,}$1" && say "job $job will avoid $1"
    done
}
