"""Which samples form which pack of which step: a pure function of lengths, mixture and seed.

Nothing of ranks, workers or time enters, so every process computes the same plan and a resumed run jumps to its place.
`draws.py` says which documents a window holds; here they become packs, groups of packs of like cost, and steps.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mmscale.config.cost import document_costs, integer_coefficients
from mmscale.config.schema import CostConfig, DataConfig
from mmscale.errors import CheckpointError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.draws import MAX_AGE, Carry, Drawn, Draws, Mixture, PlanSource
from mmscale.streaming.pack import Ints, Packs, pack_documents
from mmscale.streaming.permute import shuffled

log = get_logger(__name__)
T = TypeVar("T")

PLAN_VERSION = 2
"""Part of every data fingerprint: a change of the rules below makes another plan."""

TOO_LONG = "too_long"
"""The reason of rows that are left out because of their length alone."""

TOO_MANY_IMAGES = "too_many_images"
"""The reason of rows with more vision inputs than a pack may have."""

BY_SIZE = (TOO_LONG, TOO_MANY_IMAGES)
"""Reasons for which a row is left out though nothing is wrong with it."""

FULL_FILL = 0.98
"""Packs with at least this share of their tokens in use are emitted at once."""

MAX_WINDOW, MAX_CARRY = 3 << 14, 1 << 14
"""Draws of a window and documents carried out of it, at most: what a checkpoint says about them stays below 64 KB."""

_AUTO_GROUPS, _AUTO_DRAWS = 16, 4096
_SLOW_S = 5.0
_PASS_WINDOW = 4096


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
class PlanRules:
    """What decides the plan besides the sources; the keys of `DataConfig`, and `cost` in any unit."""

    seq_len: int
    plan_group: int
    window: int | None
    seed: int
    shuffle_block: int
    max_images_per_pack: int | None
    cost: CostConfig

    @classmethod
    def of(cls, data: DataConfig, cost: CostConfig) -> PlanRules:
        """The rules of a run, whose packs cost `cost`."""
        return cls(**{name: getattr(data, name) for name in cls.__dataclass_fields__ if name != "cost"}, cost=cost)


@dataclass(frozen=True)
class Rest:
    """What another mixture goes on with: documents that were drawn but not consumed, and the draws made by source."""

    carry: Carry
    drawn: Drawn


@dataclass(frozen=True)
class PlanState:
    """A place between two packs: the window, packs of it already taken, steps so far.

    `carry`: the documents carried into the window. `drawn`: draws by source before the window `since`, with which the present
    shares began. `rest`: for a mixture that is changed here; None at the very beginning.
    """

    window: int = 0
    pack: int = 0
    step: int = 0
    since: int = 0
    drawn: Drawn = ()
    carry: Carry = field(default_factory=Carry)
    rest: Callable[[], Rest] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        rest = None if self.rest is None else self.rest()
        return {
            **{"window": self.window, "pack": self.pack, "step": self.step, "since": self.since},
            **{"drawn": dict(self.drawn), "carry": self.carry.to_dict()},
            "rest": rest and {"carry": rest.carry.to_dict(), "drawn": dict(rest.drawn)},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PlanState:
        """The state that `to_dict` wrote. Raises CheckpointError when the values have another form."""
        try:
            window, pack, step, since = (int(data[name]) for name in ("window", "pack", "step", "since"))
            state = cls(window, pack, step, since, _drawn(data["drawn"]), Carry.from_dict(data["carry"]))
            if data["rest"] is None:
                return state
            rest = Rest(Carry.from_dict(data["rest"]["carry"]), _drawn(data["rest"]["drawn"]))
            return replace(state, rest=lambda: rest)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            text = (
                f"data state: expected the plan's window, pack, step and carry, found {type(error).__name__}: {error}"
            )
            raise CheckpointError(f"{text}; resume from another checkpoint") from error


def _drawn(counts: Mapping[str, Any]) -> Drawn:
    return tuple((str(name), int(count)) for name, count in counts.items())


@dataclass(frozen=True)
class PlannedStep:
    """The packs of one optimizer step over all ranks, the rows dropped on the way, and the place after it.

    When all sources end, the packs that are missing for a whole step are empty.
    """

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
class _Window:
    """The packs of one window. `draws`: all its usable documents; `place` [draws]: the pack of each, `len(packs)` = none.

    `positions`: the draws of each source before the next window.
    """

    packs: tuple[Pack, ...]
    dropped: tuple[Drop, ...]
    carry: Carry
    positions: Drawn
    draws: Draws
    place: Ints
    mixture: Mixture

    def rest(self, pack: int) -> Rest:
        """What is left when the first `pack` packs were consumed."""
        return Rest(self.mixture.encode(self.draws[self.place >= pack]), self.positions)


class Plan:
    """The plan of a mixture; endless, unless every source ends."""

    def __init__(self, sources: Sequence[PlanSource], rules: PlanRules) -> None:
        """Raises RefusedInputError when a source has no usable row, ConfigError when nothing costs anything."""
        self.sources, self.rules = tuple(sources), rules
        self.window = self._window_size()
        self.mixture = Mixture(self.sources, window=self.window, block=rules.shuffle_block, seed=rules.seed)
        self._coefficients = integer_coefficients(rules.cost, rules.seq_len)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for plans with equal packs."""
        sources = [(s.name, s.digest, str(s.share), s.max_samples, s.max_epochs) for s in self.sources]
        rules = {**asdict(self.rules), "cost": self._coefficients}
        return json.dumps([PLAN_VERSION, sources, rules])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def steps(self, state: PlanState, global_batch: int) -> Generator[PlannedStep, None, None]:
        """Steps of `global_batch` packs, beginning at `state`; close the iterator to end its thread."""
        packs: list[Pack] = []
        dropped: list[Drop] = []
        step, after = state.step, state
        for pack, drops, after in self.packs(state):
            packs.append(pack)
            dropped += drops
            if len(packs) == global_batch:
                yield PlannedStep(tuple(packs), tuple(dropped), step, replace(after, step=step + 1))
                step, packs, dropped = step + 1, [], []
        if packs:
            packs += [()] * (global_batch - len(packs))
            yield PlannedStep(tuple(packs), tuple(dropped), step, replace(after, step=step + 1))

    def packs(self, state: PlanState) -> Generator[tuple[Pack, tuple[Drop, ...], PlanState], None, None]:
        """Packs, beginning at `state`; with each the rows newly dropped and the place after it."""
        drops: tuple[Drop, ...] = ()
        for start, planned in _one_ahead(self._windows(state)):
            if start.pack == 0:  # a state inside the window comes after the report of the window's drops
                drops += planned.dropped
            for i in range(start.pack, len(planned.packs)):
                # not dataclasses.replace: it would take as long as the packing
                after = PlanState(start.window, i + 1, start.step, start.since, start.drawn, start.carry,
                                  partial(planned.rest, i + 1))  # fmt: skip
                yield planned.packs[i], drops, after
                drops = ()

    def _windows(self, state: PlanState) -> Iterator[tuple[PlanState, _Window]]:
        """Every window from the one of `state` on, with the place from which on it is used."""
        while True:
            planned = _planned(self, state.window, state.since, state.drawn, state.carry)
            yield state, planned
            if self.mixture.has_ended(planned.positions):
                return
            window = state.window + 1
            since, drawn = self.mixture.next_phase(state.since, state.drawn, window, planned.positions)
            state = PlanState(window, 0, state.step, since, drawn, planned.carry)

    def _window_size(self) -> int:
        """Draws of a window: as asked for or enough for some groups of packs, but no more than is useful.

        A larger one than an eighth of an epoch gains nothing, when it holds two groups of packs: a document may be carried over
        `MAX_AGE` windows, and so it still comes within about its epoch in a small set.
        """
        rules, total = self.rules, sum((s.share for s in self.sources), Fraction(0))
        packs_per_draw = Fraction(0)  # exact, so that every machine finds the same window
        for source in self.sources:
            if not source.used_tokens(rules.shuffle_block, rules.seed).any():
                raise RefusedInputError(f"source '{source.name}': {_why_nothing_is_usable(source, rules)}")
            assert source.tokens.max() <= rules.seq_len, "the lengths already follow data.on_long"
            need = Fraction(int(source.tokens.sum(dtype=np.uint64)), rules.seq_len)
            if rules.max_images_per_pack is not None:
                need = max(need, Fraction(int(source.vision.sum(dtype=np.uint64)), rules.max_images_per_pack))
            packs_per_draw += source.share / total * need / len(source.tokens)
        group = rules.plan_group / packs_per_draw
        asked = rules.window or max(_AUTO_DRAWS, ceil(_AUTO_GROUPS * group))
        useful = max(ceil(sum(s.num_rows for s in self.sources) / 8), ceil(2 * group))
        return min(asked, useful, MAX_WINDOW)

    def _plan_window(self, window: int, since: int, drawn: Drawn, carry: Carry) -> _Window:
        started = time.perf_counter()
        first, last = (self.mixture.positions(w, since, drawn) for w in (window, window + 1))
        draws = self.mixture.draws(first, last, carry)
        unusable = draws[draws.tokens == 0]
        draws = draws[draws.tokens > 0]
        # in a random order, or documents of one source, which are of like length, would fill packs of their own
        mixed = shuffled(len(draws), f"{self.rules.seed}/mixed/{window}")
        packs = pack_documents(
            draws.tokens[mixed], self.rules.seq_len, draws.vision[mixed], self.rules.max_images_per_pack
        )
        packs = Packs(mixed[packs.documents], packs.starts)
        kept = packs[self._choose(packs, draws, keep_all=self.mixture.has_ended(last))]
        kept = kept[self._order(kept, draws, window)]
        place = np.full(len(draws), len(kept))
        place[kept.documents] = np.repeat(np.arange(len(kept)), kept.sizes)
        took = time.perf_counter() - started
        if took > _SLOW_S:
            log.warning("planning the %d documents of window %d took %.1f s; lower data.window when steps wait for data",
                        len(draws), window, took)  # fmt: skip
        dropped = tuple(self._drop(*d) for d in zip(unusable.source, unusable.row, unusable.epoch, strict=True))
        waiting = self.mixture.encode(draws[place == len(kept)])
        return _Window(_as_tuples(kept, draws), dropped, waiting, last, draws, place, self.mixture)

    def _choose(self, packs: Packs, draws: Draws, *, keep_all: bool) -> Ints:
        """The packs of this window, whole groups of them; the others go back into the next window's draws.

        Full packs stay. Under-full ones stay when a document in them waited long enough, or when more would be carried than
        one window holds. Groups are whole but where more than `MAX_CARRY` documents would be carried.
        """
        if keep_all:
            return np.arange(len(packs))
        group = self.rules.plan_group
        fill = self._fill(packs, draws)
        aged = packs.sums(draws.age >= MAX_AGE).astype(bool)
        order = np.lexsort((-fill, ~aged))
        carried = len(draws) - np.concatenate([[0], np.cumsum(packs.sizes[order])])

        def least(limit: int) -> int:
            """Packs to keep so that at most `limit` documents are carried."""
            return int(np.searchsorted(-carried, -limit))

        must = max(int(aged.sum()), least(self.window))
        full = int((aged | (fill >= FULL_FILL)).sum())
        groups = max(full // group, min(-(-must // group), len(packs) // group))
        return np.sort(order[: max(groups * group, least(MAX_CARRY))])

    def _fill(self, packs: Packs, draws: Draws) -> np.ndarray:
        """Share of the tokens in use, or of the images that a pack may hold when there are more of these."""
        fill = packs.sums(draws.tokens) / self.rules.seq_len
        most = self.rules.max_images_per_pack
        return fill if most is None else np.maximum(fill, packs.sums(draws.vision) / most)

    def _order(self, packs: Packs, draws: Draws, window: int) -> Ints:
        """Packs in groups of like cost, the groups shuffled; an incomplete group comes last."""
        cost = packs.sums(document_costs(self._coefficients, draws.tokens, draws.vision, draws.audio))
        order = np.argsort(cost, kind="stable")
        num_groups, group = len(order) // self.rules.plan_group, self.rules.plan_group
        whole, rest = order[: num_groups * group], order[num_groups * group :]
        whole = whole.reshape(num_groups, group)[shuffled(num_groups, f"{self.rules.seed}/groups/{window}")]
        return np.concatenate([whole.ravel(), rest])

    def _drop(self, source_idx: int, row: int, epoch: int) -> Drop:
        return Drop(int(source_idx), int(row), int(epoch), self.sources[source_idx].reasons[int(row)])


@lru_cache(maxsize=4)
def _planned(plan: Plan, window: int, since: int, drawn: Drawn, carry: Carry) -> _Window:
    """A window of a plan; the last few are kept for all equal plans of this process."""
    return plan._plan_window(window, since, drawn, carry)


def _one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items of an iterator, of which a thread works out the next one meanwhile."""
    with ThreadPoolExecutor(1, "plan") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def _as_tuples(packs: Packs, draws: Draws) -> tuple[Pack, ...]:
    columns = (column[packs.documents].tolist() for column in (draws.source, draws.row, draws.epoch, draws.tokens))
    flat = list(map(Draw._make, zip(*columns, strict=True)))
    starts = packs.starts.tolist()
    return tuple(tuple(flat[lo:hi]) for lo, hi in pairwise(starts))


def plan_pass(sources: Sequence[PlanSource], rules: PlanRules) -> tuple[tuple[Pack, ...], tuple[Drop, ...]]:
    """Packs that hold every usable row exactly once, in a fixed order, and the rows that are left out; for validation.

    The rows of all sources are mixed, so that the first few packs already speak for all of them.
    """
    begin, end = (tuple((s.name, n * s.num_rows) for s in sources) for n in (0, 1))
    draws = Mixture(sources, window=1, block=1, seed=rules.seed).draws(begin, end, Carry())
    draws = draws[shuffled(len(draws), f"{rules.seed}/pass")]
    unusable = draws[draws.tokens == 0]
    draws = draws[draws.tokens > 0]
    packs: list[Pack] = []
    for lo in range(0, len(draws), rules.window or _PASS_WINDOW):
        part = draws[lo : lo + (rules.window or _PASS_WINDOW)]
        found = pack_documents(part.tokens, rules.seq_len, part.vision, rules.max_images_per_pack)
        packs += _as_tuples(found, part)
    dropped = zip(unusable.source.tolist(), unusable.row.tolist(), strict=True)
    return tuple(packs), tuple(Drop(s, row, 0, sources[s].reasons[row]) for s, row in dropped)


def pack_features(pack: Pack, sources: Sequence[PlanSource]) -> tuple[int, int, int, int, int]:
    """What the cost of a pack is made of: (1, tokens, squared lengths, vision inputs, audio inputs).

    Packs are not padded, so their tokens are those of their documents.
    """
    vision = sum(int(sources[d.source_idx].vision[d.row]) for d in pack)
    audio = sum(int(sources[d.source_idx].audio[d.row]) for d in pack)
    return 1, sum(d.tokens for d in pack), sum(d.tokens * d.tokens for d in pack), vision, audio


def _why_nothing_is_usable(source: PlanSource, rules: PlanRules) -> str:
    counts = Counter(source.reasons.values())
    remedies = {
        TOO_LONG: f"raise data.seq_len={rules.seq_len}",
        TOO_MANY_IMAGES: f"raise data.max_images_per_pack={rules.max_images_per_pack}",
    }
    by_reason = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
    found = f"found {len(source.tokens)} rows, all unusable (by reason: {by_reason})"
    if source.num_rows < len(source.tokens):
        found = f"found none among the {source.num_rows} of max_samples (unusable in all, by reason: {by_reason})"
    remedy = " or ".join(remedies[reason] for reason in BY_SIZE if reason in counts)
    return f"expected at least one usable sample, {found}; {remedy or 'look at the data'}, or remove the source"
