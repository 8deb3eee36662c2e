"""The layouts that follow a rule: contiguous, zigzag over the pack, zigzag over every document."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from mmscale.types import Spans

Span = tuple[int, int, int]
"""(document, start, end) in tokens of the document."""


def contiguous(lengths: tuple[int, ...], ranks: int) -> Spans:
    """Equal pieces of the pack in order. Attention is uneven: whoever holds the end of a long document has most to do."""
    size = sum(lengths) // ranks
    return tuple(tuple(_cut(lengths, rank * size, (rank + 1) * size)) for rank in range(ranks))


def zigzag(lengths: tuple[int, ...], ranks: int) -> Spans:
    """The pack in 2R pieces, of which rank r holds the r-th and the r-th from the end: even for one document alone."""
    size = sum(lengths) // ranks
    front = (size + 1) // 2
    back = size - front
    half = ranks * front
    plan = []
    for rank in range(ranks):
        mirror = half + (ranks - 1 - rank) * back
        head = _cut(lengths, rank * front, (rank + 1) * front)
        plan.append(tuple(joined(head + _cut(lengths, mirror, mirror + back))))
    return tuple(plan)


def per_document(lengths: tuple[int, ...], ranks: int) -> Spans:
    """Zigzag over every document: even attention in every step of a ring.

    A document of n tokens gives each rank two pieces of n // 2R. What remains of it stands at its front and goes whole to
    the rank with most room, or in parts when none has room.
    """
    pieces = [n // (2 * ranks) for n in lengths]
    rests = [(doc, 0, n - 2 * ranks * size) for doc, (n, size) in enumerate(zip(lengths, pieces, strict=True))]
    own: list[list[Span]] = [[] for _ in range(ranks)]
    for (doc, _, rest), size in zip(rests, pieces, strict=True):
        for rank in range(ranks if size else 0):
            for piece in (rank, 2 * ranks - 1 - rank):
                own[rank].append((doc, rest + piece * size, rest + (piece + 1) * size))
    free = [sum(rest for _, _, rest in rests) // ranks] * ranks
    fill_room(own, free, sorted((r for r in rests if r[2]), key=lambda r: (-r[2], r[0])))
    return tuple(tuple(joined(spans)) for spans in own)


def fill_room(own: list[list[Span]], free: list[int], items: Sequence[Span]) -> None:
    """Puts every item on the rank with most room, in parts when it has not enough; changes `own` and `free`."""
    for doc, start, end in items:
        while start < end:
            rank = max(range(len(free)), key=free.__getitem__)
            size = min(free[rank], end - start)
            own[rank].append((doc, start, start + size))
            free[rank] -= size
            start += size


def joined(spans: list[Span]) -> list[Span]:
    """The spans of a rank, sorted, neighbours of a document made one."""
    found: list[Span] = []
    for doc, start, end in sorted(spans):
        if found and found[-1][0] == doc and found[-1][2] == start:
            found[-1] = (doc, found[-1][1], end)
        else:
            found.append((doc, start, end))
    return found


def _cut(lengths: tuple[int, ...], first: int, last: int) -> list[Span]:
    """The positions `first : last` of the pack, as spans."""
    borders = list(accumulate(lengths, initial=0))
    found = []
    doc = bisect_right(borders, first) - 1
    while first < last:
        end = min(last, borders[doc + 1])
        found.append((doc, first - borders[doc], end - borders[doc]))
        first, doc = end, doc + 1
    return found
