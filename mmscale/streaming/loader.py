"""From sources to the packs of each step on one rank: lengths -> plan -> worker processes -> packs, with a state to resume.

The plan runs in the trainer's process; workers get planned packs in order and send finished ones back in order, so their
number changes nothing but speed.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.errors import ConfigError, DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.chat import load_template
from mmscale.streaming.collate import collate
from mmscale.streaming.decode.dsp import require_audio
from mmscale.streaming.encode import Encoder
from mmscale.streaming.lengths import sample_lengths
from mmscale.streaming.plan import (
    PLAN_VERSION,
    TOO_LONG,
    Pack,
    Plan,
    PlannedStep,
    PlanSource,
    mixture_shares,
    plan_pass,
)
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.state import StreamFacts, StreamState
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.workers import Source, read_packs
from mmscale.types import MediaSpecs, PackedBatch, Skip

log = get_logger(__name__)

__all__ = ["StepBatch", "Stream", "StreamState"]


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step on one rank.

    `packs`: this rank's packs in micro-batch order. `ids`: the sample ids of the whole global batch in plan order, equal on
    all ranks. `num_epochs`: samples drawn up to and with this step, in epochs of all sources together.
    """

    packs: tuple[PackedBatch, ...]
    ids: tuple[str, ...]
    num_epochs: float
    planned: PlannedStep
    facts: StreamFacts

    def state_after(self, before: StreamState | None, skips: Sequence[Skip]) -> StreamState:
        """The resume point after this step, equal on all ranks.

        Args:
            before: the resume point before this step; None = the beginning.
            skips: what `PackedBatch.skipped` says in this step on all ranks together, in any order.

        Raises:
            DataError: more than `data.max_bad` of the samples were bad.
        """
        return (before or StreamState(self.facts)).after(self.planned, skips)


