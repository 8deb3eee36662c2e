"""From sources to the packs of each step on one rank: lengths -> plan -> worker processes -> packs, with a state to resume.

The plan runs in the trainer's process; workers get planned packs in order and send finished ones back in order, so their
number changes nothing but speed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np

from mmscale.config.mixture import leaf_sources, mixture_shares
from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.errors import ConfigError, DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.chat import load_template
from mmscale.streaming.collate import collate
from mmscale.streaming.decode.dsp import require_audio
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.encode import Encoder
from mmscale.streaming.lengths import ALONE, Turn, sample_lengths
from mmscale.streaming.make_pack import Divide, divided
from mmscale.streaming.plan import (
    BY_SIZE,
    PLAN_VERSION,
    TOO_MANY_IMAGES,
    Drop,
    Pack,
    Plan,
    PlannedStep,
    PlanRules,
    plan_pass,
)
from mmscale.streaming.remix import SourceFacts
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.state import StreamFacts, StreamState
from mmscale.streaming.storage.urls import join_root
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.workers import Source, read_packs
from mmscale.types import MediaSpecs, PackedBatch, Skip

log = get_logger(__name__)

__all__ = ["StepBatch", "Stream", "StreamState"]


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step on one rank.

    `packs`: the packs that this rank has made, `places` their micro-batches of the `num_packs` of its data rank. `ids`: the sample
    ids of the whole global batch in plan order, equal on all ranks. `num_epochs`: samples drawn up to and with this step, in
    epochs of all sources together.
    """

    packs: tuple[PackedBatch, ...]
    places: tuple[int, ...]
    num_packs: int
    ids: tuple[str, ...]
    num_epochs: float
    planned: PlannedStep
    facts: StreamFacts
    sources: tuple[Source, ...]

    def left_out(self) -> tuple[Skip, ...]:
        """Rows that the plan left out on the way, because their length or header said so; no pack has a place for them."""
        return tuple(_left_out(self.sources[drop.source_idx], drop) for drop in self.planned.dropped)

    def state_after(self, before: StreamState | None, skips: Sequence[Skip]) -> StreamState:
        """The resume point after this step, equal on all ranks.

        Args:
            before: the resume point before this step; None = the beginning.
            skips: what `PackedBatch.skipped` says in this step on all ranks together, in any order.

        Raises:
            DataError: more than `data.max_bad` of the samples were bad, or `data.max_bad_in_a_row` of a source in a row.
        """
        return (before or StreamState(self.facts)).after(self.planned, skips, self.ids)


