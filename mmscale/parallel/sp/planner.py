"""The planned layout: even attention and few exchanged keys, with equal tokens on all ranks.

A rank has two budgets, its tokens and its share of the attention. Short documents stay whole. The others are cut from both
ends: a head of x and a tail of m - x tokens cost less the larger x is, so a rank that has room for m tokens and is short of
some cost gets both exactly. What needs less cost than the longest document gives on average also takes from the shortest.
Several such plans are made and the best is kept. Integers only, so that every machine finds the same.

Attention counts as full: that of layers with a sliding window, which costs little, is less even.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmscale.parallel.sp.layouts import Span, joined, per_document, zigzag
from mmscale.parallel.sp.measures import attention_cost, kv_tokens, pairs
from mmscale.types import Spans

_LEANS = (4, 1, 8)
"""How far a head may outweigh its tail before a second document is cut, in eighths of both: less keeps middles usable."""
_EFFORT = 4000
"""Documents and four times the ranks, over all candidates of a pack: planning takes milliseconds however many there are."""


@dataclass(slots=True)
class _Part:
    """What a rank holds so far, and its room: `free` tokens and `need` (query, key) pairs."""

    free: int
    need: int
    spans: list[Span] = field(default_factory=list)

    def put(self, doc: int, start: int, end: int) -> None:
        """Gives the rank the tokens `start : end` of a document."""
        if start < end:
            self.spans.append((doc, start, end))
            self.free -= end - start
            self.need -= pairs(start, end)


@dataclass(slots=True)
class _Middle:
    """What is left of a document of which heads and tails are gone."""

    doc: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def density(self) -> int:
        """Twice the mean pairs of a token."""
        return self.start + self.end + 1


def planned(lengths: tuple[int, ...], ranks: int) -> Spans:
    """The best of some plans by attention of the busiest rank + 0.15 x most exchanged rows, each relative to its mean or whole.

    At most two spans of a document on a rank, which kernels take in two launches, unless attention would then be more than
    10 % above its mean; then the most even plan is taken, whatever its layout.
    """
    size, total = sum(lengths) // ranks, sum(pairs(0, n) for n in lengths)
    best: tuple[int, Spans] | None = None
    plans = []
    for plan in _candidates(lengths, ranks):
        plans.append(plan)
        worst = max(attention_cost(plan))
        if worst * ranks * 10 > total * 11:
            continue
        rows = max(map(max, kv_tokens(plan)))
        score = worst * 20 * (ranks - 1) * size + rows * 3 * (total // ranks)
        if best is None or score < best[0]:
            best = (score, plan)
        if worst * ranks * 200 <= total * 201 and rows * 100 <= (ranks - 1) * size:
            break  # nothing better to be had: within 0.5 % of even, and 1 % of the rows
    if best is not None:
        return best[1]
    return min(
        [*plans, per_document(lengths, ranks), zigzag(lengths, ranks)], key=lambda plan: max(attention_cost(plan))
    )


def _candidates(lengths: tuple[int, ...], ranks: int) -> Iterator[Spans]:
    """Plans that differ in how many documents may be cut, and in when a second one is."""
    longest_first = sorted(range(len(lengths)), key=lambda doc: (-lengths[doc], doc))
    counts = [0, len(lengths), ranks // 2, ranks, ranks // 4, 2 * ranks, ranks * 3 // 4, 4 * ranks]
    counts = [n for i, n in enumerate(counts) if n <= len(lengths) and n not in counts[:i]]
    options = [(count, lean) for lean in _LEANS for count in counts]
    for count, lean in options[: max(4, _EFFORT // (len(lengths) + 4 * ranks))]:
        yield _plan(lengths, ranks, longest_first, count, lean)


def _plan(lengths: tuple[int, ...], ranks: int, longest_first: list[int], num_cut: int, lean: int) -> Spans:
    total = sum(pairs(0, n) for n in lengths)
    parts = [_Part(sum(lengths) // ranks, total // ranks) for _ in range(ranks)]
    cut = longest_first[:num_cut] + _place_whole(lengths, longest_first[num_cut:], parts)
    middles = deque(_Middle(doc, 0, lengths[doc]) for doc in sorted(cut, key=lambda doc: (-lengths[doc], doc)))
    for part in parts:
        while part.free:
            _take(part, middles, lean)
    return tuple(tuple(joined(part.spans)) for part in parts)


def _place_whole(lengths: tuple[int, ...], docs: list[int], parts: list[_Part]) -> list[int]:
    """Gives each document to the rank with most room, in pairs first and in tokens too; returns those that fit nowhere."""
    size, share = parts[0].free, parts[0].need

    def room(rank: int) -> int:
        return 2 * parts[rank].need * size + parts[rank].free * share

    heap = [(-room(rank), rank) for rank in range(len(parts))]
    homeless = []
    for doc in docs:
        n, full = lengths[doc], []
        while heap and parts[heap[0][1]].free < n:
            full.append(heapq.heappop(heap))
        if heap:
            rank = heap[0][1]
            parts[rank].put(doc, 0, n)
            heapq.heapreplace(heap, (-room(rank), rank))
        else:
            homeless.append(doc)
        for entry in full:
            heapq.heappush(heap, entry)
    return homeless


def _take(part: _Part, middles: deque[_Middle], lean: int) -> None:
    """One more piece for a rank with room: from the longest document, unless that is too dear for what it still needs."""
    long, short = middles[0], middles[-1]
    if long is not short and 2 * part.need < part.free * long.density:
        gap = long.density - short.density
        wanted = min((part.free * long.density - 2 * part.need) // gap, part.free) if gap > 0 else 0
        if wanted >= short.size:
            part.put(short.doc, short.start, short.end)
            middles.pop()
            return
        if wanted and part.free - wanted < long.size and _head(part, long) * 16 > part.free * (8 + lean):
            _take_ends(part, short, (wanted + 1) // 2, wanted // 2)
    if part.free >= long.size:
        part.put(long.doc, long.start, long.end)
        middles.popleft()
        return
    head = min(max(_head(part, long), 0), part.free)
    _take_ends(part, long, head, part.free - head)


def _head(part: _Part, long: _Middle) -> int:
    """Tokens of the head, so that head and tail fill the rank's tokens and its need of pairs; outside 0..free: impossible.

    With all of it as tail the pairs are most; every token moved to the head saves as many pairs as lie between the two.
    """
    between = long.size - part.free
    return (pairs(long.end - part.free, long.end) - part.need) // between if between > 0 else part.free + 1


def _take_ends(part: _Part, middle: _Middle, head: int, tail: int) -> None:
    part.put(middle.doc, middle.start, middle.start + head)
    part.put(middle.doc, middle.end - tail, middle.end)
    middle.start += head
    middle.end -= tail
