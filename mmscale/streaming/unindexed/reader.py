"""One reader: its share of the shards, sample by sample, to documents, to packs. Runs in a loader process, or in the trainer."""

from __future__ import annotations

import bisect
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import NamedTuple

from mmscale.errors import BadSampleError, DataError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import Encoder
from mmscale.streaming.make_pack import MAX_DETAIL
from mmscale.streaming.plan import BY_SIZE, TOO_LONG, TOO_MANY_IMAGES
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.unindexed.progress import End, Partial, Place, Progress, place_of
from mmscale.streaming.unindexed.samples import RawSample, read_shard
from mmscale.streaming.unindexed.urls import ShardUrl
from mmscale.types import EncodedSample, PackedBatch, Skip

log = get_logger(__name__)

BUFFER_PACKS = 16
BUFFER_DOCUMENTS = 256
"""A reader holds documents for so many packs, or so many documents when these fill two packs. Simulated fill on lengths of
chats with images 0.998 at 4k and 0.999 from 8k tokens on, of interleaved pages 0.953 and 0.996: a plan over an index does
better where documents are half a pack long."""

SHUFFLE = 64
"""The document that begins a pack is up to so many places out of the order of the shard."""


class Taken(NamedTuple):
    """What became of a sample: its document, or why there is none."""

    place: Place
    result: EncodedSample | Skip


@dataclass(frozen=True)
class StreamSource:
    """A source: its name in the config, its shards, its share of the samples drawn, and after how many epochs it ends."""

    name: str
    shards: tuple[ShardUrl, ...]
    encoder: Encoder
    share: float
    max_epochs: int | None


@dataclass(frozen=True)
class Reading:
    """What all readers of a run have in common.

    `dealt`: progress by source when the run began; the units that were left then go to the `num_readers` readers in turn.
    """

    sources: tuple[StreamSource, ...]
    dealt: tuple[Progress, ...]
    num_readers: int
    seq_len: int
    max_images_per_pack: int | None
    max_bad_in_a_row: int
    seed: int


@dataclass(frozen=True)
class ReadPack:
    """A finished pack, and what is done once it has been trained on.

    `taken`: the samples that it delivers, and those skipped since the pack before (`batch.skipped`). `ended`: the units whose
    end was found.
    """

    batch: PackedBatch
    taken: tuple[Place, ...]
    ended: tuple[End, ...]


class Reader:
    """Reader number `reader_idx`. `progress`, by source: what it leaves out because it was taken already.

    `at` is told the place and the id of each sample before it is decoded, and None after it.
    """

    def __init__(
        self,
        reading: Reading,
        reader_idx: int,
        progress: Sequence[Progress],
        at: Callable[[tuple[Place, str] | None], None] = lambda _: None,
    ) -> None:
        self._reading = reading
        self._reader_idx = reader_idx
        self._progress = progress
        self._at = at

    def packs(self) -> Iterator[ReadPack]:
        """Packs until every source has ended, endless without `max_epochs`.

        Raises:
            DataError: a shard cannot be reached, or too many samples in a row are bad.
        """
        reading = self._reading
        specs = reading.sources[0].encoder.specs
        rng = random.Random(f"{reading.seed}/{self._reader_idx}")
        buffer = Buffer(reading.seq_len, reading.max_images_per_pack)
        skips: list[tuple[Place, Skip]] = []
        ended: list[End] = []

        def pack() -> ReadPack:
            documents = buffer.take()
            batch = collate([document for _, document in documents], specs)
            batch = replace(batch, skipped=tuple(skip for _, skip in skips))
            done = ReadPack(batch, (*(p for p, _ in documents), *(p for p, _ in skips)), tuple(ended))
            skips.clear()
            ended.clear()
            return done

        for event in self._events():
            if isinstance(event, End):
                ended.append(event)
            elif isinstance(event.result, Skip):
                skips.append((event.place, event.result))
            else:
                buffer.add(event.place, event.result, rng.random() * SHUFFLE)
                while buffer.is_full:
                    yield pack()
        while len(buffer):
            yield pack()

    def _events(self) -> Iterator[Taken | End]:
        """The samples of all sources, each with its share: always the source that lags furthest behind."""
        sources = self._reading.sources
        streams = [self._source(i) for i in range(len(sources))]
        turns = [(1 / source.share, i) for i, source in enumerate(sources)]
        heapify(turns)
        while turns:
            when, i = heappop(turns)
            for event in streams[i]:
                yield event
                if isinstance(event, Taken):
                    heappush(turns, (when + 1 / sources[i].share, i))
                    break

    def _source(self, source_idx: int) -> Iterator[Taken | End]:
        """The samples of this reader's units of one source. Raises DataError when nothing good comes any more."""
        reading, source = self._reading, self._reading.sources[source_idx]
        stop = None if source.max_epochs is None else source.max_epochs * len(source.shards)
        units = islice(reading.dealt[source_idx].remaining(stop), self._reader_idx, None, reading.num_readers)
        bad: deque[Skip] = deque(maxlen=reading.max_bad_in_a_row)
        without = 0
        for unit in units:
            if self._progress[source_idx].is_done(unit):
                continue
            without += 1
            for event in self._unit(source_idx, unit):
                yield event
                result = event.result if isinstance(event, Taken) else None
                if isinstance(result, EncodedSample):
                    without = 0
                    bad.clear()
                elif isinstance(result, Skip) and result.reason not in BY_SIZE:
                    bad.append(result)
                if len(bad) == reading.max_bad_in_a_row:
                    raise DataError(_too_many_bad(source.name, bad))
            if without > len(source.shards):
                raise DataError(
                    f"source '{source.name}': expected a usable sample in {without} shards read one after the other, found none; "
                    "look at the skipped samples above, and at data.seq_len when they are too long"
                )

    def _unit(self, source_idx: int, unit: int) -> Iterator[Taken | End]:
        source = self._reading.sources[source_idx]
        taken = self._progress[source_idx].begun.get(unit, Partial()).taken
        epoch, shard = place_of(unit, len(source.shards), f"{self._reading.seed}/{source.name}")
        total = 0
        for raw in read_shard(source.shards[shard]):
            place = Place(source_idx, unit, total)
            total += 1
            if not taken >> place.number & 1:
                yield Taken(place, self._result(source, place, raw, epoch, source.shards[shard].name))
        yield End(source_idx, unit, total)

    def _result(
        self, source: StreamSource, place: Place, raw: RawSample, epoch: int, shard: str
    ) -> EncodedSample | Skip:
        sample_id = f"{shard}:{raw.key}"
        self._at((place, sample_id))
        try:
            if raw.reason:
                raise BadSampleError(raw.reason, raw.detail)
            document = source.encoder.encode(parse_sample(sample_id, raw.members, raw.offset))
            self._check_inputs(document)
            return document
        except BadSampleError as error:
            reason, detail = error.reason, error.detail
        except MmscaleError:
            raise
        except Exception as error:  # the worker's border: whatever a decoder raises, one sample never ends a run
            reason, detail = "unexpected", f"{type(error).__name__}: {error}"
            log.exception("%s: unexpected failure", sample_id, all_ranks=True)
        finally:
            self._at(None)
        if reason == TOO_LONG and source.encoder.on_long == "error":
            raise DataError(f"{sample_id}: {detail}; raise data.seq_len, or set data.on_long to drop or truncate")
        log.warning("skipped %s at offset %d: %s: %s", sample_id, raw.offset, reason, detail, all_ranks=True)
        return Skip(sample_id, reason, detail[:MAX_DETAIL], raw.offset, source.name, epoch)

    def _check_inputs(self, document: EncodedSample) -> None:
        """Raises BadSampleError when no pack may hold the document."""
        inputs, most = vision_inputs(document), self._reading.max_images_per_pack
        if most is not None and inputs > most:
            raise BadSampleError(TOO_MANY_IMAGES, f"{inputs} tower inputs, data.max_images_per_pack={most}")


