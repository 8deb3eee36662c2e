"""Which rows an outer rank sends, gets and attends to: pure functions of the plan, the same on every rank.

Every rank works out its own route from the spans of all ranks, so attention needs no metadata collective.

R outer ranks, each with L rows (tokens); K key rows that one outer rank attends to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from mmscale.kernels.attention.base import Segment, Segments
from mmscale.parallel.sp.layouts import Span
from mmscale.parallel.sp.plan import needed
from mmscale.types import Spans

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KeyRoute:
    """What one outer rank does to have its key rows in one piece, sorted by document and position.

    send_rows   its own rows to send, int64, by receiving rank; empty when all ranks send everything
    send_sizes  how many of them go to each outer rank; 0 for itself
    recv_sizes  how many rows come from each outer rank
    order       int64 [K], for each key row where it stands in what was collected
    segments    which of its queries see which key rows
    """

    send_rows: Ints
    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]
    order: Ints
    segments: Segments


def exchange_route(spans: Spans, rank: int, window: int | None) -> KeyRoute:
    """The route of the sparse exchange: what was collected is the own rows [L], then those received, by sending rank."""
    ranks = range(len(spans))
    others = [other for other in ranks if other != rank]
    own = RowMap(spans[rank])
    sent = [needed(spans, dst, rank, window) if dst != rank else () for dst in ranks]
    got = [span for src in others for span in needed(spans, rank, src, window)]
    send_rows = _rows((own.row(doc, start), end - start) for part in sent for doc, start, end in part)
    held = [*spans[rank], *got]
    order, segments = _sorted_keys(
        spans[rank], held, [*own.starts, *(own.size + n for n in RowMap(got).starts)], window
    )
    recv_sizes = tuple(_size(needed(spans, rank, src, window)) if src != rank else 0 for src in ranks)
    return KeyRoute(send_rows, tuple(map(_size, sent)), recv_sizes, order, segments)


def gather_route(spans: Spans, rank: int, window: int | None) -> KeyRoute:
    """The route of the dense gather: what was collected is the rows of all outer ranks [R * L], in their order."""
    maps = [RowMap(part) for part in spans]
    size = maps[rank].size
    got = [(src, span) for src in range(len(spans)) for span in needed(spans, rank, src, window)]
    starts = [src * size + maps[src].row(doc, start) for src, (doc, start, _) in got]
    order, segments = _sorted_keys(spans[rank], [span for _, span in got], starts, window)
    return KeyRoute(_rows([]), (size,) * len(spans), (size,) * len(spans), order, segments)


def ring_blocks(spans: Spans, rank: int) -> tuple[Segments, ...]:
    """Which queries of `rank` see which rows of rank `rank - hop` (modulo R), by hop.

    Spans of two ranks never overlap, so a query span sees a span of another rank wholly or not at all. Of the own rows it
    sees, bottom-right aligned, all from the first row of its document.
    """
    blocks = []
    for hop in range(len(spans)):
        src = spans[(rank - hop) % len(spans)]
        keys, first = RowMap(src), _first_row(src)
        rows = []
        for (doc, start, end), q_start in zip(spans[rank], RowMap(spans[rank]).starts, strict=True):
            seen = end if hop == 0 else start
            k_start, k_end = first.get(doc, 0), keys.rows_before(doc, seen)
            if doc in first and k_end > k_start:
                rows.append(Segment(q_start, q_start + end - start, k_start, k_end))
        blocks.append(Segments(tuple(rows), causal=hop == 0))
    return tuple(blocks)


class RowMap:
    """Where the tokens of sorted spans stand when the spans are joined to rows."""

    def __init__(self, spans: Sequence[Span]) -> None:
        ends = list(accumulate(end - start for _, start, end in spans))
        self.starts = [0, *ends[:-1]] if ends else []
        self.size = ends[-1] if ends else 0
        self._spans = spans
        self._borders = [(doc, start) for doc, start, _ in spans]

    def row(self, doc: int, position: int) -> int:
        """The row of a token that is there."""
        at = bisect_right(self._borders, (doc, position)) - 1
        assert at >= 0 and self._spans[at][0] == doc and position < self._spans[at][2], "the token is held here"
        return self.starts[at] + position - self._spans[at][1]

    def rows_before(self, doc: int, position: int) -> int:
        """How many rows hold tokens of earlier documents, or of `doc` before `position`."""
        at = bisect_right(self._borders, (doc, position - 1)) - 1
        if at < 0:
            return 0
        held_doc, start, end = self._spans[at]
        return self.starts[at] + (min(end, position) if held_doc == doc else end) - start


def _sorted_keys(
    queries: Sequence[Span], held: Sequence[Span], starts: Sequence[int], window: int | None
) -> tuple[Ints, Segments]:
    """The held spans sorted (where they stand in what was collected: `starts`), and the segments over these key rows.

    What precedes a query in its document, or in its window, is held without gaps: one range of key rows for a span.
    """
    pairs = sorted(zip(held, starts, strict=True))
    keys = RowMap([span for span, _ in pairs])
    rows = []
    for (doc, start, end), q_start in zip(queries, RowMap(queries).starts, strict=True):
        first = 0 if window is None else max(0, start - window + 1)
        k_start = keys.row(doc, first)
        assert keys.row(doc, end - 1) == k_start + end - 1 - first, "keys of a segment are held without gaps"
        rows.append(Segment(q_start, q_start + end - start, k_start, k_start + end - first))
    order = _rows((row, end - start) for (_, start, end), row in pairs)
    return order, Segments(tuple(rows), causal=True, window=window)


def _first_row(spans: Sequence[Span]) -> dict[int, int]:
    """The first row of every document that is held."""
    first: dict[int, int] = {}
    for (doc, _, _), row in zip(spans, RowMap(spans).starts, strict=True):
        first.setdefault(doc, row)
    return first


def _size(spans: Sequence[Span]) -> int:
    return sum(end - start for _, start, end in spans)


def _rows(pieces: Iterable[tuple[int, int]]) -> Ints:
    """`arange(row, row + size)` of every (row, size), joined."""
    parts = [np.arange(row, row + size, dtype=np.int64) for row, size in pieces]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
