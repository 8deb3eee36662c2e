"""From sources to the packs of each step: the plan in the trainer's process, reading and decoding in worker processes.

Workers get planned packs in order and send finished ones back in order, so their number changes nothing but speed. A sample
that fails becomes filler of its planned length: the plan never moves.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from mmscale.config.env import set_env_default
from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.errors import BadSampleError, ConfigError, DataError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming.chat import load_template
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import Encoder
from mmscale.streaming.lengths import sample_lengths
from mmscale.streaming.plan import PLAN_VERSION, Draw, Pack, Plan, PlannedStep, PlanSource, mixture_shares, plan_pass
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.state import StreamFacts, StreamState
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import EncodedSample, MediaSpecs, PackedBatch, Skip

if TYPE_CHECKING:
    from torch.utils.data import Sampler

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
class _Source:
    """What a worker needs of a source."""

    name: str
    shards: ShardSet
    encoder: Encoder


@dataclass(frozen=True)
class Stream:
    """The data of a run on one data-parallel rank. Open one with `Stream.open`."""

    facts: StreamFacts
    data: DataConfig
    sources: tuple[_Source, ...]
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
            RefusedInputError: a source has no manifest or no usable sample.
        """
        if global_batch % dp_size:
            text = f"train.global_batch={global_batch} must be a multiple of the data-parallel size {dp_size}"
            raise ConfigError(f"{text}; use {-(-global_batch // dp_size) * dp_size}")
        opened = tuple(_open_source(name, source, data, tokenizer, specs) for name, source in sources.items())
        planned = tuple(_plan_source(source, sources[source.name]) for source in opened)
        return cls(_facts(data, opened, planned), data, opened, planned, global_batch, dp_rank, dp_size, workers)

    def restore(self, data: Mapping[str, Any]) -> StreamState:
        """The state that `StreamState.to_dict` gave. Raises CheckpointError naming what differs in the data."""
        return StreamState.from_dict(data, self.facts)

    def steps(self, state: StreamState | None = None) -> Iterator[StepBatch]:
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

    def passes(self, max_packs: int | None = None) -> Iterator[PackedBatch | None]:
        """Every usable sample once in a fixed order, split over the ranks; for validation.

        Every rank gets the same number of turns; a rank without a pack in the last one gets None.

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
            yield None

    def _read(self, tasks: Iterator[Pack]) -> Generator[PackedBatch, None, None]:
        if self.workers:
            # Its threads do not survive a fork; without this the library says so once per worker.
            set_env_default("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader(
            _PackReader(self.sources),
            batch_size=None,
            sampler=cast("Sampler[Pack]", tasks),
            num_workers=self.workers,
            collate_fn=_as_is,
            prefetch_factor=self.data.prefetch if self.workers else None,
            multiprocessing_context=multiprocessing.get_context("fork") if self.workers else None,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # else every iterator would draw from the trainer's random numbers
        )
        try:
            for result in loader:
                if isinstance(result, MmscaleError):
                    raise result
                if result.skipped and self.data.on_error == "raise":
                    raise DataError(_raised(result.skipped[0]))
                yield result
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            text = f"expected loader processes that live as long as the run, found: {str(error).splitlines()[0]}"
            hint = (
                "look for an out-of-memory kill, lower data.workers or data.prefetch, and start again: the run resumes"
            )
            raise DataError(f"{text}; {hint}") from error


def _open_source(
    name: str, source: SourceConfig, data: DataConfig, tokenizer: TextTokenizer, specs: MediaSpecs
) -> _Source:
    encoder = Encoder(
        tokenizer=tokenizer,
        template=load_template(source.template or data.template),
        specs=specs,
        max_tokens=data.seq_len,
        on_long=data.on_long,
        max_pixels=data.image.max_pixels,
    )
    return _Source(name, ShardSet.open(Path(data.root) / source.path, source.path.rstrip("/")), encoder)


def _plan_source(source: _Source, config: SourceConfig) -> PlanSource:
    lengths = sample_lengths(source.shards, source.encoder)
    return PlanSource(source.name, lengths.tokens, lengths.media_rows, lengths.reasons, config.weight)


def _facts(data: DataConfig, sources: Sequence[_Source], planned: Sequence[PlanSource]) -> StreamFacts:
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


class _PackReader(Dataset[Any]):
    """Planned pack -> finished pack. A failure that ends the run is returned, for the trainer to raise it whole."""

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = tuple(sources)

    def __getitem__(self, pack: Any) -> PackedBatch | MmscaleError:
        skips: list[Skip] = []
        try:
            documents = [self._document(draw, skips) for draw in pack]
        except MmscaleError as error:
            return error if isinstance(error, DataError) else ConfigError(str(error))
        return collate(documents, self._sources[0].encoder.specs, skips)

    def _document(self, draw: Draw, skips: list[Skip]) -> EncodedSample:
        source = self._sources[draw.source_idx]
        try:
            document = source.encoder.encode(source.shards.read(draw.row))
            if len(document) == draw.tokens:
                return document
            reason, detail = "length", f"{draw.tokens} tokens planned from the headers, {len(document)} found"
        except BadSampleError as error:
            reason, detail = error.reason, error.detail
        except MmscaleError:
            raise
        except Exception as error:  # the worker's border: whatever a decoder raises, one sample never ends a run
            reason, detail = "unexpected", f"{type(error).__name__}: {error}"
            log.exception("%s: unexpected failure", source.shards.id(draw.row), all_ranks=True)
        sample_id, offset = source.shards.id(draw.row), source.shards.offset(draw.row)
        skip = Skip(sample_id, reason, detail[:500], offset, source.name, draw.epoch)
        log.warning("skipped %s at offset %d: %s: %s", sample_id, offset, reason, skip.detail, all_ranks=True)
        skips.append(skip)
        return source.encoder.filler(sample_id, draw.tokens)


def _raised(skip: Skip) -> str:
    text = f"{skip.id} at offset {skip.offset}: expected a usable sample, found {skip.reason}: {skip.detail}"
    return f"{text}; repair or remove it, or set data.on_error=skip"


def _as_is(item: Any) -> Any:
    return item


def _init_worker(_worker_idx: int) -> None:
    """Leaves signals to the trainer: it finishes its step and saves, and for that it still needs its workers.

    SIGTERM ends a worker only when the trainer itself sends it. The signal is waited for in a thread, so that it works
    while the main thread sits in a decoder.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()


def _end_with_trainer(trainer_pid: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer_pid:
        pass
    os._exit(0)
