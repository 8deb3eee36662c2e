"""The batch script's own paths on a real cluster: arguments, signals, requeue, chain, exclusion, the breaker.

The agents are stand-ins (standin.py); the scripts, SLURM and the decisions are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, Job

REPO = Path(__file__).parents[2]
RECIPE = REPO / "configs/recipes/digits.yaml"


class Bench:
    """A run directory with blanks in its name, a stand-in for `mmscale` on the PATH of jobs, and ways to submit."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run = folder / "my run"
        self.run.mkdir()
        commands = folder / "venv/bin"
        commands.mkdir(parents=True)
        for name, script in (("python", ""), ("mmscale", str(Path(__file__).with_name("standin.py")))):
            (commands / name).write_text(f'#!/bin/bash\nexec "{sys.executable}" {script} "$@"\n')
            (commands / name).chmod(0o755)
        self.env = {"MMSCALE_SITE": str(folder / "site.env"), "HF_HUB_OFFLINE": "1"}
        (folder / "site.env").write_text(f"VENV={commands.parent}\nLEAD_S=30\nPROCS_PER_NODE=3\n")
        self.words = [f"data.root={folder}/my data", f"run.dir={self.run}", "train.steps=7", "train.global_batch=6"]

    def behave(self, *attempts: str) -> None:
        """One text of actions per attempt, see standin.py."""
        (self.run / "behaviour.json").write_text(json.dumps([attempt.split() for attempt in attempts]))

    def sbatch(self, *options: str, nodes: int = 2, env: dict[str, str] | None = None, config: str = "") -> Job:
        """The job of `sbatch slurm/pretrain.sbatch CONFIG ...`, as a user types it."""
        given = (f"--nodes={nodes}", "--time=10", "--signal=B:USR1@30", *options)
        script = REPO / "slurm/pretrain.sbatch"
        return self.cluster.submit(
            script, config or str(RECIPE), *self.words, options=given, env={**self.env, **(env or {})}
        )

    def submit(self, *options: str) -> subprocess.CompletedProcess[str]:
        """`mmscale submit` as a user types it."""
        command = [
            sys.executable,
            "-m",
            "mmscale",
            "submit",
            str(RECIPE),
            *self.words,
            "-N",
            "2",
            "-t",
            "10:00",
            *options,
        ]
        env = {**os.environ, **self.cluster.env, **self.env, "SLURM_RESTART_COUNT": "3"}  # as inside another job
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def record(self, token: str, name: str) -> dict[str, object]:
        return json.loads((self.run / "attempts" / token / f"{name}.json").read_text())

    def decisions(self) -> list[str]:
        """What was decided after each attempt, in order."""
        tokens = sorted(path.name for path in (self.run / "attempts").iterdir())
        found = [self.run / "attempts" / token / "after.json" for token in tokens]
        return [json.loads(path.read_text())["decision"] for path in found if path.exists()]


@pytest.fixture
def bench(cluster: Cluster, tmp_path: Path) -> Bench:
    return Bench(cluster, tmp_path)