class _Waiting(NamedTuple):
    tokens: int
    turn: float
    inputs: int
    place: Place
    document: EncodedSample


class Buffer:
    """Documents that wait for a pack. Each pack begins with the one that waited longest, so that none waits for ever; the
    room is filled with the longest that fit."""

    def __init__(self, seq_len: int, max_inputs: int | None) -> None:
        self._seq_len = seq_len
        self._max_inputs = max_inputs
        self._waiting: list[_Waiting] = []  # by tokens, then turn
        self._tokens = self._arrived = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether there is enough to choose from."""
        packs = self._tokens / self._seq_len
        return packs >= BUFFER_PACKS or (packs >= 2 and len(self) >= BUFFER_DOCUMENTS)

    def add(self, place: Place, document: EncodedSample, delay: float) -> None:
        """Adds a document of at most `seq_len` tokens. `delay`: how many arrivals later its turn may come."""
        self._arrived += 1
        self._tokens += len(document)
        waiting = _Waiting(len(document), self._arrived + delay, vision_inputs(document), place, document)
        bisect.insort(self._waiting, waiting)

    def take(self) -> list[tuple[Place, EncodedSample]]:
        """The documents of the next pack, at least one."""
        i = min(range(len(self)), key=lambda i: self._waiting[i].turn)
        room, inputs, found = self._seq_len, self._max_inputs, list[_Waiting]()
        while i >= 0:
            if not found or inputs is None or self._waiting[i].inputs <= inputs:
                one = self._waiting.pop(i)
                found.append(one)
                room -= one.tokens
                inputs = None if inputs is None else inputs - one.inputs
                i = bisect.bisect_right(self._waiting, room, key=lambda w: w.tokens)
            i -= 1
        self._tokens -= sum(one.tokens for one in found)
        return [(one.place, one.document) for one in found]


def vision_inputs(document: EncodedSample) -> int:
    """Inputs of the vision tower in a document: images, tiles and frames."""
    return sum(len(item.data) for item in document.media if item.modality != "audio")


def _too_many_bad(name: str, bad: Sequence[Skip]) -> str:
    last = "; ".join(f"{skip.id}: {skip.reason}" for skip in list(bad)[-3:])
    return (
        f"source '{name}': expected good samples, found {len(bad)} bad ones in a row, the last: {last}; repair the shards, or "
        "raise data.max_bad_in_a_row"
    )
