"""Judges a run that has been through faults by what it has written, against a run that nothing happened to.

The effective history is the last line of each step: what was done again later does not count.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class History:
    """`ids`: step -> samples of its batch; `losses`: step -> exact loss in hexadecimal, None for a batch passed over."""

    ids: dict[int, list[str]]
    losses: dict[int, str | None]


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one start of the trainer has left. Times in unix seconds; None = not on record.

    base_step           step of the checkpoint it went on from
    first_at, last_at   end of its first and last step
    last_step           0 = it made no step
    over_at             when its batch script decided what comes next
    """

    token: str
    submitted_at: float | None
    started_at: float
    base_step: int | None
    first_at: float | None
    last_at: float | None
    last_step: int
    outcome: str | None
    decision: str | None
    reason: str
    over_at: float | None


@dataclass(frozen=True, slots=True)
class Recovery:
    """From one attempt that made steps to the next one that did.

    redone  steps of the first that were done again
    gap_s   seconds from its death to the first new step, without the time in SLURM's queue
    """

    before: Attempt
    after: Attempt
    redone: int
    gap_s: float

    def __str__(self) -> str:
        return f"{self.before.token} -> {self.after.token}: {self.redone} steps redone, {self.gap_s:.1f} s to the first new step"


def read_history(run: Path) -> History:
    """The effective history of a run directory."""
    ledger = {row["step"]: row["ids"] for row in rows(run / "ledger.jsonl")}
    losses = {row["step"]: row["loss_hex"] for row in rows(run / "metrics.jsonl")}
    return History(ledger, losses)


def check_samples(found: History, expected: History) -> None:
    """AssertionError unless every step has the samples that it should have: none lost, none doubled."""
    have, want = (Counter(one for ids in history.ids.values() for one in ids) for history in (found, expected))
    lost, doubled = want - have, have - want
    assert not lost and not doubled, f"{lost.total()} samples lost: {lost}; {doubled.total()} doubled: {doubled}"
    other = [step for step in sorted(expected.ids | found.ids) if found.ids.get(step) != expected.ids.get(step)]
    assert not other, f"samples of steps {other} came in another order or step"


def check_losses(found: History, expected: History, rel: float = 0.0) -> None:
    """AssertionError unless the losses are equal: to the bit, or within `rel` when that is given."""
    assert found.losses.keys() == expected.losses.keys(), (
        f"steps {sorted(found.losses.keys() ^ expected.losses.keys())} are in one run only"
    )
    for step, text in expected.losses.items():
        other = found.losses[step]
        if text is None or other is None or not rel:
            assert other == text, f"loss of step {step}: {other}, expected {text}"
        else:
            value, wanted = float.fromhex(other), float.fromhex(text)
            assert abs(value - wanted) <= rel * abs(wanted), (
                f"loss of step {step}: {value}, expected {wanted} +- {rel:g}"
            )


def read_attempts(run: Path) -> list[Attempt]:
    """The attempts of a run that a batch script has started, in the order of their start.

    A step that a fenced attempt ends after its successor has started is none of them: the successor does it anyway.
    """
    metrics = rows(run / "metrics.jsonl")
    starts = sorted((_read(path)["started_at"], path.parent) for path in (run / "attempts").glob("*/job.json"))
    found, end = [], math.inf
    for started_at, folder in reversed(starts):
        found.append(
            _attempt(folder, [row for row in metrics if row["attempt"] == folder.name and row["ended_at"] <= end])
        )
        if (folder / "claim.json").exists():  # others have taken over nothing
            end = started_at
    return found[::-1]


def recoveries(run: Path) -> list[Recovery]:
    """How the run went on after each attempt that made steps and had a successor that did."""
    attempts = read_attempts(run)
    worked = [number for number, one in enumerate(attempts) if one.last_step]
    return [_recovery(attempts[first : second + 1]) for first, second in pairwise(worked)]


def _recovery(chain: list[Attempt]) -> Recovery:
    """Args:
    chain: the attempt that made steps, those that did not get so far, and the one that made steps again.
    """
    before, after = chain[0], chain[-1]
    assert before.last_at is not None and after.first_at is not None and after.base_step is not None
    queued = sum(_queued_s(first, second) for first, second in pairwise(chain))
    return Recovery(before, after, max(0, before.last_step - after.base_step), after.first_at - before.last_at - queued)


def _queued_s(first: Attempt, second: Attempt) -> float:
    """Seconds between two attempts in which SLURM made the job wait. A batch script that was killed has not said when it was over, and
    one that outlived its attempt too late; SLURM's own requeue has."""
    is_known = first.over_at is not None and first.over_at < second.started_at + 1  # whole seconds
    over_at = first.over_at if is_known else second.submitted_at
    assert over_at is not None, f"nothing says when attempt {first.token} was over"
    return max(0.0, second.started_at - over_at)


def _attempt(folder: Path, steps: list[dict[str, Any]]) -> Attempt:
    job, start, end, after = (_read(folder / f"{name}.json") for name in ("job", "start", "end", "after"))
    return Attempt(
        token=folder.name,
        submitted_at=job["submitted_at"],
        started_at=job["started_at"],
        base_step=start.get("base_step"),
        first_at=steps[0]["ended_at"] if steps else None,
        last_at=steps[-1]["ended_at"] if steps else None,
        last_step=steps[-1]["step"] if steps else 0,
        outcome=end.get("outcome"),
        decision=after.get("decision"),
        reason=after.get("reason", ""),
        over_at=after.get("at"),
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; a line that a kill has cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