@dataclass(frozen=True)
class Stream:
    """The data of a run on one data-parallel rank. Open one with `Stream.open`.

    `plan.sources[i]` is what the plan knows of `sources[i]`, the leaves of the mixture by name. `member` = (i, n): the packs of
    this data rank are made by n processes in turn, and this one is the i-th. Who makes a pack follows from its place in the run
    alone; what is in it, from the plan alone.
    """

    facts: StreamFacts
    data: DataConfig
    plan: Plan
    sources: tuple[Source, ...]
    global_batch: int
    dp_rank: int
    dp_size: int
    workers: int
    divide: Divide | None = None
    member: tuple[int, int] = (0, 1)

    @classmethod
    def open(
        cls,
        data: DataConfig,
        sources: Mapping[str, SourceConfig],
        tokenizer: TextTokenizer,
        specs: MediaSpecs,
        *,
        cost: CostConfig,
        global_batch: int,
        dp_rank: int,
        dp_size: int,
        workers: int,
        turn: Turn = ALONE,
        divide: Divide | None = None,
        member: tuple[int, int] = (0, 1),
    ) -> Stream:
        """The stream over `sources`; their token lengths are computed when they are not stored beside the shards.

        Args:
            data: order, packing and bad-sample rules.
            sources: name -> source or mixture; `data.sources`, or the validation sources.
            tokenizer, specs: those of the model.
            cost: of a pack, see `mmscale.config.cost.run_cost`.
            global_batch: packs per step over all ranks, a multiple of `dp_size`.
            workers: loader processes of this rank; 0 decodes in this process.
            turn: this process's part in computing the lengths.
            divide: plans how sequence parallelism divides a pack, in the process that makes it.
            member: this process's place among those that share the packs of its data rank, and their number.

        Raises:
            ConfigError: `global_batch` does not divide, or a template or weight is wrong.
            RefusedInputError: a source has no manifest or no usable sample, or a sample that is known to be bad under
                `data.on_error: raise`.
            MissingExtraError: the model takes audio and torchaudio is not usable.
        """
        if global_batch % dp_size:
            text = f"train.global_batch={global_batch} must be a multiple of the data-parallel size {dp_size}"
            raise ConfigError(f"{text}; use {-(-global_batch // dp_size) * dp_size}")
        if specs.audio is not None:
            require_audio()  # here and not in a worker: the import is slow, and a missing package ends the run at once
        leaves = leaf_sources(sources)
        opened = tuple(
            Source(name, open_shards(data, leaf), open_encoder(data, leaf, tokenizer, specs))
            for name, leaf in leaves.items()
        )
        planned = [_plan_source(source, leaves[source.name], data, turn) for source in opened]
        shares = mixture_shares(sources, {p.name: p.num_rows for p in planned})
        planned = [replace(p, share=shares[p.name]) for p in planned]
        plan = Plan(planned, PlanRules.of(data, cost))
        facts = _facts(data, plan, opened)
        return cls(facts, data, plan, opened, global_batch, dp_rank, dp_size, workers, divide, member)

    @property
    def meets_ranks(self) -> bool:
        """False: each rank plans for itself."""
        return False

    def restore(self, data: Mapping[str, Any]) -> StreamState:
        """The state that `StreamState.to_dict` gave. Raises CheckpointError naming what differs in the data."""
        return StreamState.from_dict(data, self.facts)

    def steps(self, state: StreamState | None = None) -> Generator[StepBatch, None, None]:
        """Steps from `state` on (None = the beginning); close the iterator to end its worker processes.

        Raises:
            DataError: every source has ended (`max_epochs`), a shard changed while it was read, loader processes die again and
                again, or a sample failed under `data.on_error: raise`.
        """
        state = state or StreamState(self.facts)
        num_seen, step = state.num_seen, None
        plan = self.plan.steps(state.plan, self.global_batch)
        planned, ahead = tee(plan)
        packs = self._read(pack for s in ahead for pack in self._own(s).values() if pack)
        num_packs = self.global_batch // self.dp_size
        try:
            for step in planned:
                mine = self._own(step)
                own = tuple(next(packs) if p else self._filler() for p in mine.values())
                ids = tuple(self.sources[d.source_idx].shards.id(d.row) for pack in step.packs for d in pack)
                num_seen += len(ids) + len(step.dropped)
                num_epochs = num_seen / self.facts.num_rows
                yield StepBatch(own, tuple(mine), num_packs, ids, num_epochs, step, self.facts, self.sources)
            raise DataError(self._ended(state.plan.step if step is None else step.step + 1))
        finally:
            packs.close()
            plan.close()

    def _own(self, step: PlannedStep) -> dict[int, Pack]:
        """The packs of a step that this process makes, by their place among those of its data rank."""
        packs = step.for_rank(self.dp_rank, self.dp_size)
        first, (own, size) = step.step * len(packs), self.member
        return {place: pack for place, pack in enumerate(packs) if (first + place) % size == own}

    def _ended(self, num_steps: int) -> str:
        caps = ", ".join(f"{s.name} ({s.max_epochs})" for s in self.plan.sources)
        text = f"data.sources: expected data for train.steps, found that every source ends with step {num_steps}"
        return f"{text} by its max_epochs: {caps}; raise max_epochs of a source, or set train.steps={num_steps}"

    def passes(self, max_packs: int | None = None) -> Iterator[PackedBatch]:
        """The packs of `turns` that this process makes."""
        return (pack for pack in self.turns(max_packs) if pack is not None)

    def turns(self, max_packs: int | None = None) -> Generator[PackedBatch | None, None, None]:
        """Every usable sample once in a fixed order, split over the ranks; for validation.

        Every rank gets the same number of turns, because engines that shard weights wait for each other in every forward: a
        data rank without a pack in the last turn gets one of filler, without targets. None = another member makes the pack.

        Args:
            max_packs: packs over all ranks; None = all.
        """
        packs, dropped = plan_pass(self.plan.sources, self.plan.rules)
        if dropped:
            log.info("one pass leaves out %d unusable samples", len(dropped))
        packs = packs[:max_packs]
        own, (member, size) = packs[self.dp_rank :: self.dp_size], self.member
        read = self._read(iter(own[member::size]))
        try:
            for turn in range(-(-len(packs) // self.dp_size)):
                if turn % size != member:
                    yield None
                else:
                    yield next(read) if turn < len(own) else self._filler()
        finally:
            read.close()

    def _filler(self) -> PackedBatch:
        """A pack of one token without a target, where there is nothing to learn from."""
        encoder = self.sources[0].encoder
        return divided(collate([encoder.filler("filler", 1)], encoder.specs), self.divide)

    def _read(self, tasks: Iterator[Pack]) -> Generator[PackedBatch, None, None]:
        packs = read_packs(
            self.sources, tasks, self.workers, self.data.prefetch, self.data.sample_timeout_s, self.divide
        )
        try:
            for pack in packs:
                if pack.skipped and self.data.on_error == "raise":
                    raise DataError(_raised(pack.skipped[0]))
                yield pack
        finally:
            packs.close()


def _left_out(source: Source, drop: Drop) -> Skip:
    sample_id, offset = source.shards.id(drop.row), source.shards.offset(drop.row)
    return Skip(sample_id, drop.reason, "known before it was read", offset, source.name, drop.epoch)


def open_encoder(data: DataConfig, source: SourceConfig, tokenizer: TextTokenizer, specs: MediaSpecs) -> Encoder:
    """How the samples of a source become documents. Raises ConfigError when its template is unknown."""
    return Encoder(
        tokenizer=tokenizer,
        template=load_template(source.template or data.template),
        specs=specs,
        max_tokens=data.seq_len,
        on_long=data.on_long,
        max_pixels=data.image.max_pixels,
    )


def open_shards(data: DataConfig, source: SourceConfig) -> ShardSet:
    """The shards of a source that has a path. Raises RefusedInputError when they cannot be used."""
    path = source.path or ""
    return ShardSet.open(join_root(data.root, path), path.rstrip("/"), data.cache)


def _plan_source(source: Source, config: SourceConfig, data: DataConfig, turn: Turn) -> PlanSource:
    lengths = sample_lengths(source.shards, source.encoder, turn)
    tokens, reasons = lengths.tokens, lengths.reasons
    if data.max_images_per_pack is not None:
        for row in np.flatnonzero((lengths.vision > data.max_images_per_pack) & (tokens > 0)).tolist():
            tokens[row], reasons[row] = 0, TOO_MANY_IMAGES
    bad = [row for row, reason in reasons.items() if reason not in BY_SIZE]
    if bad and data.on_error == "raise":
        row, shards = min(bad), source.shards
        skip = Skip(shards.id(row), reasons[row], "found without decoding it", shards.offset(row), source.name)
        raise RefusedInputError(_raised(skip))
    return PlanSource(
        source.name, tokens, lengths.vision, lengths.audio, reasons,
        max_samples=config.max_samples, max_epochs=config.max_epochs,
    )  # fmt: skip


def _facts(data: DataConfig, plan: Plan, sources: Sequence[Source]) -> StreamFacts:
    rules = plan.rules
    packing = {name: getattr(rules, name) for name in ("seq_len", "plan_group", "window", "seed", "shuffle_block")}
    packing["max_images_per_pack"] = rules.max_images_per_pack
    fingerprint = {
        "packing": " ".join(f"{name}={value}" for name, value in packing.items()),
        "cost": " ".join(f"{name}={value:.12g}" for name, value in rules.cost.model_dump().items()),
        "planner": str(PLAN_VERSION),
    }
    facts = {s.name: _source_facts(s, p) for s, p in zip(sources, plan.sources, strict=True)}
    return StreamFacts(fingerprint, facts, data.max_bad, data.max_bad_in_a_row)


def _source_facts(source: Source, planned: PlanSource) -> SourceFacts:
    unplanned = dict(source.shards.skipped)
    if planned.num_rows < len(source.shards):
        unplanned["max_samples"] = len(source.shards) - planned.num_rows
    digests = {
        "shards": _digest([source.shards.name, source.shards.fingerprint]),
        "encoding": _digest(source.encoder.fingerprint),
        "lengths": planned.digest,
    }
    return SourceFacts(
        planned.num_rows, unplanned, digests, str(planned.share), planned.max_samples, planned.max_epochs
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _raised(skip: Skip) -> str:
    text = f"{skip.id} at offset {skip.offset}: expected a usable sample, found {skip.reason}: {skip.detail}"
    return f"{text}; repair or remove it, or set data.on_error=skip"
