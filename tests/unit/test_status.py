"""`mmscale status` and `mmscale report`: what they say in each case, and that they cope with any run directory."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from mmscale.cli import report, status
from mmscale.cluster.curves import NUM_BINS, Curves, thin
from mmscale.errors import ConfigError
from mmscale.train.history import Step

NOW = time.time()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)


def row(number, token, at, **more):
    return {
        "step": number, "loss": 3.0 - number / 100, "tokens_per_s": 1500.0, "data_wait_frac": 0.1, "fill": 0.9, "step_time_s": 1.0,
        "comm_wait_s": 0.0, "ended_at": at, "attempt": token, **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run of 20 steps under SLURM whose first attempt was killed after step 6; a checkpoint of step 4; 7.1 goes on."""
    folder = tmp_path / "my run"
    write(folder / "config.yaml", "train: {steps: 20}\ndata: {root: /data}\n")
    rows = []
    for restart, (first, last) in enumerate(((1, 6), (5, 8))):
        token, at = f"7.{restart}", NOW - 1000 + 100 * restart
        job = {
            "job": "7",
            "restarts": restart,
            "submission": "7",
            "submitted_at": NOW - 1100,
            "started_at": at,
            "nodes": ["n1"],
        }
        write(folder / f"attempts/{token}/job.json", job)
        start = {"token": token, "base_step": first - 1, "at": at + 5, "world_size": 4, "host": "elsewhere", "pid": 1}
        write(folder / f"attempts/{token}/start.json", start)
        rows += [row(n, token, at + 10 + n - first) for n in range(first, last + 1)]
    write(folder / "metrics.jsonl", "".join(json.dumps(one) + "\n" for one in rows))
    write(folder / "checkpoints/step_00000004/manifest.json", {})
    write(
        folder / "attempts/7.0/after.json",
        {"decision": "requeue", "reason": "7.0 was killed", "at": NOW - 980, "rc": 137},
    )
    write(folder / "OWNER", "7.1\n")
    write(folder / "slurm/job.sbatch", "#!/bin/bash\n")
    return folder


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path_factory):
    """A PATH with no squeue on it; gives the folder, so that a test can put one there."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def squeue(folder, *lines):
    """A squeue that prints these lines: the real one is asked in tests/slurm."""
    text = "".join(f"echo '{line}'\n" for line in lines)
    (folder / "squeue").write_text(f"#!/bin/sh\n{text}")
    (folder / "squeue").chmod(0o755)


def said(run, capsys):
    """The printed text, its state and its advice."""
    status.run(str(run), False)
    text = capsys.readouterr().out
    return text, re.search(r"^state +(\w+)$", text, re.M)[1], re.search(r"^next +(.*)$", text, re.M)[1]


def test_a_finished_run(run, capsys):
    write(run / "DONE", {"step": 20})
    write(run / "attempts/7.1/end.json", {"outcome": "done", "step": 20, "reason": "", "at": NOW - 850})
    text, state, advice = said(run, capsys)
    assert state == "done"
    assert advice == f"the run is finished; make a model of it: mmscale consolidate '{run}' OUT"
    assert re.search(r"^7\.0 .* 4 +1-6 +2 +killed +7\.0 was killed$", text, re.M), text
    assert re.search(r"^7\.1 .* 4 +5-8 +0 +done$", text, re.M), text
    assert "step 8 of 20, newest checkpoint 4, loss 2.9200, 1,500 tokens/s" in text
    assert re.search(r"^redone +\d+\.\d% +2\.0 s", text, re.M) and re.search(r"^queue +\d+\.\d% +3 min", text, re.M), (
        text
    )


def test_a_job_in_the_queue_and_why(run, capsys, no_slurm):
    write(run / "attempts/7.1/after.json", {"decision": "requeue", "reason": "x", "at": NOW - 880, "rc": 1})
    _, state, advice = said(run, capsys)
    assert (state, advice) == (
        "queued",
        "the job was put back into the queue, and squeue does not show it here; look on the cluster: squeue --me",
    )
    squeue(no_slurm, f"7|PENDING|BeginTime|{run}/slurm/job.sbatch", "8|RUNNING|None|/other/job.sbatch")
    _, state, advice = said(run, capsys)
    assert state == "queued"
    assert (
        advice
        == "nothing: job 7 waits in the queue (BeginTime): SLURM lets a requeued job wait for about two minutes, which is normal"
    )
    squeue(no_slurm, "7|PENDING|JobHeldUser|x")
    assert said(run, capsys)[2] == "job 7 is held (JobHeldUser); let it go: scontrol release 7"
    squeue(no_slurm, "7|PENDING|Resources|x")
    assert said(run, capsys)[2] == "nothing: job 7 waits in the queue (Resources)"
    squeue(no_slurm, "7|RUNNING|None|x")
    assert said(run, capsys)[1] == "running"


def test_a_submitted_job_that_has_not_started(tmp_path, capsys, no_slurm):
    run = tmp_path / "new"
    write(run / "slurm/job.sbatch", "#!/bin/bash\n")
    assert said(run, capsys)[1:] == ("new", f"no attempt has started yet; start it with: sbatch {run}/slurm/job.sbatch")
    squeue(no_slurm, f"9|PENDING|Priority|{run}/slurm/job.sbatch a b")
    assert said(run, capsys)[1:] == ("queued", "nothing: job 9 waits in the queue (Priority)")


def test_a_start_that_was_refused_beside_a_running_one_is_not_the_runs(run, capsys, no_slurm):
    """Another config on the directory, for example: neither its refusal nor its time is the run's."""
    write(run / "attempts/7.1/after.json", {"decision": "requeue", "reason": "x", "at": NOW - 880, "rc": 1})
    job = {
        "job": "8",
        "restarts": 0,
        "submission": "8",
        "submitted_at": NOW - 890,
        "started_at": NOW - 889,
        "nodes": ["n1"],
    }
    write(run / "attempts/8.0/job.json", job)
    write(run / "attempts/8.0/end.json", {"outcome": "refused", "reason": "other settings", "at": NOW - 885})
    write(run / "DO_NOT_RESTART", {"reason": "other settings", "token": "8.0", "submission": "8", "at": NOW - 884})
    squeue(no_slurm, "7|PENDING|Resources|x")
    text, state, _ = said(run, capsys)
    assert state == "queued" and "other settings" not in text and not re.search(r"^8\.0 ", text, re.M)
    assert re.search(r"^7\.1 .* 4 +5-8 +0 ", text, re.M), text


