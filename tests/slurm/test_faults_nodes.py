"""Nodes, daemons and the controller that fail, with real training on the real cluster. docs/what-happens-when.md has a row for each."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest
from brake import Brake
from cluster import Cluster, Job
from judge import History, rows
from runs import SAVE_EVERY, Run, kill

from mmscale.train.manifest import read_manifest

UNNOTICED_S = 28
"""Until SLURM finds a node dead, with SlurmdTimeout=10."""

DEATH_S = 60
"""The same on a machine that is busy with something else."""


@pytest.fixture
def run(cluster: Cluster, demo_data: Path, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path, demo_data)


def wait_start(run: Run, job: Job, token: str, limit_s: float = DEATH_S + 30) -> None:
    """Returns when an attempt has chosen from which checkpoint it goes on."""
    run.wait(job, lambda: run.read(token, "start"), f"attempt {token} has started", limit_s)


def wait_saved_state(run: Run, job: Job, token: str) -> None:
    """Returns when slurmctld has written down that an attempt's step runs; it does so some seconds later."""
    path = job.cluster.root / "state/job_state"
    began = (run.read(token, "job") or {})["started_at"]
    job.wait_until(lambda: path.exists() and path.stat().st_mtime > began + 1, 20, "slurmctld has saved its state")


def saved_by(run: Run, token: str) -> set[int]:
    """Steps that an attempt has saved, by its own word and by the manifests that are there."""
    manifests = [read_manifest(path.parent) for path in (run.folder / "checkpoints").glob("*step_*/manifest.json")]
    found = {manifest["step"] for manifest in manifests if manifest["attempt"] == token}
    return found | {row["step"] for row in run.events("save") if row["attempt"] == token}


def test_a_node_set_down_and_a_controller_killed(run: Run, reference: History) -> None:
    """An administrator takes a node away; then slurmctld dies and comes back, and the job can still be requeued."""
    job = run.sbatch()
    run.ranks(job, f"{job.id}.0")
    run.wait_checkpoint(job, f"{job.id}.0")
    node = run.nodes(f"{job.id}.0")[1]
    run.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    wait_start(run, job, f"{job.id}.1")

    ranks = run.ranks(job, f"{job.id}.1")
    with Brake(run.folder):
        saved = run.wait_checkpoint(job, f"{job.id}.1")
        wait_saved_state(run, job, f"{job.id}.1")
        run.cluster.restart_controller()
        run.wait_step(job, run.last_step(f"{job.id}.1") + 1, f"{job.id}.1")
        kill(ranks[1])
        assert run.wait_over(job, f"{job.id}.1")["decision"] == "requeue"
    assert run.last_step(f"{job.id}.1") > saved
    run.wait_done(job)
    down, killed = run.check_equals(reference)
    assert down.redone == 0 and killed.redone <= SAVE_EVERY
    assert job.restarts == 2


def test_nodes_fail_and_there_is_no_spare(run: Run, reference: History) -> None:
    """slurmd of the second node dies while the ranks live, then the whole node: the job waits each time until it is back."""
    job = run.sbatch("--nodelist=fx1,fx2")
    ranks = run.ranks(job, f"{job.id}.0")
    with Brake(run.folder):
        run.wait_checkpoint(job, f"{job.id}.0")
        run.cluster.kill_slurmd("fx2")
        before = run.last_step(f"{job.id}.0")
        run.cluster.wait_node("fx2", "DOWN", DEATH_S)
        assert run.last_step(f"{job.id}.0") > before + 5, "it trains on without slurmd"
    job.wait_state("PENDING")
    run.wait(job, lambda: not any(map(psutil.pid_exists, ranks)), "both ranks have ended")
    assert (run.read(f"{job.id}.0", "end") or {})["outcome"] == "stopped"
    run.cluster.start_node("fx2")

    wait_start(run, job, f"{job.id}.1")
    saved = run.wait_checkpoint(job, f"{job.id}.1")
    run.cluster.kill_node("fx2")
    assert run.last_step(f"{job.id}.1") - saved <= SAVE_EVERY
    run.cluster.wait_node("fx2", "DOWN", DEATH_S)
    job.wait_state("PENDING")
    assert job.restarts == 2 and not (run.folder / "DONE").exists()
    run.cluster.start_node("fx2")

    run.wait_done(job)
    first, second = run.check_equals(reference, unnoticed_s=UNNOTICED_S)
    assert first.redone == 0 and second.redone <= SAVE_EVERY
    # no stray: slurmctld keeps the signal that ended the old step for the node that did not answer, and hands it over when it is back
    assert job.restarts == 2 and "FAILED" not in job.log
    assert [run.nodes(one.token) for one in run.attempts] == [["fx1", "fx2"]] * 3


