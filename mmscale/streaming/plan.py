"""Which samples form which pack of which step: a pure function of lengths, mixture and seed.

Nothing of ranks, workers or time enters, so every process computes the same plan and a resumed run jumps to its place.

The draws of all sources form one endless stream. Source s has the share `p_s`; its draw k has the virtual time
`(k + 1/2) / p_s`, and window w covers the virtual times `[w * W, (w + 1) * W)`: so a window is a function of w alone. Draw
q of a source of N rows is row `permute(q % N)` of epoch `q // N`: each row once per epoch, whatever the shares are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import CheckpointError, ConfigError, RefusedInputError
from mmscale.streaming.pack import best_fit_decreasing, document_costs
from mmscale.streaming.permute import permute

PLAN_VERSION = 1
"""Part of every data fingerprint: a change of the rules below makes another plan."""

TOO_LONG = "too_long"
"""The reason of rows that are left out because of their length alone."""

FULL_FILL = 0.98
"""Packs with at least this share of their tokens in use are emitted at once."""

MAX_AGE = 4
"""A document that was carried over so many windows is emitted, however empty its pack is."""

Ints = NDArray[np.int64]


class Draw(NamedTuple):
    """One document of a pack: a row of a source in one of its epochs, and the tokens planned for it."""

    source_idx: int
    row: int
    epoch: int
    tokens: int


class Drop(NamedTuple):
    """A row that the plan leaves out in one epoch, and the fixed word that says why."""

    source_idx: int
    row: int
    epoch: int
    reason: str


Pack = tuple[Draw, ...]


@dataclass(frozen=True)
class PlanSource:
    """One source as the plan sees it.

    `tokens` [rows]: planned tokens, 0 = unusable with its reason in `reasons`; `media_rows` [rows]: how many of them are
    media; `weight`: share relative to the other sources, None on all of them = by size.
    """

    name: str
    tokens: NDArray[np.uint32]
    media_rows: NDArray[np.uint32]
    reasons: Mapping[int, str]
    weight: float | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the source, unusable ones included."""
        return len(self.tokens)


