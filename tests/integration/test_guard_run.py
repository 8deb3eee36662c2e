"""Steps that go wrong in real runs: skipped, rolled back and passed over, or given up. What follows equals a run that never met them."""

import gc
import json
import math
import os
import signal
import statistics
import subprocess
import time
import weakref

import pytest
import torch
from guarded_runs import (
    MMSCALE,
    RECIPE,
    SAVE_EVERY,
    SMALL,
    STEPS,
    events,
    ledger,
    lines,
    losses,
    on_ranks,
    pass_over,
    rows,
    start,
    train_here,
)

BACK = ("train.guard.max_nonfinite=1", "train.guard.pass_over=1")
"""Goes back at the first step without a finite loss, and passes over the step before it too."""


def weights(run):
    """All tensors of the newest checkpoint."""
    from mmscale.train.checkpoint import newest_checkpoint

    reader = newest_checkpoint(run / "checkpoints")
    assert reader.step == STEPS
    return {name: reader.read(name) for name in reader.names}


def assert_equal(run, reference):
    """The same losses, samples and final weights, to the bit."""
    assert losses(run) == losses(reference)
    assert ledger(run) == ledger(reference)
    ours, theirs = weights(run), weights(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def skipping(poison, tmp_path_factory):
    """A run that meets the bad batch and does not go back."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    train_here(poison.run(run))
    return run


@pytest.fixture(scope="module")
def without(poison, tmp_path_factory):
    """Runs that never meet some steps: their batches were passed over from the start."""
    made = {}

    def get(*steps):
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("without") / "run"
            pass_over(made[steps], *steps)
            train_here(poison.run(made[steps]))
        return made[steps]

    return get


def test_a_bad_batch_is_skipped_named_and_changes_nothing_else(poison, skipping, without):
    bad = rows(skipping)[poison.step]
    assert (bad["loss"], bad["loss_hex"], bad["update_skipped"]) == (None, "nan", True)
    (event,) = events(skipping, "nonfinite")
    assert event["step"] == poison.step and poison.sample in event["ids"]
    assert event["ids"] == ledger(skipping)[poison.step]
    assert not events(skipping, "rollback", "passed_over") and not (skipping / "passed_over.json").exists()

    reference = without(poison.step)
    other = [step for step in range(1, STEPS + 1) if step != poison.step]
    assert {s: losses(skipping)[s] for s in other} == {s: losses(reference)[s] for s in other}
    assert len({losses(reference)[s] for s in other}) == len(other), "negative control: the losses differ"
    assert ledger(skipping) == ledger(reference)
    ours, theirs = weights(skipping), weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    passed = rows(reference)[poison.step]
    assert (passed["loss"], passed["loss_hex"], passed["update_skipped"]) == (None, None, True)
    (event,) = events(reference, "passed_over")
    assert (event["step"], event["ids"]) == (poison.step, ledger(skipping)[poison.step])


def test_no_checkpoint_is_of_a_step_without_an_update(poison, without, tmp_path):
    pass_over(tmp_path / "run", SAVE_EVERY, STEPS)
    train_here(poison.run(tmp_path / "run"))
    saved = {event["step"] for event in events(tmp_path / "run", "save")}
    assert saved == {*range(2 * SAVE_EVERY, STEPS, SAVE_EVERY), STEPS}, "but for the end of the run"
    assert (tmp_path / "run/DONE").exists()


def test_a_rollback_equals_a_run_that_never_met_these_batches(poison, without, tmp_path, monkeypatch):
    import mmscale.train.setup as setup

    models, make_engine = [], setup.make_engine

    def watched(model, *rest):
        gc.collect()
        assert [ref() for ref in models if ref() is not None] == [], "two models at once would not fit a GPU"
        models.append(weakref.ref(model))
        return make_engine(model, *rest)

    monkeypatch.setattr(setup, "make_engine", watched)
    run, bad = tmp_path / "run", poison.step
    train_here(poison.run(run, *BACK))
    assert len(models) == 2
    assert_equal(run, without(bad - 1, bad))
    base = (bad - 2) // SAVE_EVERY * SAVE_EVERY
    told = events(run, "nonfinite", "rollback", "resume", "passed_over")
    assert [(e["event"], e["step"]) for e in told] == [
        ("nonfinite", bad), ("rollback", bad), ("resume", base), ("passed_over", bad - 1), ("passed_over", bad),
    ]  # fmt: skip
    assert (told[1]["to"], told[1]["steps"]) == (base, [bad - 1, bad])
    content = json.loads((run / "passed_over.json").read_text())
    assert content["rollbacks"] == 1
    assert {int(step): entry["ids"] for step, entry in content["steps"].items()} == {
        step: ledger(run)[step] for step in (bad - 1, bad)
    }
    assert poison.sample in content["steps"][str(bad)]["ids"]
    assert all(f"nonfinite at step {bad}" == entry["reason"] for entry in content["steps"].values())


def test_it_goes_behind_checkpoints_that_hold_updates_to_be_undone(poison, without, tmp_path):
    """With more batches to pass over than lie behind the newest checkpoint, an older one is taken and the newer set aside."""
    run, bad = tmp_path / "run", poison.step
    train_here(poison.run(run, *BACK, "train.guard.pass_over=4"))
    (event,) = events(run, "rollback")
    steps = list(range(bad - 4, bad + 1))
    assert event["steps"] == steps and event["to"] < steps[0]
    aside = {path.name for path in (run / "checkpoints").glob(".bad-*")}
    newer = range(event["to"] + SAVE_EVERY, bad, SAVE_EVERY)
    assert len(newer) and aside == {f".bad-step_{step:08d}-0" for step in newer}
    assert_equal(run, without(*steps))


def test_a_rollback_before_the_first_checkpoint_begins_anew(poison, without, tmp_path):
    run, bad = tmp_path / "run", poison.step
    train_here(poison.run(run, *BACK, "train.save_every=1000"))
    assert [e["to"] for e in events(run, "rollback")] == [0]
    assert [e["step"] for e in events(run, "start")] == [0, 0]
    assert_equal(run, without(bad - 1, bad))


def kill_when(process, is_time):
    limit = time.monotonic() + 120
    while not is_time():
        assert process.is_alive(), f"ended with {process.exitcode}"
        assert time.monotonic() < limit, "no progress"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def test_killed_after_the_rollback_it_goes_on_as_decided(poison, without, tmp_path):
    run, bad = tmp_path / "run", poison.step
    words = poison.run(run, *BACK)

    def is_behind():
        """The first sound step after those passed over is on record."""
        done = [row["step"] for row in lines(run, "metrics.jsonl")]
        return done.count(bad) == 2 and done[-1] > bad

    kill_when(start(words), is_behind)
    process = start([*words, "data.workers=1"])
    process.join(120)
    assert process.exitcode == 0
    assert len(events(run, "rollback")) == 1
    assert_equal(run, without(bad - 1, bad))


def assert_close(run, reference, limit=1e-6):
    """The same samples, and losses within rounding."""
    assert ledger(run) == ledger(reference)
    ours, theirs = rows(run), rows(reference)
    assert [step for step in ours if ours[step]["loss"] is None] == [
        step for step in theirs if theirs[step]["loss"] is None
    ]
    apart = [abs(ours[s]["loss"] / theirs[s]["loss"] - 1) for s in ours if ours[s]["loss"] is not None]
    assert len(apart) == STEPS - 2 and max(apart) <= limit, max(apart)
    print(f"largest relative difference of the losses: {max(apart):.1e}")


def test_two_ranks_decide_alike(poison, without, tmp_path):
    run = tmp_path / "two"
    for done in on_ranks(2, "train", *poison.run(run, *BACK)):
        assert done.returncode == 0, done.stderr
    assert [e["dp_size"] for e in events(run, "start", "resume")] == [2, 2]
    assert [e["steps"] for e in events(run, "rollback")] == [[poison.step - 1, poison.step]]
    assert_close(run, without(poison.step - 1, poison.step))


def test_two_ranks_pass_over_what_one_rank_decided(poison, without, tmp_path):
    moved = tmp_path / "moved"
    kill_when(start(poison.run(moved, *BACK)), lambda: len(events(moved, "rollback")) == 1)
    for done in on_ranks(2, "train", *poison.run(moved, *BACK)):
        assert done.returncode == 0, done.stderr
    assert events(moved, "start", "resume")[-1]["dp_size"] == 2 and len(events(moved, "rollback")) == 1
    assert_close(moved, without(poison.step - 1, poison.step))


WINDOW = 8
FLAT = ("train.lr=1e-5", f"train.guard.spike_window={WINDOW}", "train.schedule=constant", "train.warmup_steps=0")


def heights(run):
    """step -> by how many deviations its loss is above the mean of those before it, by the rule in the documentation."""
    values = [row["loss"] for _, row in sorted(rows(run).items())]
    found = {}
    for i, loss in enumerate(values):
        seen = values[max(0, i - WINDOW) : i]
        if len(seen) >= WINDOW / 4:
            mean = statistics.fmean(seen)
            found[i + 1] = (loss - mean) / max(statistics.pstdev(seen), 0.01 * mean)
    return found


@pytest.mark.parametrize("stop", ["straight", "killed"])
def test_a_spike_rolls_back_in_a_straight_and_in_a_resumed_run(demo_data, tmp_path, stop):
    """The losses of real batches vary; the limit is set between the highest and the next."""
    words = [str(RECIPE), *SMALL, f"data.root={demo_data}", *FLAT]
    calm = tmp_path / "calm"
    train_here([*words, f"run.dir={calm}"])
    assert not events(calm, "spike")
    (top, spike), (second, _) = sorted(((h, step) for step, h in heights(calm).items()), reverse=True)[:2]
    assert spike > 2 and second < top
    run, limited = tmp_path / "run", f"train.guard.spike_sigma={(top + second) / 2}"
    arguments = [*words, limited, f"run.dir={run}"]
    if stop == "killed":
        kill_when(start(arguments), lambda: max(rows(run), default=0) >= spike - 2)
        process = start(arguments)
        process.join(120)
        assert process.exitcode == 0
    else:
        train_here(arguments)
    (event,) = events(run, "spike")
    assert (event["step"], event["ids"]) == (spike, ledger(calm)[spike])
    assert [e["steps"] for e in events(run, "rollback")] == [[spike - 1, spike]]
    reference = tmp_path / "reference"
    pass_over(reference, spike - 1, spike)
    train_here([*words, f"run.dir={reference}"])
    assert_equal(run, reference)


def test_a_run_that_diverges_gives_up_with_a_record_that_says_so(demo_data, tmp_path):
    run = tmp_path / "run"
    words = [str(RECIPE), *SMALL, f"data.root={demo_data}", f"run.dir={run}"]
    # the first update ruins the weights, and a rollback can only come after the next step
    ruin = ["train.lr=1e30", "train.clip=0", "train.optimizer=sgd", "train.warmup_steps=0", "train.save_every=1"]
    guard = ["train.guard.max_nonfinite=2", "train.guard.max_rollbacks=1"]
    done = subprocess.run([str(MMSCALE), "train", *words, *ruin, *guard], capture_output=True, text=True, timeout=180)
    assert done.returncode == 1, done.stderr
    assert "DivergedError: step 5: " in done.stderr and "max_rollbacks=1" in done.stderr
    assert "Traceback" not in done.stderr
    (end,) = (json.loads(path.read_text()) for path in (run / "attempts").glob("*/end.json"))
    assert end["outcome"] == "diverged" and "step 5" in end["reason"]
    assert [e["steps"] for e in events(run, "rollback")] == [[2, 3]]
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_00000001"]
    assert not (run / "DONE").exists()
    assert all(math.isfinite(row["loss"]) for row in rows(run).values() if row["step"] == 1)