def test_nodes_fail_and_there_is_a_spare(run: Run, reference: History) -> None:
    """A node dies, then slurmd of the batch host: its shell outlives its attempt beside the next one, and touches nothing."""
    job = run.sbatch()
    run.ranks(job, f"{job.id}.0")
    run.wait_checkpoint(job, f"{job.id}.0")
    run.cluster.kill_node("fx2")
    wait_start(run, job, f"{job.id}.1")
    assert run.nodes(f"{job.id}.1") == ["fx1", "fx3"]
    with Brake(run.folder):
        run.cluster.start_node("fx2")
        run.wait_checkpoint(job, f"{job.id}.1")
        run.cluster.wait_node("fx2", "IDLE")
        run.cluster.kill_slurmd("fx1")
        run.cluster.wait_node("fx1", "DOWN", DEATH_S)
    wait_start(run, job, f"{job.id}.2")
    assert run.nodes(f"{job.id}.2") == ["fx2", "fx3"]
    assert run.wait_over(job, f"{job.id}.1")["decision"] == "stale"
    run.wait_done(job)
    died, drained = run.check_equals(reference, unnoticed_s=UNNOTICED_S)
    assert died.redone <= SAVE_EVERY and drained.redone == 0
    assert job.restarts == 2, "the shell that SLURM has forgotten requeues nothing"
    assert max(saved_by(run, f"{job.id}.1")) <= run.base(f"{job.id}.2"), (
        "it may end between a commit and the word of it"
    )
    assert run.read(f"{job.id}.2", "after") is not None and not (run.folder / "DO_NOT_RESTART").exists()


def test_a_zombie_beside_a_healthy_attempt(run: Run, reference: History) -> None:
    """A whole node freezes, its job starts elsewhere, and the node wakes up: the old attempt commits nothing and requeues nothing."""
    with Path(run.env["MMSCALE_SITE"]).open("a") as site:
        site.write("PROCS_PER_NODE=2\n")
    job = run.sbatch(nodes=1)
    old, new = f"{job.id}.0", f"{job.id}.1"
    run.wait_checkpoint(job, old)
    ranks = run.ranks(job, old)
    assert run.nodes(old) == ["fx1"] and len(ranks) == 2
    run.cluster.kill_slurmd("fx1")
    frozen = [pid for pid in run.cluster.processes("fx1") if pid not in ranks]
    for pid in [*ranks, *frozen]:
        os.kill(pid, signal.SIGSTOP)
    made, committed = run.last_step(old), saved_by(run, old)
    try:
        wait_start(run, job, new)
        assert run.nodes(new) == ["fx2"]
        run.wait_checkpoint(job, new)
        with Brake(run.folder):
            wake(ranks)
            run.wait(job, lambda: run.read(old, "end"), "the old trainer has seen that it is fenced")
            wake(frozen)
            assert run.wait_over(job, old)["decision"] == "stale"
            assert job.state == "RUNNING" and job.restarts == 1
    finally:
        wake([*ranks, *frozen])
    run.wait_done(job)
    assert (run.read(old, "end") or {})["outcome"] == "fenced"
    assert "goes on with this run" in run.log(old) and "ValueError" not in run.log(old)
    assert saved_by(run, old) == committed and run.last_step(old) <= made + 1
    assert not list((run.folder / "checkpoints").glob(f"*{old}.tmp"))
    (recovery,) = run.check_equals(reference, unnoticed_s=UNNOTICED_S)
    assert recovery.redone <= SAVE_EVERY and job.restarts == 1
    assert (run.folder / "OWNER").read_text() == f"{new}\n"
    assert [row["attempt"] for row in rows(run.folder / "events.jsonl")][-1] == new


def wake(pids: list[int]) -> None:
    """Lets processes that were stopped go on."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it was killed in the meantime
            os.kill(pid, signal.SIGCONT)
