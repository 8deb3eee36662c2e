"""Which tokens of a pack each sequence-parallel rank holds, and which keys it needs from the others.

A plan (`mmscale.types.Spans`) gives every outer rank its sorted, disjoint (document, start, end). It is made once, where the
pack is made, and every rank works out all the rest from it alone: what it holds, what it sends and what it gets.

R outer ranks, U Ulysses ranks inside each, P = U * R, T tokens of the pack with its padding.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import ParallelError
from mmscale.parallel.sp.layouts import Span, contiguous, joined, per_document, zigzag
from mmscale.parallel.sp.planner import planned
from mmscale.types import Spans

Layout = Literal["contiguous", "zigzag", "per_document", "planned"]
Kind = Literal["exchange", "gather", "ring"]
"""How the outer ranks get at each other's keys, see `SequenceAttention`."""
Ints = NDArray[np.int64]

_LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "per_document": per_document, "planned": planned}


def padded_lengths(lengths: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """The document lengths of a pack, and those of its padding: one document more when T is no multiple of `multiple`.

    Example:
        >>> padded_lengths((5, 2), 4)
        (5, 2, 1)
    """
    missing = -sum(lengths) % multiple
    return (*lengths, missing) if missing else lengths


def make_plan(lengths: tuple[int, ...], ranks: int, layout: Layout, multiple: int = 1) -> Spans:
    """The spans of each of `ranks` outer ranks, all of which hold equally many tokens.

    Args:
        lengths: padded document lengths, each >= 1; their sum is a multiple of `ranks * multiple`.
        ranks: R.
        layout: `contiguous` and `zigzag` cut the pack, `per_document` cuts every document into head and tail pieces,
            `planned` chooses for even attention and little exchange.
        multiple: U, into as many equal pieces every rank's tokens are cut further.

    The same on every machine: nothing but integers decides. Raises ParallelError when the tokens cannot be divided.
    """
    total = sum(lengths)
    if ranks < 1 or multiple < 1 or total % (ranks * multiple) or any(n < 1 for n in lengths):
        raise ParallelError(
            f"expected documents of at least 1 token whose sum is a multiple of {ranks} x {multiple} ranks, found {len(lengths)} "
            f"documents of {total} tokens, the shortest {min(lengths, default=0)}, for the layout '{layout}'; "
            "pad the pack with padded_lengths"
        )
    if ranks == 1:
        return (tuple((d, 0, n) for d, n in enumerate(lengths)),)
    return _LAYOUTS[layout](lengths, ranks)


def validate(spans: Spans, lengths: tuple[int, ...]) -> None:
    """Raises ParallelError unless the spans hold every token once, in order, joined, and equally many on every rank."""
    covered = [0] * len(lengths)
    for doc, start, end in sorted(span for own in spans for span in own):
        if not 0 <= doc < len(lengths) or start != covered[doc] or end <= start:
            found = f"document {doc}: {start} to {end} after {covered[doc] if 0 <= doc < len(lengths) else 'none'}"
            raise _wrong(f"every token on one rank, found {found}")
        covered[doc] = end
    if tuple(covered) != tuple(lengths):
        doc = next(d for d, n in enumerate(lengths) if covered[d] != n)
        raise _wrong(f"{lengths[doc]} tokens of document {doc}, found {covered[doc]}")
    tokens = {sum(end - start for _, start, end in own) for own in spans}
    if len(tokens) > 1:
        raise _wrong(f"equally many tokens on every rank, found {min(tokens)} to {max(tokens)}")
    for rank, own in enumerate(spans):
        if list(own) != joined(list(own)):
            raise _wrong(f"sorted and joined spans, found on rank {rank} {own[:4]}")


def _wrong(expected: str) -> ParallelError:
    return ParallelError(f"plan of a pack: expected {expected}; its spans do not belong to this pack, or are damaged")


def rank_index(spans: Spans, lengths: tuple[int, ...], ring_rank: int) -> Ints:
    """The positions in the padded pack that an outer rank holds, int64 [T / R], in its order: by document, then start."""
    own = np.array(spans[ring_rank], np.int64).reshape(-1, 3)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[own[:, 0]] + own[:, 1]
    return _ranges(starts, own[:, 2] - own[:, 1])


def local_index(
    spans: Spans, lengths: tuple[int, ...], ring_rank: int, ulysses_rank: int = 0, ulysses_size: int = 1
) -> Ints:
    """The positions in the padded pack that one sequence rank holds, int64 [T / P]: its piece of the outer rank's."""
    index = rank_index(spans, lengths, ring_rank)
    size = len(index) // ulysses_size
    return index[ulysses_rank * size : (ulysses_rank + 1) * size]


def needed(spans: Spans, dst: int, src: int, window: int | None = None) -> tuple[Span, ...]:
    """The keys held by `src` that some query of `dst` attends to: sorted, disjoint (document, start, end).

    A query at position p of its document attends to the keys up to p, and with a `window` only to those above p - window.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for doc, start, end in spans[dst]:
        first = 0 if window is None else max(0, start - window + 1)
        reach = wanted.setdefault(doc, [])
        if reach and first <= reach[-1][1]:
            reach[-1] = (reach[-1][0], end)
        else:
            reach.append((first, end))
    found: list[Span] = []
    for doc, start, end in spans[src]:
        for first, last in wanted.get(doc, ()):
            low, high = max(start, first), min(end, last)
            if low < high:
                found.append((doc, low, high))
    return tuple(found)


def _ranges(starts: Ints, sizes: Ints) -> Ints:
    """`arange(start, start + size)` of every pair, joined."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()), dtype=np.int64)
