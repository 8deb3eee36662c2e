"""Where the time of a run went: seconds by category over all attempts, which make up the wall-clock exactly.

One time line is cut into pieces, in whole microseconds, so nothing is counted twice or left out. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmscale.train.history import AttemptRecord, Event, History, Step, read_history, read_steps_backwards

CATEGORIES: dict[str, str] = {
    "compute": "steps that count, without the waits below",
    "data_wait": "steps that count: waiting for the loader",
    "exposed_comm": "steps that count: doing nothing but waiting for a transfer",
    "checkpoint": "steps stopped by a save",
    "validation": "validation losses",
    "redone": "steps that were done again later, whole",
    "startup": "from the start of a job or process to its first step; a rollback's way back",
    "hang": "attempts that hung: from the last step to the kill",
    "shutdown": "from an attempt's last step to its end",
    "queue": "waiting for nodes: from the submission, or from the end of the attempt before",
    "idle": "no job: from the end of an attempt to the next submission or start by hand",
    "other": "between steps, for records and checks; the step under way",
}
"""Every category with what it holds."""

NUM_RECENT = 50
"""Newest steps that are kept, for the present speed."""

_NEVER = 1 << 62

_Pauses = dict[tuple[str, int], Counter[str]]


@dataclass(frozen=True, slots=True)
class AttemptAccount:
    """The steps of one attempt. `num_redone` of its `num_steps` were lost: a later attempt went on from before them."""

    token: str
    first_step: int | None
    last_step: int | None
    num_steps: int
    num_redone: int


@dataclass(frozen=True, slots=True)
class Account:
    """Seconds by category, in the order of CATEGORIES; `attempts` as in the history; `recent`: the newest steps, newest first."""

    seconds: Mapping[str, float]
    wall_s: float
    attempts: tuple[AttemptAccount, ...]
    recent: tuple[Step, ...]

    @property
    def goodput(self) -> float:
        """Share of the wall-clock that was compute of steps that count."""
        return self.seconds["compute"] / self.wall_s if self.wall_s else 0.0


def account(
    history: History, steps_backwards: Iterable[Step], see: Callable[[Step, bool], None] | None = None
) -> Account:
    """Where the time went, from the first submission or start to the last moment on record.

    Steps of an attempt after its successor has begun are those of a fenced attempt: the time is its successor's.

    Args:
        history: of the run.
        steps_backwards: all executions of steps, the newest first.
        see: is given each step but those of fenced attempts, with True when a later attempt or a rollback went on from before it.
    """
    pieces = _pieces(history.attempts)
    by_token = {piece.record.token: piece for piece in pieces}
    pauses = _pauses(history.events)
    recent: list[Step] = []
    lowest: int | None = None  # of the steps done later
    for step in steps_backwards:
        piece = by_token.get(step.attempt)
        if piece is not None and step.ended_at is not None and _us(step.ended_at) > piece.bound:
            continue
        later = [one for one in (lowest, piece.later_base if piece else None) if one is not None]
        is_lost = bool(later) and step.step >= min(later)
        lowest = step.step if lowest is None else min(lowest, step.step)
        if piece is not None and step.ended_at is not None:
            piece.add(step, is_lost, pauses)
        if len(recent) < NUM_RECENT:
            recent.append(step)
        if see is not None:
            see(step, is_lost)
    total, wall = _join(pieces, pauses)
    return Account(
        seconds={name: total[name] / 1e6 for name in CATEGORIES},
        wall_s=wall / 1e6,
        attempts=tuple(piece.account() for piece in pieces),
        recent=tuple(recent),
    )


def goodput_of(folder: Path) -> Account:
    """The account of a run directory. Cost: one pass over its metrics."""
    return account(read_history(folder), read_steps_backwards(folder))


def goodput_line(found: Account) -> str:
    """The account on one line, the largest parts first."""
    parts = sorted(((s, name) for name, s in found.seconds.items() if s >= 0.0005 * found.wall_s), reverse=True)
    text = ", ".join(f"{name.replace('_', ' ')} {seconds / found.wall_s:.1%}" for seconds, name in parts if seconds)
    return f"goodput {found.goodput:.1%} of {duration(found.wall_s)} in {len(found.attempts)} attempts: {text}"


def duration(seconds: float) -> str:
    """A time for people.

    Example:
        >>> duration(0.25), duration(75), duration(3720), duration(200000)
        ('0.2 s', '75.0 s', '1 h 02 min', '2 d 07 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


class _Piece:
    """The time of one attempt, filled from its last step back to its first. All times in microseconds.

    bound       when its successor begins; `_NEVER` = it has none
    later_base  the first step that a later attempt does again; None = nobody does
    """

    def __init__(self, record: AttemptRecord, begin: int, bound: int, later_base: int | None) -> None:
        self.record, self.begin, self.bound, self.later_base = record, begin, bound, later_base
        self.spent: Counter[str] = Counter()
        self.first: int | None = None
        self.last = begin
        self.first_step: int | None = None
        self.last_step: int | None = None
        self.num_steps = self.num_redone = 0

    def add(self, step: Step, is_lost: bool, pauses: _Pauses) -> None:
        """One step before those that are there."""
        assert step.ended_at is not None, "the caller leaves out steps without a time"
        until = self.bound if self.first is None else self.first
        end = max(min(_us(step.ended_at), until), self.begin)
        began = max(end - max(_us(step.took_s), 0), self.begin)
        if self.first is None:
            self.last, self.last_step = end, step.step
        else:
            rest = self._pause(pauses, step.step, self.first - end)
            self.spent["other" if self.first_step == step.step + 1 else "startup"] += rest
        self.first, self.first_step = began, step.step
        self.num_steps += 1
        self.num_redone += is_lost
        took = end - began
        if self.record.hung_at is not None:
            # a stopped rank that is woken for its stacks may end the step that it held up
            hung = min(took, max(0, end - _us(self.record.hung_at)))
            self.spent["hang"] += hung
            took -= hung
        if is_lost:
            self.spent["redone"] += took
            return
        for name, seconds in (("data_wait", step.data_wait_s), ("exposed_comm", step.comm_wait_s)):
            part = min(max(_us(seconds), 0), took)
            self.spent[name] += part
            took -= part
        self.spent["compute"] += took

    def close(self, pauses: _Pauses) -> int:
        """Fills what lies before the first step and after the last; gives the end."""
        end = max(min(_us(self.record.last_at), self.bound), self.last)
        if self.first is None:
            self.spent["hang" if self.record.hang else "startup"] += end - self.begin
            return end
        self.spent["startup"] += self.first - self.begin
        assert self.last_step is not None, "there is a first step"
        rest = self._pause(pauses, self.last_step, end - self.last)
        under_way = self.bound == _NEVER and not self.record.is_over
        self.spent["hang" if self.record.hang else "other" if under_way else "shutdown"] += rest
        return end

    def _pause(self, pauses: _Pauses, step: int, span: int) -> int:
        """Takes what stopped the run behind `step` out of `span`; gives the rest."""
        for name, wanted in pauses.get((self.record.token, step), {}).items():
            part = min(wanted, span)
            self.spent[name] += part
            span -= part
        return span

    def account(self) -> AttemptAccount:
        """The counts."""
        return AttemptAccount(self.record.token, self.first_step, self.last_step, self.num_steps, self.num_redone)


def _pieces(attempts: tuple[AttemptRecord, ...]) -> list[_Piece]:
    begins: list[int] = []
    for record in attempts:
        begins.append(max(_us(record.first_at), begins[-1] if begins else 0))
    pieces: list[_Piece] = []
    later_base: int | None = None
    bound = _NEVER
    for record, begin in zip(reversed(attempts), reversed(begins), strict=True):
        pieces.append(_Piece(record, begin, bound, later_base))
        bound = begin
        if record.base_step is not None:
            later_base = record.base_step + 1 if later_base is None else min(later_base, record.base_step + 1)
    return pieces[::-1]


def _pauses(events: Iterable[Event]) -> _Pauses:
    """(attempt, step) -> what stopped the run behind that step, in microseconds."""
    found: _Pauses = {}
    for event in events:
        name, key = {"save": ("checkpoint", "blocked_s"), "validation": ("validation", "seconds")}.get(
            event.name, ("", "")
        )
        seconds = event.details.get(key)
        if isinstance(seconds, (int, float)) and seconds > 0:
            found.setdefault((event.attempt, event.step), Counter())[name] += _us(seconds)
    return found


def _join(pieces: list[_Piece], pauses: _Pauses) -> tuple[Counter[str], int]:
    """All pieces and what lies between them, and the whole span."""
    total: Counter[str] = Counter()
    if not pieces:
        return total, 0
    first = pieces[0]
    submitted = first.record.submitted_at
    start = cursor = first.begin if submitted is None else min(_us(submitted), first.begin)
    before: _Piece | None = None
    for piece in pieces:
        record = piece.record
        goes_on = before is None or (record.submission is not None and record.submission == before.record.submission)
        asked = cursor
        if not goes_on:
            submitted_us = piece.begin if record.submitted_at is None else _us(record.submitted_at)
            asked = min(max(submitted_us, cursor), piece.begin)
        total["idle"] += asked - cursor
        total["queue"] += piece.begin - asked
        cursor, before = piece.close(pauses), piece
    for piece in pieces:
        total.update(piece.spent)
    return total, cursor - start
