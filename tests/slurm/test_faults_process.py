"""Processes that die, hang or are signalled, with real training on the real cluster. docs/what-happens-when.md has a row for each."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from cluster import Cluster
from judge import History
from runs import HANG_FLOOR_S, SAVE_EVERY, STEPS, Run, kill, loads

from mmscale.train.goodput import goodput_of
from mmscale.train.heartbeat import beat_path, read_beat


@pytest.fixture
def run(cluster: Cluster, demo_data: Path, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path, demo_data)


def test_each_process_killed_in_turn(run: Run, reference: History) -> None:
    """kill -9 of rank 0, of rank 1, of an agent and of a node's slurmstepd: one run survives all of them."""
    job = run.sbatch()
    for number, victim in enumerate(("rank 0", "rank 1", "agent", "slurmstepd")):
        token = f"{job.id}.{number}"
        ranks, agent = run.ranks(job, token), run.agent(job, token, 0)
        stepd = psutil.Process(run.agent(job, token, 1)).ppid()
        saved = run.wait_checkpoint(job, token)
        kill({"rank 0": ranks[0], "rank 1": ranks[1], "agent": agent, "slurmstepd": stepd}[victim])
        if victim == "slurmstepd":
            break  # SLURM may not notice: then the orphans train to the end
        assert run.wait_over(job, token)["decision"] == "requeue", f"after the end of {victim}"
        assert run.last_step(token) - saved <= SAVE_EVERY
    run.wait_done(job)
    found = run.check_equals(reference)
    assert [one.redone <= SAVE_EVERY for one in found] == [True] * len(found) and len(found) in (3, 4)
    assert job.restarts == len(found)
    for number in (0, 1):
        token = f"{job.id}.{number}"
        assert f"rank {number} (process" in run.log(token) and "was ended by SIGKILL" in run.log(token)
        assert (run.read(token, f"error-{number}") or {})["cause"] == "killed"
        other = run.read(token, f"error-{1 - number}")  # it may be ended before it has said anything
        assert other is None or other["cause"] == "other"


def test_a_hang_is_found_named_and_mended(run: Run, reference: History) -> None:
    """SIGSTOP of a rank: the agents take all stacks, name the rank, and the job is requeued."""
    job = run.sbatch()
    token = f"{job.id}.0"
    ranks = run.ranks(job, token)
    run.wait_checkpoint(job, token)
    stopped_at = time.time()
    os.kill(ranks[1], signal.SIGSTOP)
    assert run.wait_over(job, token)["decision"] == "requeue"
    hangs = [hang for node in (0, 1) if (hang := run.read(token, f"hang-{node}"))]
    assert len(hangs) == 2
    for hang in hangs:
        assert hang["slowest"]["rank"] == 1 and hang["slowest"]["halted"]
        assert hang["limit_s"] >= HANG_FLOOR_S
        print(f"\nhang: limit {hang['limit_s']:.1f} s, found after {hang['at'] - stopped_at:.1f} s", end="")
        assert hang["at"] - stopped_at <= hang["limit_s"] + 20
    log = run.log(token)
    assert "hang: rank 1 on" in log and "(its process does not run)" in log
    for rank, pid in enumerate(ranks):
        assert f"--- rank {rank}, process {pid}" in log
    assert log.count("most recent call first") >= 2 and "loop.py" in log, "the stacks of both ranks"
    run.wait_done(job)
    (recovery,) = run.check_equals(reference)
    assert recovery.redone <= SAVE_EVERY and job.restarts == 1
    assert goodput_of(run.folder).seconds["hang"] > HANG_FLOOR_S


def test_signals_at_bad_moments(run: Run, reference: History) -> None:
    """SIGTERM before and after torch is imported, a requeue in full swing, and the limit's signal in the last step."""
    job = run.sbatch()
    early = run.ranks(job, f"{job.id}.0")
    assert not any(loads(pid, "libtorch") for pid in early)
    job.signal("TERM")
    assert run.wait_over(job, f"{job.id}.0")["decision"] == "requeue"

    late = run.ranks(job, f"{job.id}.1")
    run.wait(job, lambda: all(loads(pid, "libtorch_cpu") for pid in late), "all ranks import torch", step_s=0.01)
    assert run.read(f"{job.id}.1", "start") is None
    run.cluster.run("scontrol", "requeue", str(job.id))
    assert run.wait_over(job, f"{job.id}.1")["decision"] == "stale"

    run.ranks(job, f"{job.id}.2")
    saved = run.wait_checkpoint(job, f"{job.id}.2")
    run.wait_step(job, saved + 2, f"{job.id}.2")
    run.cluster.run("scontrol", "requeue", str(job.id))
    assert run.wait_over(job, f"{job.id}.2")["decision"] == "stale"

    token = f"{job.id}.3"
    ranks = run.ranks(job, token)
    run.wait_step(job, STEPS - 1, token)
    os.kill(ranks[1], signal.SIGSTOP)  # the others wait for it in the last step, so the signal cannot come too late
    try:
        assert not (run.folder / "DONE").exists()
        beat = read_beat(beat_path(run.folder, 0))
        assert beat is not None and beat.step >= STEPS - 1
        job.signal("USR1", "--batch")
        run.wait(job, lambda: all(run.read(token, f"signal-{node}") for node in (0, 1)), "both agents have heard")
    finally:
        os.kill(ranks[1], signal.SIGCONT)
    run.wait_done(job)
    found = run.check_equals(reference)
    assert all(one.redone == 0 for one in found), found
    assert [one.outcome for one in run.attempts[2:3]] == ["stopped"]
    assert not any("without a new checkpoint" in one.reason for one in run.attempts), "a signal is no failure"
    assert job.restarts == len(run.attempts) - 1 and job.restarts in (3, 4)