def test_bare_sbatch_hands_everything_to_the_agents(bench: Bench) -> None:
    """From another folder, with a config relative to it and blanks in arguments; no secret of the shell travels."""
    bench.behave("own save:7 done end:done")
    (bench.folder / "mine.yaml").write_text(f"include: [{RECIPE}]\n")
    options = (f"--chdir={bench.folder}",)
    job = bench.sbatch(*options, env={"HF_TOKEN": "hf_secret", "OMP_NUM_THREADS": "1"}, config="mine.yaml")
    assert job.wait_end(30) == "COMPLETED", job.log
    token = f"{job.id}.0"
    port = str(20000 + 7 * job.id % 10000)
    for node in (0, 1):
        call = bench.record(token, f"call-{node}")
        flags = ["--nnodes", "2", "--nproc-per-node", "3", "--master-addr", "127.0.0.1", "--master-port", port]
        assert call["argv"] == ["launch", *flags, "--node-rank", str(node), "mine.yaml", *bench.words]
        env = call["env"]
        assert env["MMSCALE_LEAD_S"] == "30" and env["MMSCALE_KILL_WAIT_S"] == "5"
        assert abs(float(env["MMSCALE_END_TIME"]) - float(job.fields()["StartTime"]) - 600) < 5
        assert env["OMP_NUM_THREADS"] == "1" and "HF_TOKEN" not in env and "hf_secret" not in json.dumps(call)
    record = bench.record(token, "job")
    assert record["nodes"] == ["fx1", "fx2"] and record["mode"] == "requeue" and record["submission"] == str(job.id)
    assert {path.name for path in (bench.run / "logs").iterdir()} == {f"{token}.node0.log", f"{token}.node1.log"}
    assert bench.decisions() == ["done"]


def test_limit_signal_before_the_agents_listen_is_delivered_and_the_job_requeued(bench: Bench) -> None:
    """The batch shell gets USR1 before its step exists, and the agents ignore it for a second more."""
    bench.behave("late:1 own save:4 wait", "own save:7 done end:done")
    job = bench.sbatch()
    job.wait_state("RUNNING")
    job.wait_until(lambda: (bench.run / f"attempts/{job.id}.0/job.json").exists(), 10, "the shell has its traps")
    job.signal("USR1", "--batch")
    assert job.wait_end(40) == "COMPLETED", job.log
    assert job.restarts == 1
    for node in (0, 1):
        assert bench.record(f"{job.id}.0", f"signal-{node}")["signal"] == "SIGUSR1"
    assert bench.record(f"{job.id}.0", "after")["signal"] == "USR1"
    assert bench.record(f"{job.id}.1", "start")["base_step"] == 4
    assert bench.decisions() == ["requeue", "done"]


def test_a_requeue_by_somebody_else_is_left_alone(bench: Bench) -> None:
    bench.behave("own save:4 wait", "own save:7 done end:done")
    job = bench.sbatch()
    job.wait_until(
        lambda: (bench.run / "checkpoints/step_00000004/manifest.json").exists(), 20, "a checkpoint is there"
    )
    bench.cluster.run("scontrol", "requeue", str(job.id))
    assert job.wait_end(40) == "COMPLETED", job.log
    assert job.restarts == 1
    assert bench.decisions() == ["stale", "done"]


def test_three_attempts_without_progress_end_the_job(bench: Bench) -> None:
    bench.behave("own save:4 crash:1", "own crash:1", "own crash:0", "own crash:1", "own done")
    job = bench.sbatch()
    assert job.wait_end(90) == "FAILED", job.log
    assert job.restarts == 3 and job.fields()["ExitCode"] == "1:0"
    assert bench.decisions() == ["requeue"] * 3 + ["give_up"]
    reason = json.loads((bench.run / "DO_NOT_RESTART").read_text())["reason"]
    assert reason.startswith("3 attempts in a row without a new checkpoint") and f"the last: {job.id}.3 " in reason
    assert f"FAILED: {reason}" in job.log


def test_a_refused_input_ends_the_job_at_once_and_a_new_job_goes_on(bench: Bench) -> None:
    bench.behave("own end:refused crash:0", "own save:7 done end:done")
    job = bench.sbatch(nodes=1)
    assert job.wait_end(30) == "FAILED", job.log
    assert "FAILED: reason of refused" in job.log and job.restarts == 0
    again = bench.sbatch(nodes=1)
    assert again.wait_end(30) == "COMPLETED", again.log
    assert not (bench.run / "DO_NOT_RESTART").exists()
    after = bench.sbatch(nodes=1)
    assert after.wait_end(30) == "COMPLETED" and "done the run is finished" in after.log


