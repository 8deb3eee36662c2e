"""A planned pack to a finished one: read, decode, collate. A sample that fails becomes filler of its planned length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mmscale.errors import BadSampleError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import Encoder
from mmscale.streaming.plan import Draw, Pack
from mmscale.streaming.shards import ShardSet
from mmscale.types import EncodedSample, PackedBatch, Sample, Skip, Spans

log = get_logger(__name__)

Divide = Callable[[tuple[int, ...]], Spans]
"""Document lengths of a pack to how sequence parallelism divides it."""

MAX_DETAIL = 500
"""Characters that are kept of a skip's detail."""


@dataclass(frozen=True)
class Source:
    """An opened source: its name in the config, its shards, and how its samples become documents."""

    name: str
    shards: ShardSet
    encoder: Encoder


class Fault(NamedTuple):
    """Why a document is not tried again: the reason and the detail of its skip."""

    reason: str
    detail: str


def make_pack(
    sources: Sequence[Source],
    pack: Pack,
    faults: Mapping[int, Fault] | None = None,
    at: Callable[[int], None] = lambda _document: None,
    divide: Divide | None = None,
) -> PackedBatch:
    """The finished pack, whose documents have the order and the lengths of the plan whatever happens.

    Args:
        sources: what `Draw.source_idx` points into.
        pack: at least one document.
        faults: documents, by their number in the pack, that become filler without being looked at.
        at: is told the number of each document before it is decoded, and -1 after the last.
        divide: plans `PackedBatch.spans`; None = the pack is not divided.

    Raises:
        DataError: a shard has changed or cannot be read.
    """
    samples = _read(sources, pack, faults or {})
    documents, skips = list[EncodedSample](), list[Skip]()
    for i, draw in enumerate(pack):
        at(i)
        # popped, so that the bytes of a sample do not outlive their use
        documents.append(_document(sources[draw.source_idx], draw, samples.pop(i), skips))
    at(-1)
    return divided(collate(documents, sources[0].encoder.specs, skips), divide)


def divided(pack: PackedBatch, divide: Divide | None) -> PackedBatch:
    """The pack with its `spans`."""
    return pack if divide is None else replace(pack, spans=divide(pack.lengths))


def _read(sources: Sequence[Source], pack: Pack, faults: Mapping[int, Fault]) -> dict[int, Sample | BadSampleError]:
    """Each document's sample, or why it cannot be used; all rows of a source are read at once."""
    samples: dict[int, Sample | BadSampleError] = {i: BadSampleError(*fault) for i, fault in faults.items()}
    for source_idx in dict.fromkeys(draw.source_idx for draw in pack):
        wanted = [i for i, draw in enumerate(pack) if draw.source_idx == source_idx and i not in faults]
        rows = sources[source_idx].shards.read_many([pack[i].row for i in wanted])
        samples.update(zip(wanted, rows, strict=True))
    return samples


def _document(source: Source, draw: Draw, sample: Sample | BadSampleError, skips: list[Skip]) -> EncodedSample:
    try:
        if isinstance(sample, BadSampleError):
            raise sample
        document = source.encoder.encode(sample)
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
    skip = Skip(sample_id, reason, detail[:MAX_DETAIL], offset, source.name, draw.epoch)
    log.warning("skipped %s at offset %d: %s: %s", sample_id, offset, reason, skip.detail, all_ranks=True)
    skips.append(skip)
    return source.encoder.filler(sample_id, draw.tokens)
