"""A run that is killed, stopped or moved to another number of workers or ranks goes on as if nothing had happened."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmscale.train.heartbeat import read_beat

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
MMSCALE = Path(sys.executable).parent / "mmscale"
STEPS = 14
SMALL = [
    f"train.steps={STEPS}", "train.save_every=3", "train.warmup_steps=2", "train.global_batch=2", "data.plan_group=2", "data.seq_len=384",
    "data.window=64", "eval.every=0", "run.tensorboard=false", "run.threads=1", "model.llm.config.num_hidden_layers=1",
    "model.vision.config.num_hidden_layers=1", "model.audio.config.encoder_layers=1",
]  # fmt: skip


def words(data, run, *more):
    return [str(RECIPE), f"data.root={data}", f"run.dir={run}", *SMALL, *more]


def run_here(arguments):
    """One run in this process image: `mmscale train` without the seconds that the imports take."""
    from mmscale.cli import train

    os.setpgid(0, 0)
    path, *overrides = arguments
    train.run(path, overrides)


def start(arguments):
    import mmscale.cli.train
    import mmscale.train.loop  # noqa: F401  (imported once here, inherited by every run)

    process = multiprocessing.get_context("fork").Process(target=run_here, args=(arguments,))
    process.start()
    return process


def rows(run, name="metrics.jsonl"):
    """step -> last complete row of that step."""
    path = Path(run) / name
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            found[row["step"]] = row
    return found


def finish(process, limit_s=120):
    process.join(limit_s)
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def history(run):
    return {s: r["loss_hex"] for s, r in rows(run).items()}, {s: r["ids"] for s, r in rows(run, "ledger.jsonl").items()}


@pytest.fixture(scope="module")
def straight(demo_data, tmp_path_factory):
    """The uninterrupted run that all others must equal."""
    run = tmp_path_factory.mktemp("straight") / "run"
    finish(start(words(demo_data, run, "data.workers=0")))
    losses, ledger = history(run)
    assert sorted(losses) == sorted(ledger) == list(range(1, STEPS + 1))
    assert (run / "DONE").exists()
    assert rows(run)[STEPS]["loss"] < rows(run)[1]["loss"]
    return losses, ledger


def kill_when(process, run, step):
    """SIGKILL to the whole process group once `step` is on record."""
    limit = time.monotonic() + 120
    while max(rows(run), default=0) < step:
        assert process.is_alive(), f"ended with {process.exitcode} before step {step}"
        assert time.monotonic() < limit, "no progress"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("workers", [(0, 0, 0, 0), (2, 2, 0, 1)], ids=["no_workers", "workers_change"])
def test_killed_three_times_equals_straight(straight, demo_data, tmp_path, seed, workers):
    run = tmp_path / "run"
    steps = sorted(random.Random(seed).sample(range(2, STEPS - 1), 3))
    for step, count in zip(steps, workers, strict=False):
        kill_when(start(words(demo_data, run, f"data.workers={count}")), run, step)
    finish(start(words(demo_data, run, f"data.workers={workers[-1]}")))
    assert history(run) == straight


def test_a_different_seed_is_a_different_history(straight, demo_data, tmp_path):
    """The comparison above can fail."""
    run = tmp_path / "run"
    finish(start(words(demo_data, run, "data.workers=0", "data.seed=1")))
    losses, ledger = history(run)
    assert losses != straight[0]
    assert ledger != straight[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save_and_exit_cleanly(straight, demo_data, tmp_path, number):
    run = tmp_path / "run"
    process = start(words(demo_data, run, "data.workers=1", "train.save_every=1000"))
    while max(rows(run), default=0) < 4:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, number)
    finish(process)
    saved = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
    assert len(saved) == 1
    assert not (run / "DONE").exists()
    last = int(saved[0].removeprefix("step_"))
    assert 4 <= last < STEPS
    assert max(rows(run)) == last, "no step may be lost by a clean stop"
    finish(start(words(demo_data, run, "data.workers=1", "train.save_every=1000")))
    assert history(run) == straight
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [
        ("start", 0), ("save", last), ("stop", last), ("resume", last), ("save", STEPS),
    ]  # fmt: skip
    needed = {
        "step",
        "loss",
        "loss_hex",
        "grad_norm",
        "lr",
        "tokens",
        "target_tokens",
        "tokens_per_s",
        "mfu",
        "hfu",
        "data_wait_frac",
        "fill",
    }
    assert all(needed | {"skipped", "step_time_s"} <= row.keys() for row in rows(run).values())


def test_done_wins_and_a_signal_at_once_is_not_lost(straight, demo_data, tmp_path):
    """The real command: SIGUSR1 while torch is still being imported, then a whole run, then the same command again."""
    run = tmp_path / "run"
    command = [str(MMSCALE), "train", *words(demo_data, run, "train.steps=3", "data.workers=0")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "SigCgt" not in Path(f"/proc/{process.pid}/status").read_text() or not _catches(process.pid, signal.SIGUSR1):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert "SIGUSR1" in text
    assert max(rows(run), default=0) <= 1
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    assert "all 3 steps are done" in done.stderr
    assert sorted(rows(run)) == [1, 2, 3]


def _catches(pid, number):
    line = next(li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("SigCgt"))
    return int(line.split()[1], 16) >> (number - 1) & 1


def test_a_flipped_bit_in_the_newest_checkpoint_costs_only_time(straight, demo_data, tmp_path):
    run = tmp_path / "run"
    kill_when(start(words(demo_data, run, "data.workers=0")), run, 10)  # steps 3 and 6 are committed, 9 is perhaps
    newest = max((run / "checkpoints").glob("step_????????"))
    file = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    finish(start(words(demo_data, run, "data.workers=0")))
    assert history(run) == straight
    assert any(p.name.startswith(".bad-") for p in (run / "checkpoints").iterdir())


def test_a_disk_that_is_full_for_some_steps_costs_nothing(straight, demo_data, disk):
    """The whole run directory lies on it: metrics, ledger and TensorBoard are refused as well as the checkpoint of step 6."""
    run = disk.path / "run"
    process = start(words(demo_data, run, "data.workers=0", "run.tensorboard=true"))
    _wait_for_step(process, run, 4)
    disk.fill()
    _wait_for_step(process, run, 9)
    disk.empty()
    finish(process)
    assert history(run) == straight
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    failed = [event["step"] for event in events if event["event"] == "save_failed"]
    assert 6 in failed and max(failed) < STEPS
    assert max(event["step"] for event in events if event["event"] == "save") == STEPS


def _wait_for_step(process, run, step):
    """By the heartbeat, which is rewritten in place: nothing else grows on a full disk."""
    limit = time.monotonic() + 120
    while (beat := read_beat(run / "heartbeats/rank_00000.json")) is None or beat.step < step:
        assert process.is_alive() and time.monotonic() < limit
        time.sleep(0.005)


def test_no_whole_checkpoint_left_is_refused(demo_data, tmp_path):
    run = tmp_path / "run"
    finish(start(words(demo_data, run, "data.workers=0", "train.steps=3")))
    (run / "DONE").unlink()
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / "trainer.json").write_text("{}")
    command = [str(MMSCALE), "train", *words(demo_data, run, "data.workers=0", "train.steps=3")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "CheckpointError" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_mixture_goes_on_at_resume_and_other_packing_is_refused(demo_data, tmp_path):
    run = tmp_path / "run"
    finish(start(words(demo_data, run, "data.workers=0", "train.steps=3")))
    command = [str(MMSCALE), "train", *words(demo_data, run, "data.workers=0", "train.steps=5")]
    refused = subprocess.run([*command, "data.window=77"], capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2 and "window=77 " in refused.stderr, refused.stderr
    done = subprocess.run(
        [*command, "data.sources.text.weight=3"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the mixture is another one" in done.stderr
    assert re.search(r"'text': share 0\.0\d+ -> 0\.1\d+", done.stderr), done.stderr