def test_a_bad_node_is_avoided_by_the_next_attempt(bench: Bench) -> None:
    bench.behave("unwell:1 crash:1", "own save:7 done end:done")
    job = bench.sbatch()
    assert job.wait_end(40) == "COMPLETED", job.log
    assert bench.record(f"{job.id}.0", "job")["nodes"] == ["fx1", "fx2"]
    assert bench.record(f"{job.id}.1", "job")["nodes"] == ["fx1", "fx3"]
    assert json.loads((bench.run / "bad_nodes.json").read_text())["fx2"]["reason"] == "no GPU answers"


def test_a_chain_goes_on_in_order_and_stops_when_done(bench: Bench) -> None:
    """By `mmscale submit`: the second job avoids the bad node, finishes, and the third has nothing to do."""
    bench.behave("own save:4 unwell:0 crash:0", "own save:7 done end:done")
    done = bench.submit("--chain", "3", "--site", str(bench.folder / "site.env"), "--lead", "20")
    assert done.returncode == 0, done.stderr
    jobs = [bench.cluster.job(int(word)) for word in done.stdout.splitlines()[0].split(":")[0].split()[-3:]]
    assert [job.wait_end(30) for job in jobs] == ["COMPLETED"] * 3, jobs[0].log + jobs[1].log
    assert bench.decisions() == ["requeue", "done"] and [job.restarts for job in jobs] == [0, 0, 0]
    assert bench.record(f"{jobs[0].id}.0", "call-0")["argv"][-4:] == bench.words
    assert bench.record(f"{jobs[1].id}.0", "job")["nodes"] == ["fx2", "fx3"]
    assert bench.record(f"{jobs[1].id}.0", "job")["lead_s"] == 20
    assert f"logs     {bench.run}/logs/" in done.stdout and f"mmscale status {bench.run}" in done.stdout
    assert "done the run is finished" in (bench.run / f"logs/{jobs[2].id}.batch.log").read_text()


def test_one_mode_per_run_directory(bench: Bench) -> None:
    """While a requeued job works, a chain on its directory is refused, by the command and by the job itself."""
    bench.behave("own save:4 wait", "own done")
    job = bench.sbatch(nodes=1)
    job.wait_until(lambda: (bench.run / "checkpoints/step_00000004/manifest.json").exists(), 20, "it trains")
    refused = bench.submit("--chain", "2")
    assert refused.returncode == 2 and f"scancel {job.id}" in refused.stderr, refused.stderr
    second = bench.sbatch("--no-requeue", nodes=1, env={"MMSCALE_CHAIN": "mine"})
    assert second.wait_end(20) == "FAILED" and second.fields()["ExitCode"] == "2:0", second.log
    assert f"expected {bench.run} to be used in one way, found that job {job.id}" in second.log
    assert job.state == "RUNNING" and not (bench.run / f"attempts/{second.id}.0").exists()
    job.cancel()
    job.wait_until(lambda: (bench.run / f"attempts/{job.id}.0/after.json").exists(), 10, "the shell has decided")
    assert bench.decisions() == ["stopped"] and job.restarts == 0


def test_variables_of_another_job_are_not_taken_for_its_own(bench: Bench) -> None:
    bench.behave("own done")
    job = bench.sbatch(nodes=1, env={"SLURM_RESTART_COUNT": "3"})
    assert job.wait_end(20) == "FAILED" and "unset it before you submit" in job.log
    assert not (bench.run / "attempts").exists()


def test_dry_run_submits_nothing(bench: Bench) -> None:
    done = bench.submit("--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n")
    assert not (bench.run / "slurm").exists() and bench.cluster.run("squeue", "-h") == ""