def test_a_run_that_was_given_up(run, capsys):
    write(
        run / "attempts/7.1/after.json",
        {"decision": "give_up", "reason": "3 attempts without a checkpoint", "at": NOW - 880, "rc": 1},
    )
    write(
        run / "DO_NOT_RESTART",
        {"reason": "3 attempts without a checkpoint", "token": "7.1", "submission": "7", "at": NOW - 880},
    )
    text, state, advice = said(run, capsys)
    assert state == "given_up"
    assert (
        advice
        == f"mend the cause (3 attempts without a checkpoint), then submit again: sbatch '{run}/slurm/job.sbatch'"
    )
    assert re.search(r"^last error +attempt 7\.1: 3 attempts without a checkpoint$", text, re.M)


def test_a_run_that_was_stopped_and_is_not_in_the_queue(run, capsys):
    write(run / "attempts/7.1/end.json", {"outcome": "stopped", "step": 8, "reason": "", "at": NOW - 880})
    write(run / "attempts/7.1/signal-0.json", {"signal": "SIGTERM", "at": NOW - 882})
    text, state, advice = said(run, capsys)
    assert state == "stopped" and "stopped  after SIGTERM" in text
    assert advice == f"it was stopped and saved at step 4; go on with: sbatch '{run}/slurm/job.sbatch'"
    (run / "slurm/job.sbatch").unlink()
    assert said(run, capsys)[2].endswith("go on with: the sbatch command that started it")
    for token in ("7.0", "7.1"):
        write(run / f"attempts/{token}/job.json", {})
    assert said(run, capsys)[2].endswith(f"go on with: mmscale train '{run}/config.yaml'")
    write(run / "config.yaml", "train: {steps: 20}\ndata: {root: 'https://***@host/x'}\n")
    assert said(run, capsys)[2].endswith(f"mmscale train '{run}/config.yaml' data.root=...")


