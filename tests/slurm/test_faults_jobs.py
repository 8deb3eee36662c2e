"""Limits, chains, several jobs and other sizes on one run directory, with real training on the real cluster.

docs/what-happens-when.md has a row for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from brake import Brake
from cluster import Cluster
from judge import History
from runs import RECIPE, SAVE_EVERY, Run, kill


@pytest.fixture
def run(cluster: Cluster, demo_data: Path, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path, demo_data)


def mmscale(run: Run, *words: str) -> subprocess.CompletedProcess[str]:
    """A command of a user on the login node."""
    env = {**os.environ, **run.cluster.env, **run.env}
    command = [sys.executable, "-m", "mmscale", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def submit(run: Run, *options: str) -> subprocess.CompletedProcess[str]:
    """`mmscale submit` of the run on two nodes."""
    return mmscale(run, "submit", str(RECIPE), *run.words, "-N", "2", "-t", "10:00", *options)


def status(run: Run) -> dict[str, Any]:
    """What `mmscale status` says, for programs."""
    done = mmscale(run, "status", str(run.folder), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def add_to_site(run: Run, line: str) -> None:
    with Path(run.env["MMSCALE_SITE"]).open("a") as site:
        site.write(line + "\n")


def test_the_time_limit(run: Run, reference: History) -> None:
    """A real limit of one minute, of a job that takes longer: by SLURM's signal or its own clock it saves in time, and goes on.

    SLURM sends the signal up to a minute early, and in so short a job that may be before the first step.
    """
    job = run.sbatch("--time=1", "--signal=B:USR1@10", env={"MMSCALE_LEAD_S": "10"})
    token = f"{job.id}.0"
    with Brake(run.folder):
        run.wait(job, lambda: run.read(token, "end"), "the attempt has ended in time")
    assert run.wait_over(job, token)["decision"] == "requeue"
    end, times = run.read(token, "end") or {}, run.read(token, "job") or {}
    assert end["outcome"] == "stopped" and end["at"] < times["ends_at"] - 15, "the rest of the lead is a reserve"
    assert times["ends_at"] - times["started_at"] == 60
    run.wait_done(job)
    assert all(one.redone == 0 for one in run.check_equals(reference))
    assert job.restarts == len(run.attempts) - 1 >= 1


def test_a_chain_by_mmscale_submit(cluster: Cluster, demo_data: Path, tmp_path: Path, reference: History) -> None:
    """Blanks in every path; the first job loses a rank, the second goes on, the third has nothing to do. Then status and report."""
    data = tmp_path / "my data"
    data.symlink_to(demo_data)
    run = Run(cluster, tmp_path / "my runs", data)
    done = submit(run, "--chain", "3", "--lead", "30", "--site", run.env["MMSCALE_SITE"])
    assert done.returncode == 0, done.stderr
    jobs = [cluster.job(int(word)) for word in done.stdout.splitlines()[0].split(":")[0].split()[-3:]]
    first, second, third = jobs
    ranks = run.ranks(first, f"{first.id}.0")
    saved = run.wait_checkpoint(first, f"{first.id}.0")
    kill(ranks[1])
    assert run.wait_over(first, f"{first.id}.0")["decision"] == "requeue"
    assert run.last_step(f"{first.id}.0") - saved <= SAVE_EVERY
    assert submit(run, "--lead", "30").returncode == 2, "a requeued job beside a chain"
    run.wait_done(second)
    assert third.wait_end(30) == "COMPLETED" and "done the run is finished" in third.log
    assert [job.restarts for job in jobs] == [0, 0, 0]
    (recovery,) = run.check_equals(reference)
    assert recovery.redone <= SAVE_EVERY

    found = status(run)
    assert found["state"] == "done" and found["step"] == found["total_steps"] == max(reference.ids)
    assert [one["token"] for one in found["attempts"]] == [f"{first.id}.0", f"{second.id}.0"]
    assert found["attempts"][0]["num_redone"] == recovery.redone
    seconds = found["seconds"]
    first_job, last_end = run.read(f"{first.id}.0", "job"), run.read(f"{second.id}.0", "end")
    assert first_job is not None and last_end is not None
    assert sum(seconds.values()) == pytest.approx(found["wall_s"], rel=1e-6)
    assert found["wall_s"] == pytest.approx(last_end["at"] - first_job["submitted_at"], abs=5)
    assert seconds["redone"] > 0 or recovery.redone == 0
    text = mmscale(run, "status", str(run.folder)).stdout
    assert f"{first.id}.0" in text and "mmscale consolidate" in text
    drawn = mmscale(run, "report", str(run.folder))
    assert drawn.returncode == 0, drawn.stderr
    assert (run.folder / "report/report.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{first.id}.0" in (run.folder / "report/report.html").read_text()


def test_others_on_the_directory_of_a_run(run: Run, reference: History) -> None:
    """While a job trains: another config and a chain are refused on its directory, and the job is not disturbed."""
    job = run.sbatch()
    with Brake(run.folder):
        run.wait_checkpoint(job, f"{job.id}.0")
        other = run.sbatch("--no-requeue", nodes=1, words=("train.seed=7", "train.lr=1e-3"))
        chain = run.sbatch("--no-requeue", nodes=1, env={"MMSCALE_CHAIN": "mine"})
        refused = submit(run, "--lead", "30", "--chain", "2")
        assert refused.returncode == 2 and f"scancel {job.id}" in refused.stderr, refused.stderr
        assert chain.wait_end(60) == "FAILED" and f"found that job {job.id}" in chain.log, chain.log
        assert chain.fields()["ExitCode"] == "2:0"
        assert other.wait_end(90) == "FAILED", other.log
        assert "train.lr: 0.0006 there, 0.001 now" in other.log and "train.seed" in other.log
        assert other.restarts == 0 and run.read(f"{other.id}.0", "claim") is None
        assert status(run)["state"] == "running"
        assert (run.folder / "OWNER").read_text() == f"{job.id}.0\n"
    run.wait_done(job)
    assert run.check_equals(reference) == [] and job.restarts == 0
    assert status(run)["state"] == "done"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_bad_node_is_left_out(run: Run, tiny_disk: Path, reference: History) -> None:
    """The temporary disk of one node is full: the check before the first step says so, and the next attempt runs elsewhere."""
    profile = tiny_disk.parent / "profile.sh"
    profile.write_text(f'if [ "${{SLURMD_NODENAME:-}}" = fx2 ]; then export TMPDIR={tiny_disk}; fi\n')
    add_to_site(run, f"export BASH_ENV={profile}")  # read by the shell that starts the agent on each node
    job = run.sbatch()
    run.wait_done(job)
    assert run.nodes(f"{job.id}.0") == ["fx1", "fx2"] and run.nodes(f"{job.id}.1") == ["fx1", "fx3"]
    (bad,) = json.loads((run.folder / "bad_nodes.json").read_text()).items()
    assert bad[0] == "fx2" and str(tiny_disk) in bad[1]["reason"]
    assert "node fx2 is not fit to train" in run.log(f"{job.id}.0")
    assert run.read(f"{job.id}.0", "start") is None and job.restarts == 1
    assert run.check_equals(reference) == []
    assert status(run)["attempts"][0]["outcome"] == "bad node"


SIZES = ("train.global_batch=4", "data.plan_group=4", "train.steps=24")
"""A batch that four ranks can share."""


def test_other_numbers_of_ranks(cluster: Cluster, demo_data: Path, tmp_path: Path) -> None:
    """Three jobs on one run directory: two nodes with two ranks each, with one each, and with two again."""
    straight = Run(cluster, tmp_path / "straight", demo_data, *SIZES)
    straight.wait_done(straight.sbatch())
    run = Run(cluster, tmp_path / "sizes", demo_data, *SIZES)
    for procs in (2, 1):
        add_to_site(run, f"PROCS_PER_NODE={procs}")
        job = run.sbatch()
        run.wait_checkpoint(job, f"{job.id}.0")
        job.cancel()
        assert run.wait_over(job, f"{job.id}.0")["decision"] == "stopped"
        assert (run.read(f"{job.id}.0", "end") or {})["outcome"] == "stopped"
    add_to_site(run, "PROCS_PER_NODE=2")
    run.wait_done(run.sbatch())
    found = run.check_equals(straight.history, rel=1e-6)
    assert [one.redone for one in found] == [0, 0]
    assert [(run.read(one.token, "start") or {})["world_size"] for one in run.attempts] == [4, 2, 4]
