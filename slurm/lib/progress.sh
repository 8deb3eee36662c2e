# The beginning and the end of an attempt: what is known goes into the run directory, and files decide.

again_for() { # SECONDS COMMAND...: runs it again while it fails, for so long
    local end=$((SECONDS + $1))
    shift
    trap '' TERM # SLURM sends it to every process of this shell's step: a question that dies of it would look like no answer
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 2
    done
}

ask_controller() { again_for 3600 "$@"; } # it may be down for long, which says nothing about this job

show_job() { SLURM_TIME_FORMAT=%s scontrol show job --oneliner "$SLURM_JOB_ID"; }

field() { # NAME: its value in a line of scontrol on stdin
    sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

start_attempt() { # writes job.json; ends the job when there is nothing to do
    local job queue answer
    mode=requeue submission=$SLURM_JOB_ID lead_s=${MMSCALE_LEAD_S:-$LEAD_S}
    if [ -n "${MMSCALE_CHAIN:-}" ]; then mode=chain submission=$MMSCALE_CHAIN; fi
    job=$(ask_controller show_job) || fail 1 "SLURM's controller does not answer"
    # other numbers: this shell is late, or the variable came from the shell that submitted
    [ "$(field Restarts <<<"$job")" = "$restarts" ] ||
        fail 1 "expected restart $restarts of this job, which SLURM_RESTART_COUNT says, found another; unset it before you submit"
    queue=$(ask_controller squeue --me --noheader --format='%A %j') || fail 1 "SLURM's controller does not answer"
    ends_at=$(field EndTime <<<"$job")
    case $ends_at in '' | *[!0-9]*) ends_at='' ;; esac # Unknown: no limit
    answer=$(ask_mmscale mmscale.cluster.batch start "$run" --steps "$steps" --token "$token" --mode "$mode" --submission "$submission" \
        --lead "$lead_s" --nodes "$(node_names | paste -s -d ,)" <<<"$job"$'\n'"$queue") || fail 2 "this attempt was refused, see above"
    say "$answer; run directory $run"
    [ "${answer%% *}" = go ] || exit 0
}

finish_attempt() { # asks what the files say, and does it
    local job state answer
    job=$(ask_controller show_job) || fail 1 "SLURM's controller has not answered for an hour; submit the same command again"
    state=$(field JobState <<<"$job")
    if [ "$(field Reason <<<"$job")" = TimeLimit ]; then state=TIMEOUT; fi
    answer=$(again_for 20 ask_mmscale mmscale.cluster.after "$run" --token "$token" --restarts "$(field Restarts <<<"$job")" \
        --state "$state" --signal "$asked" --rc "$rc") || fail 1 "mmscale.cluster.after says nothing, see above"
    say "$answer"
    case ${answer%% *} in
        done | stale | stopped) exit 0 ;;
        requeue) go_on ;;
        *) fail 1 "${answer#* }; after mending it, submit the same command again" ;;
    esac
}