@pytest.mark.parametrize("outcome", ["failed", "refused", "diverged"])
def test_a_run_that_failed(run, capsys, outcome):
    write(
        run / "attempts/7.1/end.json",
        {"outcome": outcome, "step": None, "reason": "DataError: shard\n gone", "at": NOW - 880},
    )
    text, state, advice = said(run, capsys)
    assert state == "failed"
    assert advice.startswith(
        "mend the cause (DataError: shard gone; see what the process printed), then go on from step 4 with: sbatch"
    )
    assert f"last error  attempt 7.1 {outcome}: DataError: shard" in text


def test_a_hang_and_a_bad_node_are_named(run, capsys):
    slowest = {"rank": 3, "host": "n2", "phase": "step", "step": 9, "age_s": 61}
    hang = {"at": NOW - 800, "limit_s": 60, "phase": "step", "step": 9, "slowest": slowest, "stacks": "stacks-0.txt"}
    write(run / "attempts/7.1/hang-0.json", hang)
    text, state, _ = said(run, capsys)
    assert state == "failed"
    assert (
        "last error  attempt 7.1 hung: rank 3 on n2 hung in phase step of step 9 for more than 60 s; stacks: attempts/7.1/stacks-0.txt"
        in text
    )
    assert re.search(r"^hang +\d+\.\d%", text, re.M)
    (run / "attempts/7.1/hang-0.json").unlink()
    health = {"host": "n1", "node": "fx1", "at": NOW - 890, "problems": ["disk full"]}
    write(run / "attempts/7.1/health-0.json", health)
    write(run / "attempts/7.1/after.json", {"decision": "stopped", "reason": "", "at": NOW - 880, "rc": 1})
    assert "last error  attempt 7.1 bad node: fx1: disk full" in said(run, capsys)[0]


def test_a_run_that_was_killed_without_a_trace(run, capsys):
    write(run / "logs/7.1.node0.log", "")
    _, state, advice = said(run, capsys)
    assert state == "killed"
    assert advice.startswith(f"it was killed; look at {run}/logs/7.1.node0.log, then go on from step 4 with: sbatch")


def beat(run, pid, host, at, limit_s=60.0):
    text = json.dumps({"rank": 0, "pid": pid, "host": host, "step": 9, "phase": "step", "at": at, "limit_s": limit_s})
    write(run / "heartbeats/rank_00000.json", text.ljust(255) + "\n")


def test_whether_it_runs_is_seen_by_its_processes(run, capsys):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        beat(run, child.pid, socket.gethostname(), time.time() + 0.5)
        text, state, advice = said(run, capsys)
        assert (state, advice) == ("running", "nothing: it runs") and "12.0 s of training left" in text
        assert re.search(r"^7\.1 .* running$", text, re.M)
    finally:
        child.communicate(b"\n")
    assert said(run, capsys)[1] == "killed", "the process is gone"
    beat(run, os.getpid(), socket.gethostname(), NOW - 800_000)
    assert said(run, capsys)[1] == "killed", "a process of that number is younger than the beat"


def test_whether_it_runs_elsewhere_is_seen_by_its_beats(run, capsys):
    beat(run, 1, "elsewhere", time.time() - 10)
    assert said(run, capsys)[1] == "running"
    beat(run, 1, "elsewhere", time.time() - 61)
    assert said(run, capsys)[1] == "killed"


def test_a_save_that_failed_is_the_last_error(run, capsys):
    event = {"event": "save_failed", "step": 8, "at": NOW - 870, "attempt": "7.1", "reason": "no space left on device"}
    write(run / "events.jsonl", json.dumps(event) + "\n")
    assert "last error  step 8: save failed: no space left on device" in said(run, capsys)[0]


def test_json_for_programs(run, capsys):
    status.run(str(run), True)
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 8 and found["total_steps"] == 20 and found["state"] == "killed"
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_s"], abs=1e-6)
    assert found["goodput"] == pytest.approx(found["seconds"]["compute"] / found["wall_s"])
    assert [one["token"] for one in found["attempts"]] == ["7.0", "7.1"]


