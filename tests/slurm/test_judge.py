"""The judge of the fault tests: it can say no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge import History, check_losses, check_samples, read_history, recoveries

GOOD = History({1: ["a", "b"], 2: ["c"], 3: ["a"]}, {1: "0x1.0p+0", 2: None, 3: "0x1.8p-1"})


def write_run(folder: Path) -> Path:
    """Two attempts with one between them that made no step; the second one does step 2 again."""
    steps = [("7.0", 1, 100.0), ("7.0", 2, 101.0), ("7.2", 2, 130.0), ("7.2", 3, 131.0)]
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "ledger.jsonl").open("w") as ledger:
        for token, step, at in steps:
            row = {"step": step, "loss_hex": GOOD.losses[step], "ended_at": at, "attempt": token}
            metrics.write(json.dumps(row) + "\n")
            ledger.write(json.dumps({"step": step, "ids": GOOD.ids[step]}) + "\n")
        metrics.write('{"step": 4, "loss_h')  # a kill has cut it off
    for restarts, (started_at, base, over_at) in enumerate([(90.0, 0, 103.0), (110.0, None, 112.0), (120.0, 1, 140.0)]):
        attempt = folder / "attempts" / f"7.{restarts}"
        attempt.mkdir(parents=True)
        (attempt / "job.json").write_text(json.dumps({"submitted_at": 89.0, "started_at": started_at}))
        (attempt / "after.json").write_text(json.dumps({"decision": "requeue", "reason": "", "at": over_at}))
        if base is not None:
            (attempt / "start.json").write_text(json.dumps({"base_step": base}))
    return folder


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    found = read_history(write_run(tmp_path))
    assert found == GOOD
    check_samples(found, GOOD)
    check_losses(found, GOOD)


def test_redone_steps_and_the_gap_without_the_queue(tmp_path: Path) -> None:
    (one,) = recoveries(write_run(tmp_path))
    assert (one.before.token, one.after.token, one.redone) == ("7.0", "7.2", 1)
    assert one.gap_s == pytest.approx((130 - 101) - (110 - 103) - (120 - 112))


def test_without_a_word_of_the_batch_script_slurm_says_when_it_was_over(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "attempts/7.0/after.json").unlink()
    (run / "attempts/7.1/job.json").write_text(json.dumps({"submitted_at": 105.0, "started_at": 110.0}))
    (one,) = recoveries(run)
    assert one.gap_s == pytest.approx((130 - 101) - (110 - 105) - (120 - 112))


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ({1: ["a", "b"], 2: ["c"]}, "1 samples lost"),
        ({1: ["a", "b"], 2: ["c"], 3: ["a", "c"]}, "1 doubled"),
        ({1: ["a", "c"], 2: ["b"], 3: ["a"]}, r"steps \[1, 2\]"),
        ({1: ["b", "a"], 2: ["c"], 3: ["a"]}, r"steps \[1\]"),
    ],
    ids=["lost", "doubled", "swapped", "order"],
)
def test_other_samples_are_refused(ids: dict[int, list[str]], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        check_samples(History(ids, GOOD.losses), GOOD)


@pytest.mark.parametrize("rel", [0.0, 1e-6])
def test_other_losses_are_refused(rel: float) -> None:
    for losses in ({**GOOD.losses, 3: "0x1.80002p-1"}, {**GOOD.losses, 2: "0x1.0p+0"}, {1: GOOD.losses[1]}):
        with pytest.raises(AssertionError, match="step"):
            check_losses(History(GOOD.ids, losses), GOOD, rel)


def test_the_last_bit_counts_unless_a_tolerance_is_given() -> None:
    found = History(GOOD.ids, {**GOOD.losses, 1: "0x1.0000000000001p+0"})
    with pytest.raises(AssertionError, match="loss of step 1"):
        check_losses(found, GOOD)
    check_losses(found, GOOD, rel=1e-6)
