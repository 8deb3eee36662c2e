"""What SLURM does, as far as our job scripts rest on it; no torch here, so that a new SLURM is tried in a minute."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, Job

# The trainer's place. Python, because a shell cannot take back a signal that its parent ignores.
WORKER = """
import os, pathlib, signal
folder, name = pathlib.Path(os.environ["OUT"]), "worker" + os.environ["SLURM_NODEID"]
def write(file): (folder / file / name).touch()
signal.signal(signal.SIGUSR1, lambda *_: write("got"))
write("up")
while not (folder / "stop").exists():
    signal.sigtimedwait([], 0.05)
"""
# The launcher's place: a parent without a handler of its own.
AGENT = '"$PYTHON" "$OUT/worker.py"; touch "$OUT/survived/agent$SLURM_NODEID"\n'
BATCH = """
trap 'touch $OUT/got/batch' USR1
srun bash -c "$BEFORE"' exec bash "$OUT/agent.sh"' & pid=$!
while kill -0 $pid 2> /dev/null; do wait $pid; rc=$?; done
echo "srun rc=$rc"
"""
IGNORE = 'trap "" USR1;'
FIRST_OR_SECOND = 'if [ -n "${SLURM_RESTART_COUNT:-}" ]; then echo "second on $SLURM_JOB_NODELIST"; exit 0; fi\n'


def start_tree(cluster: Cluster, folder: Path, before: str, *options: str) -> Job:
    """A job of a batch shell, two agents and two workers, all up; each leaves a file in `folder`/got for a USR1."""
    (folder / "worker.py").write_text(WORKER)
    (folder / "agent.sh").write_text(AGENT)
    for name in ("up", "got", "survived"):
        (folder / name).mkdir()
    env = {"OUT": str(folder), "BEFORE": before, "PYTHON": sys.executable}
    job = cluster.submit_text(BATCH, options=["-N2", *options], env=env)
    job.wait_until(lambda: names(folder, "up") == ["worker0", "worker1"], 20, "both workers are up")
    return job


def names(folder: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (folder / kind).iterdir())


def finish_tree(job: Job, folder: Path) -> None:
    (folder / "stop").touch()
    job.wait_end()


@pytest.mark.parametrize("by", ["scancel --batch", "--signal=B:USR1 before the time limit"])
def test_batch_signal_reaches_the_batch_shell_alone(cluster: Cluster, tmp_path: Path, by: str) -> None:
    if by == "scancel --batch":
        job = start_tree(cluster, tmp_path, "")
        job.signal("USR1", "--batch")
    else:
        job = start_tree(cluster, tmp_path, "", "--time=1", "--signal=B:USR1@59")
    job.wait_until(lambda: names(tmp_path, "got"), 40, "somebody got USR1")
    finish_tree(job, tmp_path)
    assert names(tmp_path, "got") == ["batch"]
    assert names(tmp_path, "survived") == ["agent0", "agent1"]
    assert "srun rc=0" in job.log


def test_step_signal_reaches_agent_and_worker(cluster: Cluster, tmp_path: Path) -> None:
    job = start_tree(cluster, tmp_path, IGNORE)
    cluster.run("scancel", "--signal=USR1", f"{job.id}.0")
    job.wait_until(lambda: len(names(tmp_path, "got")) == 2, 20, "both workers got USR1")
    finish_tree(job, tmp_path)
    assert names(tmp_path, "got") == ["worker0", "worker1"]
    assert names(tmp_path, "survived") == ["agent0", "agent1"]
    assert "srun rc=0" in job.log


def test_step_signal_kills_an_agent_that_does_not_ignore_it(cluster: Cluster, tmp_path: Path) -> None:
    job = start_tree(cluster, tmp_path, "")
    cluster.run("scancel", "--signal=USR1", f"{job.id}.0")
    job.wait_until(lambda: len(names(tmp_path, "got")) == 2, 20, "both workers got USR1")
    finish_tree(job, tmp_path)  # orphans by now, which keep the step alive until they end
    assert names(tmp_path, "survived") == []
    assert "srun rc=" in job.log and "srun rc=0" not in job.log


def test_requeue_keeps_id_and_log_and_counts(cluster: Cluster) -> None:
    job = cluster.submit_text(FIRST_OR_SECOND + 'echo "first"; sleep 100 & wait\n')
    job.wait_log("first")
    begin = time.monotonic()
    cluster.run("scontrol", "requeue", str(job.id))
    job.wait_log("second", limit_s=15)
    assert time.monotonic() - begin <= 15
    assert job.wait_end() == "COMPLETED"
    assert job.restarts == 1
    assert job.log.startswith("first")  # --open-mode=append


def test_requeue_terminates_then_kills(cluster: Cluster, tmp_path: Path) -> None:
    """All processes of the job get SIGTERM at once, the batch shell and its commands too, and SIGKILL after KillWait."""
    # 1/10 s ticks go on in the shell, whose `sleep`s SIGTERM ends
    text = (
        FIRST_OR_SECOND + 'trap "date +%s.%N >> $OUT/term" TERM\necho up\nwhile true; do date +%s.%N > $OUT/alive.new; '
    )
    text += "mv $OUT/alive.new $OUT/alive; sleep 0.1; done\n"
    job = cluster.submit_text(text, env={"OUT": str(tmp_path)})
    job.wait_log("up")
    begin = time.time()
    cluster.run("scontrol", "requeue", str(job.id))
    job.wait_log("second")
    terminated, last_alive = (float((tmp_path / name).read_text().split()[0]) for name in ("term", "alive"))
    assert terminated - begin < 2
    assert 3 < last_alive - terminated < cluster.KILL_WAIT_S + 3
    job.wait_end()


def test_requeueing_shell_can_exclude_its_node(cluster: Cluster) -> None:
    """Only after the requeue: SLURM changes the nodes of no running job. The command must outlive the SIGTERM."""
    text = FIRST_OR_SECOND + 'echo "first on $SLURM_JOB_NODELIST"\n'
    text += "scontrol update JobId=$SLURM_JOB_ID ExcNodeList=fx1 || echo refused\n"
    text += "trap '' TERM; scontrol requeue $SLURM_JOB_ID && scontrol update JobId=$SLURM_JOB_ID ExcNodeList=fx1\n"
    job = cluster.submit_text(text)
    job.wait_log("second")
    assert "first on fx1\n" in job.log and "second on fx2\n" in job.log
    assert "refused" in job.log
    assert job.fields()["ExcNodeList"] == "fx1"
    job.wait_end()


def test_arguments_with_spaces_survive(cluster: Cluster) -> None:
    args = ["a b", "model.name='x y'", 'say "hi"', "$HOME", "*", ""]
    job = cluster.submit_text('printf "<%s>\\n" "$@"\n', *args)
    assert job.wait_end() == "COMPLETED"
    assert job.log.splitlines() == [f"<{arg}>" for arg in args]


def test_listed_variables_reach_the_ranks_and_no_others(cluster: Cluster) -> None:
    text = "#SBATCH --export=PATH,HOME,WANTED\n"
    text += 'echo "shell: $WANTED ${OTHER-unset}"\nexport LATE=late\n'
    text += "srun bash -c 'echo \"rank: $WANTED ${OTHER-unset} ${LATE-unset}\"'\n"
    text += "srun --export=ALL bash -c 'echo \"all: $WANTED ${OTHER-unset} ${LATE-unset}\"'\n"
    job = cluster.submit_text(text, env={"WANTED": "a b", "OTHER": "secret"})
    assert job.wait_end() == "COMPLETED", job.log
    assert job.log.splitlines() == ["shell: a b unset", "rank: a b unset unset", "all: a b unset late"]


def test_singleton_jobs_run_one_after_the_other(cluster: Cluster, tmp_path: Path) -> None:
    options = ["--job-name=chain", "--dependency=singleton"]
    text = 'echo "+$1" >> $OUT/order; sleep 0.5; echo "-$1" >> $OUT/order\n'
    jobs = [cluster.submit_text(text, str(k), options=options, env={"OUT": str(tmp_path)}) for k in range(3)]
    for job in jobs:
        assert job.wait_end() == "COMPLETED"
    assert (tmp_path / "order").read_text().split() == ["+0", "-0", "+1", "-1", "+2", "-2"]


def test_address_of_a_node_and_end_time(cluster: Cluster) -> None:
    """What a job needs although node names may not resolve and times are written in the site's format."""
    text = 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)\n'
    text += "scontrol show node $head | grep -o 'NodeAddr=[^ ]*'\n"
    text += "SLURM_TIME_FORMAT=%s scontrol show job $SLURM_JOB_ID | grep -o 'EndTime=[^ ]*'; date +%s\n"
    job = cluster.submit_text(text, options=["-N2", "--time=3"])
    assert job.wait_end() == "COMPLETED"
    address, end_time, now = job.log.split()
    assert address == "NodeAddr=127.0.0.1"
    assert 170 <= int(end_time.removeprefix("EndTime=")) - int(now) <= 181