def test_a_folder_that_is_no_run(tmp_path):
    for command in (lambda: status.run(str(tmp_path), False), lambda: report.run(str(tmp_path), None)):
        with pytest.raises(ConfigError, match="expected a run directory, found none of"):
            command()


@pytest.mark.parametrize(
    "damage",
    ["metrics.jsonl", "events.jsonl", "config.yaml", "OWNER", "attempts/7.1/start.json", "DONE", "DO_NOT_RESTART"],
)
@pytest.mark.parametrize("text", ["", "\x00\x01{[", '{"a"', "[1, 2]", '{"step": "x", "reason": 3}'])
def test_damaged_files_do_not_matter(run, capsys, damage, text):
    write(run / damage, text)
    assert said(run, capsys)[2]


# ---------------------------------------------------------------- report


def test_the_report_is_one_file_with_everything_escaped(run, tmp_path, capsys):
    events = [
        {"event": "start", "step": 0, "at": NOW - 995, "attempt": "7.0", "dp_size": 2, "startup_s": 5.0},
        {"event": "save", "step": 4, "at": NOW - 985, "attempt": "7.0", "blocked_s": 0.25},
        {"event": "validation", "step": 4, "at": NOW - 984, "attempt": "7.0", "val_loss": 2.5, "seconds": 0.1},
        {
            "event": "spike",
            "step": 6,
            "at": NOW - 983,
            "attempt": "7.0",
            "reason": "<script>alert(1)</script>",
            "ids": ["a<b>.tar:1"],
        },
    ]
    write(run / "events.jsonl", "".join(json.dumps(one) + "\n" for one in events))
    report.run(str(run), str(tmp_path / "out"))
    page, png = capsys.readouterr().out.split("\n")[:2]
    text = (tmp_path / "out/report.html").read_text()
    assert page == str(tmp_path / "out/report.html") and os.path.getsize(png) > 20_000
    assert "<script>" not in text and "&lt;script&gt;alert(1)" in text and "a&lt;b&gt;.tar:1" in text
    assert "1 x save, 1 x validation" in text and "<summary>1 samples</summary>" in text
    assert "data:image/png;base64,iVBOR" in text and 'src="http' not in text and "killed" in text
    report.run(str(run), None)
    assert (run / "report/report.html").exists()


def test_a_report_of_a_run_without_steps(tmp_path, capsys):
    write(tmp_path / "config.yaml", "train: {steps: 20}\n")
    report.run(str(tmp_path), None)
    assert "step 0 of 20" in (tmp_path / "report/report.html").read_text()


def test_a_report_that_cannot_be_written(run, tmp_path):
    write(tmp_path / "file", "")
    with pytest.raises(ConfigError, match=r"cannot be written.*--out"):
        report.run(str(run), str(tmp_path / "file"))


def test_a_long_curve_keeps_its_extremes():
    import numpy as np

    values = np.random.default_rng(0).normal(size=100_000)
    values[10_777], values[50_000], values[100:400] = 1e6, -1e6, np.nan
    band = thin(np.arange(100_000.0), values)
    assert len(band.x) == NUM_BINS and np.nanmax(band.high) == 1e6 and np.nanmin(band.low) == -1e6
    assert np.isnan(band.middle[1]) and not np.isnan(band.middle[3:]).any()
    assert abs(np.nanmean(band.middle)) < 0.1
    short = thin(np.arange(10.0), values[:10])
    assert short.middle is short.low and len(short.x) == 10


def test_curves_come_in_the_order_of_the_steps():
    curves = Curves()
    for number, is_lost in ((5, False), (4, True), (3, False)):
        curves.add(Step(number, "a", 1.0, 1.0, 0.0, 0.0, None if is_lost else 2.0, 1.0, 0.5, 0.0), is_lost)
    assert curves.step.tolist() == [3, 4, 5] and curves.is_lost.tolist() == [False, True, False]
    assert curves.column("loss")[0] == 2.0 and math.isnan(curves.column("loss")[1])