@dataclass(frozen=True)
class PlanState:
    """A place between two packs: the window, packs of it already taken, what was carried into it, steps so far.

    `carry` holds one tuple `(source index, age, first draw, distance to the next draw, ...)` per source and age.
    """

    window: int = 0
    pack: int = 0
    step: int = 0
    carry: tuple[tuple[int, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"window": self.window, "pack": self.pack, "step": self.step, "carry": [list(c) for c in self.carry]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanState:
        """The state that `to_dict` wrote. Raises CheckpointError when the values have another form."""
        try:
            carry = tuple(tuple(int(v) for v in c) for c in data["carry"])
            return cls(int(data["window"]), int(data["pack"]), int(data["step"]), carry)
        except (KeyError, TypeError, ValueError) as error:
            text = (
                f"data state: expected the plan's window, pack, step and carry, found {type(error).__name__}: {error}"
            )
            raise CheckpointError(f"{text}; resume from another checkpoint") from error


@dataclass(frozen=True)
class PlannedStep:
    """The packs of one optimizer step over all ranks, the rows dropped on the way, and the place after it."""

    packs: tuple[Pack, ...]
    dropped: tuple[Drop, ...]
    step: int
    state_after: PlanState

    def for_rank(self, dp_rank: int, dp_size: int) -> tuple[Pack, ...]:
        """The packs of one data-parallel rank in micro-batch order.

        Neighbours in `packs` cost alike and run side by side; the slot rotates, or one rank would always get the dearest.
        """
        turns = range(len(self.packs) // dp_size)
        return tuple(self.packs[j * dp_size + (dp_rank + j + self.step) % dp_size] for j in turns)


@dataclass(frozen=True)
class _Draws:
    """Columns [n] of draws: source index, number of the draw within its source, windows waited, row, epoch, tokens, cost."""

    source: Ints
    number: Ints
    age: Ints
    row: Ints
    epoch: Ints
    tokens: Ints
    cost: Ints

    def __getitem__(self, idx: Any) -> _Draws:
        return _Draws(*(getattr(self, name)[idx] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def cat(cls, parts: Sequence[_Draws]) -> _Draws:
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class _Window:
    packs: tuple[Pack, ...]
    dropped: tuple[Drop, ...]
    carry: tuple[tuple[int, ...], ...]


class Plan:
    """The endless plan of a mixture."""

    def __init__(
        self, sources: Sequence[PlanSource], *, seq_len: int, plan_group: int, window: int, seed: int = 0
    ) -> None:
        """Args are those of `DataConfig`. Raises RefusedInputError when a source has no usable row."""
        self.sources = tuple(sources)
        self.seq_len, self.plan_group, self.seed = seq_len, plan_group, seed
        self.shares = mixture_shares(sources)
        self.window = min(window, self._useful_window())

    def _useful_window(self) -> int:
        """Draws beyond which a larger window gains nothing: an eighth of an epoch, but enough for two groups of packs.

        A document may be carried over `MAX_AGE` windows; so in a small set it still comes within about its epoch.
        """
        mean_tokens = Fraction(0)  # exact, so that every machine finds the same window
        for source, share in zip(self.sources, self.shares, strict=True):
            if not source.tokens.any():
                raise RefusedInputError(f"source '{source.name}': {_why_nothing_is_usable(source, self.seq_len)}")
            assert source.tokens.max() <= self.seq_len, "the lengths already follow data.on_long"
            mean_tokens += share * int(source.tokens.sum(dtype=np.uint64)) / source.num_rows
        num_rows = sum(source.num_rows for source in self.sources)
        return max(ceil(num_rows / 8), ceil(2 * self.plan_group * self.seq_len / mean_tokens))

    def steps(self, state: PlanState, global_batch: int) -> Iterator[PlannedStep]:
        """Endless steps of `global_batch` packs, beginning at `state`."""
        packs: list[Pack] = []
        dropped: list[Drop] = []
        step = state.step
        for pack, drops, after in self.packs(state):
            packs.append(pack)
            dropped += drops
            if len(packs) == global_batch:
                yield PlannedStep(tuple(packs), tuple(dropped), step, replace(after, step=step + 1))
                step, packs, dropped = step + 1, [], []

    def packs(self, state: PlanState) -> Iterator[tuple[Pack, tuple[Drop, ...], PlanState]]:
        """Endless packs, beginning at `state`; with each the rows newly dropped and the place after it."""
        drops: tuple[Drop, ...] = ()
        while True:
            planned = self._plan_window(state.window, state.carry)
            if state.pack == 0:  # a state inside the window comes after the report of the window's drops
                drops += planned.dropped
            for i in range(state.pack, len(planned.packs)):
                yield planned.packs[i], drops, replace(state, pack=i + 1)
                drops = ()
            state = replace(state, window=state.window + 1, pack=0, carry=planned.carry)

    def _plan_window(self, window: int, carry: tuple[tuple[int, ...], ...]) -> _Window:
        fresh = [self._draws(s, *self._span(s, window)) for s in range(len(self.sources))]
        draws = _Draws.cat([*(self._carried(entry) for entry in carry), *fresh])
        draws = draws[np.lexsort((draws.number, draws.source))]
        unusable = draws[draws.tokens == 0]
        draws = draws[draws.tokens > 0]
        packs = best_fit_decreasing(draws.tokens.tolist(), self.seq_len)
        kept, rest = self._choose(packs, draws)
        order = self._order(kept, draws, window)
        columns = (draws.source, draws.row, draws.epoch, draws.tokens)
        planned = [Draw(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]
        left = sorted(i for p in rest for i in p)
        return _Window(
            packs=tuple(tuple(planned[i] for i in p) for p in order),
            dropped=tuple(self._drop(*d) for d in zip(unusable.source, unusable.row, unusable.epoch, strict=True)),
            carry=_encode_carry(draws[np.array(left, np.int64)]),
        )

    def _choose(self, packs: list[list[int]], draws: _Draws) -> tuple[list[list[int]], list[list[int]]]:
        """The packs of this window, whole groups of them, and those that go back into the next window's draws.

        Full packs stay. Under-full ones stay when a document in them waited long enough, or when more would be carried than
        one window holds.
        """
        fill = _sums(draws.tokens, packs)
        aged = [n > 0 for n in _sums(draws.age >= MAX_AGE, packs)]
        order = sorted(range(len(packs)), key=lambda i: (not aged[i], -fill[i], i))
        waiting = np.cumsum([len(packs[i]) for i in reversed(order)])
        must = max(sum(aged), len(packs) - int(np.searchsorted(waiting, self.window, side="right")))
        full = sum(a or f >= FULL_FILL * self.seq_len for a, f in zip(aged, fill, strict=True))
        groups = max(full // self.plan_group, min(-(-must // self.plan_group), len(packs) // self.plan_group))
        cut = groups * self.plan_group
        return [packs[i] for i in sorted(order[:cut])], [packs[i] for i in order[cut:]]

    def _order(self, packs: list[list[int]], draws: _Draws, window: int) -> list[list[int]]:
        """Packs in groups of like cost, the groups shuffled."""
        cost = _sums(draws.cost, packs)
        order = sorted(range(len(packs)), key=lambda i: (cost[i], i))
        groups = [order[i : i + self.plan_group] for i in range(0, len(order), self.plan_group)]
        random.Random(f"{self.seed}/groups/{window}").shuffle(groups)
        return [packs[i] for group in groups for i in group]

    def _span(self, source_idx: int, window: int) -> tuple[int, int]:
        """First and past-the-end draw of a source in a window, in exact integers."""
        num, den = self.shares[source_idx].as_integer_ratio()
        lo, hi = ((2 * num * w * self.window + den) // (2 * den) for w in (window, window + 1))
        return lo, hi

    def _carried(self, entry: tuple[int, ...]) -> _Draws:
        source_idx, age, *steps = entry
        return self._columns(source_idx, np.cumsum(np.array(steps, np.int64)), age)

    def _draws(self, source_idx: int, lo: int, hi: int) -> _Draws:
        return self._columns(source_idx, np.arange(lo, hi, dtype=np.int64), 0)

    def _columns(self, source_idx: int, number: Ints, age: int) -> _Draws:
        source = self.sources[source_idx]
        epoch, position = np.divmod(number, source.num_rows)
        row = np.empty_like(number)
        for e in np.unique(epoch):
            here = epoch == e
            row[here] = permute(position[here], source.num_rows, f"{self.seed}/{source.name}/{e}")
        tokens, media = source.tokens[row].astype(np.int64), source.media_rows[row].astype(np.int64)
        same = np.full_like(number, source_idx)
        return _Draws(same, number, np.full_like(number, age), row, epoch, tokens, document_costs(tokens, media))

    def _drop(self, source_idx: int, row: int, epoch: int) -> Drop:
        return Drop(int(source_idx), int(row), int(epoch), self.sources[source_idx].reasons[int(row)])


def plan_pass(
    sources: Sequence[PlanSource], *, seq_len: int, window: int, seed: int = 0
) -> tuple[tuple[Pack, ...], tuple[Drop, ...]]:
    """Packs that hold every usable row exactly once, in a fixed order, and the rows that are left out; for validation.

    The rows of all sources are mixed, so that the first few packs already speak for all of them.
    """
    sizes = np.array([s.num_rows for s in sources])
    total, starts = int(sizes.sum()), np.cumsum(sizes) - sizes
    mixed = permute(np.arange(total), total, f"{seed}/pass")
    owner = np.searchsorted(starts, mixed, side="right") - 1
    draws = [Draw(int(s), int(i - starts[s]), 0, 0) for s, i in zip(owner, mixed, strict=True)]
    draws = [d._replace(tokens=int(sources[d.source_idx].tokens[d.row])) for d in draws]
    usable = [d for d in draws if d.tokens]
    packs: list[Pack] = []
    for lo in range(0, len(usable), window):
        part = usable[lo : lo + window]
        found = best_fit_decreasing([d.tokens for d in part], seq_len)
        packs += [tuple(part[i] for i in pack) for pack in found]
    dropped = (Drop(d.source_idx, d.row, 0, sources[d.source_idx].reasons[d.row]) for d in draws if not d.tokens)
    return tuple(packs), tuple(dropped)


def mixture_shares(sources: Sequence[PlanSource]) -> tuple[Fraction, ...]:
    """The share of each source, exact and summing to 1. Raises ConfigError when only some sources have a weight."""
    without = [s.name for s in sources if s.weight is None]
    if without and len(without) < len(sources):
        text = f"data.sources: expected a weight on every source or on none, found none on {', '.join(without)}"
        raise ConfigError(f"{text}; set data.sources.{without[0]}.weight or remove the others")
    parts = [Fraction(s.num_rows) if s.weight is None else Fraction(str(s.weight)) for s in sources]
    return tuple(p / sum(parts) for p in parts)


def _why_nothing_is_usable(source: PlanSource, seq_len: int) -> str:
    reasons = list(source.reasons.values())
    counts = ", ".join(f"{r} {reasons.count(r)}" for r in sorted(set(reasons))) or "none"
    text = f"expected at least one usable sample, found {source.num_rows} rows, all unusable (by reason: {counts})"
    return f"{text}; with data.seq_len={seq_len} samples that are longer need a larger data.seq_len"


def _sums(values: NDArray[Any], packs: Sequence[Sequence[int]]) -> list[int]:
    """The sum of `values` over the documents of each pack."""
    by_document = values.tolist()
    return [sum(by_document[i] for i in pack) for pack in packs]


def _encode_carry(draws: _Draws) -> tuple[tuple[int, ...], ...]:
    """Draws, sorted by source and number, one window older and delta-coded: a few bytes each in a checkpoint."""
    entries = []
    for source_idx, age in np.unique(np.stack([draws.source, draws.age], axis=1), axis=0).tolist():
        numbers = draws.number[(draws.source == source_idx) & (draws.age == age)]
        steps = np.diff(numbers, prepend=0)
        entries.append((source_idx, age + 1, *steps.tolist()))
    return tuple(entries)