@dataclass(frozen=True)
class Stream:
    """The data of a run on one data-parallel rank. Open one with `Stream.open`."""

    facts: StreamFacts
    data: DataConfig
    sources: tuple[Source, ...]
    plan_sources: tuple[PlanSource, ...]
    global_batch: int
    dp_rank: int
    dp_size: int
    workers: int

    @classmethod
    def open(
        cls,
        data: DataConfig,
        sources: Mapping[str, SourceConfig],
        tokenizer: TextTokenizer,
        specs: MediaSpecs,
        *,
        global_batch: int,
        dp_rank: int,
        dp_size: int,
        workers: int,
    ) -> Stream:
        """The stream over `sources`; their token lengths are computed when they are not stored beside the shards.

        Args:
            data: order, packing and bad-sample rules.
            sources: name -> source; `data.sources`, or the validation sources.
            tokenizer, specs: those of the model.
            global_batch: packs per step over all ranks, a multiple of `dp_size`.
            workers: loader processes of this rank; 0 decodes in this process.

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
        opened = tuple(_open_source(name, source, data, tokenizer, specs) for name, source in sources.items())
        planned = tuple(_plan_source(source, sources[source.name], data.on_error) for source in opened)
        return cls(_facts(data, opened, planned), data, opened, planned, global_batch, dp_rank, dp_size, workers)

    def restore(self, data: Mapping[str, Any]) -> StreamState:
        """The state that `StreamState.to_dict` gave. Raises CheckpointError naming what differs in the data."""
        return StreamState.from_dict(data, self.facts)

    def steps(self, state: StreamState | None = None) -> Generator[StepBatch, None, None]:
        """Endless steps from `state` on (None = the beginning); close the iterator to end its worker processes.

        Raises:
            DataError: a worker process died, a shard changed while it was read, or a sample failed under
                `data.on_error: raise`.
        """
        state = state or StreamState(self.facts)
        data, num_seen = self.data, state.num_seen
        sources = self.plan_sources
        plan = Plan(sources, seq_len=data.seq_len, plan_group=data.plan_group, window=data.window, seed=data.seed)
        waiting: deque[PlannedStep] = deque()

        def tasks() -> Iterator[Pack]:
            for step in plan.steps(state.plan, self.global_batch):
                waiting.append(step)
                yield from step.for_rank(self.dp_rank, self.dp_size)

        packs = self._read(tasks())
        try:
            while True:
                own = tuple(next(packs) for _ in range(self.global_batch // self.dp_size))
                step = waiting.popleft()
                ids = tuple(self.sources[d.source_idx].shards.id(d.row) for pack in step.packs for d in pack)
                num_seen += len(ids) + len(step.dropped)
                yield StepBatch(own, ids, num_seen / sum(self.facts.num_rows.values()), step, self.facts)
        finally:
            packs.close()

    def passes(self, max_packs: int | None = None) -> Iterator[PackedBatch]:
        """Every usable sample once in a fixed order, split over the ranks; for validation.

        Every rank gets the same number of packs, because engines that shard weights wait for each other in every forward: a
        rank without a pack in the last turn gets one of filler, without targets.

        Args:
            max_packs: packs over all ranks; None = all.
        """
        data = self.data
        packs, dropped = plan_pass(self.plan_sources, seq_len=data.seq_len, window=data.window, seed=data.seed)
        if dropped:
            log.info("one pass leaves out %d unusable samples", len(dropped))
        packs = packs[:max_packs]
        own = packs[self.dp_rank :: self.dp_size]
        read = self._read(iter(own))
        try:
            yield from read
        finally:
            read.close()
        if len(own) < -(-len(packs) // self.dp_size):
            encoder = self.sources[0].encoder
            yield collate([encoder.filler("filler", 1)], encoder.specs)

    def _read(self, tasks: Iterator[Pack]) -> Generator[PackedBatch, None, None]:
        packs = read_packs(self.sources, tasks, self.workers, self.data.prefetch)
        try:
            for pack in packs:
                if pack.skipped and self.data.on_error == "raise":
                    raise DataError(_raised(pack.skipped[0]))
                yield pack
        finally:
            packs.close()


def _open_source(
    name: str, source: SourceConfig, data: DataConfig, tokenizer: TextTokenizer, specs: MediaSpecs
) -> Source:
    encoder = Encoder(
        tokenizer=tokenizer,
        template=load_template(source.template or data.template),
        specs=specs,
        max_tokens=data.seq_len,
        on_long=data.on_long,
        max_pixels=data.image.max_pixels,
    )
    return Source(name, ShardSet.open(Path(data.root) / source.path, source.path.rstrip("/")), encoder)


def _plan_source(source: Source, config: SourceConfig, on_error: Literal["skip", "raise"]) -> PlanSource:
    lengths = sample_lengths(source.shards, source.encoder)
    bad = [row for row, reason in lengths.reasons.items() if reason != TOO_LONG]
    if bad and on_error == "raise":
        row, shards = bad[0], source.shards
        skip = Skip(shards.id(row), lengths.reasons[row], "found without decoding it", shards.offset(row), source.name)
        raise RefusedInputError(_raised(skip))
    return PlanSource(source.name, lengths.tokens, lengths.media_rows, lengths.reasons, config.weight)


def _facts(data: DataConfig, sources: Sequence[Source], planned: Sequence[PlanSource]) -> StreamFacts:
    shares = mixture_shares(planned)
    fingerprint = {
        "shards": _digest([[s.name, s.shards.fingerprint] for s in sources]),
        "mixture": _digest([[s.name, str(share)] for s, share in zip(sources, shares, strict=True)]),
        "encoding": _digest([s.encoder.fingerprint for s in sources]),
        "lengths": _digest([hashlib.sha256(p.tokens.tobytes()).hexdigest() for p in planned]),
        "packing": f"seq_len={data.seq_len} plan_group={data.plan_group} window={data.window} seed={data.seed}",
        "planner": str(PLAN_VERSION),
    }
    return StreamFacts(
        fingerprint=fingerprint,
        sources=tuple(s.name for s in sources),
        num_rows={s.name: len(s.shards) for s in sources},
        unplanned={s.name: dict(s.shards.skipped) for s in sources},
        max_bad=data.max_bad,
    )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _raised(skip: Skip) -> str:
    text = f"{skip.id} at offset {skip.offset}: expected a usable sample, found {skip.reason}: {skip.detail}"
    return f"{text}; repair or remove it, or set data.on_error=skip"