def test_eval_array_merges_and_a_missing_dataset_fails(bench: Bench) -> None:
    datasets = []
    for name in ("digits", "two words"):
        (bench.folder / name).mkdir()
        (bench.folder / name / "manifest.json").write_text("{}")
        datasets.append(name)
    script, options = REPO / "slurm/eval.sbatch", [f"--chdir={bench.folder}", f"--output={bench.folder}/%A_%a.log"]

    def run(*data: str, array: str) -> tuple[int, list[str]]:
        answer = bench.cluster.run("sbatch", "--parsable", *options, array, str(script), "model", *data, env=bench.env)
        bench.cluster.wait_until(lambda: not bench.cluster.run("squeue", "-h"), 30, "the array has ended")
        return int(answer), [path.read_text() for path in sorted(bench.folder.glob(f"{answer}_*.log"))]

    job, logs = run(*datasets, array="--array=0-1")
    merged = (bench.folder / f"eval-{job}/answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in merged] == datasets, logs
    assert any("2 answers of 2 datasets" in log for log in logs)
    job, logs = run("digits", "nowhere", array="--array=0-1")
    assert "FAILED: expected a dataset in nowhere" in logs[1] and "1 of 2 parts are there" in logs[0]
    assert not (bench.folder / f"eval-{job}/answers.jsonl").exists()
    _, logs = run(*datasets, array="--array=0-2")
    assert all("submit with --array=0-1" in log for log in logs) and len(logs) == 3


def test_consolidate(bench: Bench) -> None:
    words = ("my run", "my export", "--target", "llava")
    options = (f"--chdir={bench.folder}",)
    job = bench.cluster.submit(REPO / "slurm/consolidate.sbatch", *words, options=options, env=bench.env)
    assert job.wait_end(20) == "COMPLETED" and (bench.folder / "my export").is_dir(), job.log
    again = bench.cluster.submit(REPO / "slurm/consolidate.sbatch", *words, options=options, env=bench.env)
    assert again.wait_end(20) == "FAILED" and "FileExistsError" in again.log


def test_a_controller_that_is_down_when_an_attempt_ends(bench: Bench) -> None:
    bench.behave("own save:4 wait", "own save:7 done end:done")
    job = bench.sbatch()
    began = time.time()
    job.wait_until(lambda: (bench.run / "checkpoints/step_00000004/manifest.json").exists(), 20, "it trains")
    agents, log = job.children("fx1", "0"), Path(job.fields()["StdOut"])
    state = bench.cluster.root / "state/job_state"
    job.wait_until(lambda: state.exists() and state.stat().st_mtime > began + 1, 20, "slurmctld has saved its state")
    bench.cluster.kill_controller()
    for pid in agents:
        os.kill(pid, signal.SIGKILL)
    bench.cluster.wait_until(lambda: "Killed" in log.read_text(), 30, "srun has seen the end of the agent")
    bench.cluster.start_controller()
    assert job.wait_end(90) == "COMPLETED", job.log
    assert job.restarts == 1 and bench.decisions() == ["requeue", "done"]


def test_a_batch_shell_that_outlived_its_attempt_touches_nothing(bench: Bench) -> None:
    """slurmd of its node dies, SLURM starts the job elsewhere, and the old shell wakes up beside the new attempt."""
    bench.behave("own save:4 wait", "own save:7 wait", "own done")
    job = bench.sbatch()
    job.wait_until(lambda: (bench.run / "checkpoints/step_00000004/manifest.json").exists(), 20, "it trains")
    bench.cluster.kill_slurmd("fx1")
    job.wait_until(
        lambda: (bench.run / "checkpoints/step_00000007/manifest.json").exists(), 90, "the next attempt trains"
    )
    assert bench.record(f"{job.id}.1", "job")["nodes"] == ["fx2", "fx3"]
    job.wait_until(lambda: (bench.run / f"attempts/{job.id}.0/after.json").exists(), 60, "the old shell has decided")
    assert bench.decisions()[0] == "stale", job.log
    assert job.state == "RUNNING" and job.restarts == 1
    assert (bench.run / "OWNER").read_text() == f"{job.id}.1\n" and not (bench.run / "DO_NOT_RESTART").exists()
