"""Stream mode: training on tars without an index, from files, servers or commands, through the webdataset library.

There is no plan, because nothing is known before it is read: the shards are dealt to the readers of all ranks, and each packs
what comes. What was trained on is known shard by shard, and sample by sample in the shards that were begun, so a resume on any
number of ranks and workers loses and repeats nothing as long as a shard gives the same again. But it reads what was begun again
from its start, and its packs are not those of a run without a stop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from mmscale.config.mixture import leaf_sources, mixture_shares
from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.errors import ConfigError, DataError
from mmscale.logging import get_logger
from mmscale.streaming.decode.dsp import require_audio
from mmscale.streaming.loader import open_encoder
from mmscale.streaming.plan import BY_SIZE
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.unindexed.pool import read_stream
from mmscale.streaming.unindexed.progress import End, Place, advance
from mmscale.streaming.unindexed.reader import Reading, ReadPack, StreamSource
from mmscale.streaming.unindexed.state import UnindexedFacts, UnindexedState
from mmscale.streaming.unindexed.urls import list_shards
from mmscale.types import MediaSpecs, PackedBatch, Skip

log = get_logger(__name__)


class Report(NamedTuple):
    """What one rank trains on in a step."""

    dp_rank: int
    ids: tuple[str, ...]
    taken: tuple[Place, ...]
    ended: tuple[End, ...]


Exchange = Callable[[Report], Sequence[Report]]
"""Gives the reports of all ranks, the same on each. Distributed: every rank calls it once per step."""


@dataclass(frozen=True)
class UnindexedStep:
    """One optimizer step on one rank.

    `packs`: this rank's packs in micro-batch order; their `skipped` are the samples that were left out before them. `ids`: the
    sample ids of the whole global batch by rank, equal on all ranks. `num_epochs`: shards done with this step, in epochs of
    all sources together.
    """

    packs: tuple[PackedBatch, ...]
    ids: tuple[str, ...]
    num_epochs: float
    taken: tuple[Place, ...]
    ended: tuple[End, ...]
    facts: UnindexedFacts

    @property
    def places(self) -> tuple[int, ...]:
        """See `DataStep`; stream mode does not share packs between ranks."""
        return tuple(range(len(self.packs)))

    @property
    def num_packs(self) -> int:
        """See `DataStep`."""
        return len(self.packs)

    def left_out(self) -> tuple[Skip, ...]:
        """None: what a stream leaves out stands in `PackedBatch.skipped`."""
        return ()

    def state_after(self, before: UnindexedState | None, skips: Sequence[Skip]) -> UnindexedState:
        """The resume point after this step, equal on all ranks.

        Args:
            before: the resume point before this step; None = the beginning.
            skips: what `PackedBatch.skipped` says in this step on all ranks together, in any order.

        Raises:
            DataError: more than `data.max_bad` of the samples were bad.
        """
        return (before or UnindexedState.start(self.facts)).after(self.taken, self.ended, skips)


@dataclass(frozen=True)
class UnindexedStream:
    """The data of a run on one data-parallel rank, with the face of `Stream`. Open one with `UnindexedStream.open`."""

    facts: UnindexedFacts
    data: DataConfig
    sources: tuple[StreamSource, ...]
    global_batch: int
    dp_rank: int
    dp_size: int
    workers: int
    exchange: Exchange

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
        exchange: Exchange,
    ) -> UnindexedStream:
        """The stream over `sources`; nothing is read or run yet.

        Args: as for `Stream.open`, and `exchange`, which brings the ranks together once per step.

        Raises:
            ConfigError: keys that do not fit stream mode, or a command without `allow_commands`.
            RefusedInputError: no shards, a shard twice, or a scheme that is not read.
            MissingExtraError: the model takes audio and torchaudio is not usable.
        """
        if global_batch % dp_size:
            text = f"train.global_batch={global_batch} must be a multiple of the data-parallel size {dp_size}"
            raise ConfigError(f"{text}; use {-(-global_batch // dp_size) * dp_size}")
        if specs.audio is not None:
            require_audio()  # here and not in a worker: the import is slow, and a missing package ends the run at once
        _check_library()
        leaves = leaf_sources(sources)
        shards = {name: list_shards(name, source, data.root) for name, source in leaves.items()}
        shares = mixture_shares(sources, {name: len(found) for name, found in shards.items()})
        opened = tuple(
            StreamSource(
                name, shards[name], open_encoder(data, source, tokenizer, specs), float(shares[name]), source.max_epochs
            )
            for name, source in leaves.items()
        )
        facts = UnindexedFacts(
            fingerprint={source.name: _fingerprint(source, data.seed) for source in opened},
            num_shards={source.name: len(source.shards) for source in opened},
            max_bad=data.max_bad,
        )
        return cls(facts, data, opened, global_batch, dp_rank, dp_size, workers, exchange)

    @property
    def meets_ranks(self) -> bool:
        """See `DataStream`: by `exchange`, in every step."""
        return self.dp_size > 1

    def restore(self, data: Mapping[str, Any]) -> UnindexedState:
        """The state that `UnindexedState.to_dict` gave. Raises CheckpointError naming what differs in the data."""
        return UnindexedState.from_dict(data, self.facts)

    def steps(self, state: UnindexedState | None = None) -> Generator[UnindexedStep, None, None]:
        """Steps from `state` on (None = the beginning); close the generator to end its processes and connections.

        Raises:
            DataError: a shard cannot be reached, bad samples beyond the limits, or all sources have ended.

        Distributed: every rank takes the same number of steps; each step brings all ranks together.
        """
        progress = (state or UnindexedState.start(self.facts)).progress
        per_rank = max(1, self.workers)
        reading = Reading(
            self.sources, progress, per_rank * self.dp_size, self.data.seq_len, self.data.max_images_per_pack,
            self.data.max_bad_in_a_row, self.data.seed,
        )  # fmt: skip
        self._say(reading)
        mine = range(self.dp_rank, reading.num_readers, self.dp_size)
        packs = read_stream(reading, mine, self.data.prefetch, self.data.sample_timeout_s, bool(self.workers))
        try:
            while True:
                own = self._own(packs)
                taken, ended = tuple(p for o in own for p in o.taken), tuple(e for o in own for e in o.ended)
                ids = tuple(i for o in own for i in o.batch.ids)
                # ranks that share their data report the same
                reports = {r.dp_rank: r for r in self.exchange(Report(self.dp_rank, ids, taken, ended))}
                ranks = [reports[rank] for rank in range(self.dp_size)]
                ids, taken, ended = (sum(parts, ()) for parts in zip(*(r[1:] for r in ranks), strict=True))
                progress = advance(progress, taken, ended)
                num_epochs = sum(p.num_done for p in progress) / sum(self.facts.num_shards.values())
                yield UnindexedStep(tuple(o.batch for o in own), ids, num_epochs, taken, ended, self.facts)
        finally:
            packs.close()

    def _own(self, packs: Generator[ReadPack, None, None]) -> list[ReadPack]:
        """This rank's packs of the next step."""
        count = self.global_batch // self.dp_size
        own = list(islice(packs, count))
        if len(own) < count:
            raise DataError(
                "data.sources: expected sources that last as long as the run, but those of this rank have reached their max_epochs; "
                "raise max_epochs, or lower train.steps"
            )
        for skip in (skip for pack in own for skip in pack.batch.skipped):
            if self.data.on_error == "raise" and skip.reason not in BY_SIZE:
                raise DataError(
                    f"{skip.id} at offset {skip.offset}: expected a usable sample, found {skip.reason}: {skip.detail}; repair or "
                    "remove it, or set data.on_error=skip"
                )
        return own

    def _say(self, reading: Reading) -> None:
        """What a user must know of this mode, once per start."""
        log.info(
            "stream mode: resume is exact to whole shards only, those in work are read again from their start; index the tars "
            "(mmscale-data index DIR) for exact resume, planned packing and balance"
        )
        for source in self.sources:
            if len(source.shards) < reading.num_readers:
                log.warning(
                    "source '%s' has %d shard(s) for %d readers (ranks x workers): several epochs of it are read at the same time; "
                    "write more and smaller shards, or lower data.workers",
                    source.name, len(source.shards), reading.num_readers,
                )  # fmt: skip


def _check_library() -> None:
    """Imports webdataset before any process is forked, and sees that it may open what it is given."""
    import webdataset.utils

    if webdataset.utils.enforce_security:
        raise ConfigError(
            "WDS_SECURE=1 in the environment keeps the webdataset library from opening files and commands; unset it: of its "
            "decoders none is used, and commands need allow_commands"
        )


def _fingerprint(source: StreamSource, seed: int) -> str:
    parts = [seed, source.encoder.fingerprint, [shard.name for shard in source.shards]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
