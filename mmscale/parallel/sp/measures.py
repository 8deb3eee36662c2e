"""What a plan costs: attention of each rank, and the key/value rows that it sends and gets."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from mmscale.types import Spans


def pairs(start: int, end: int) -> int:
    """(query, key) pairs of the queries `start : end` of a document: each attends to itself and to all before it."""
    return (end * (end + 1) - start * (start + 1)) // 2


def attention_cost(spans: Spans) -> tuple[int, ...]:
    """(query, key) pairs that each rank computes."""
    return tuple(sum(pairs(start, end) for _, start, end in own) for own in spans)


def balance(spans: Spans) -> float:
    """Attention of the busiest rank over the mean: so much longer it takes than even attention (0 for an empty pack)."""
    costs = attention_cost(spans)
    return max(costs) * len(costs) / max(1, sum(costs))


def kv_tokens(spans: Spans) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Key/value rows that each rank (sends, gets) in a sparse exchange: all that some query needs, and no others.

    The same figures as by `plan.needed` for every pair of ranks, in time linear in the spans but for a logarithm.
    """
    sent, got = [0] * len(spans), [0] * len(spans)
    for holders in _shared_documents(spans).values():
        reach = sorted(max(end for _, end in own) for own in holders.values())
        below = list(accumulate(reach, initial=0))

        def rows_before(position: int, reach: list[int] = reach, below: list[int] = below) -> int:
            """How many rows before `position` all ranks of this document need together, their own included."""
            short = bisect_right(reach, position)
            return below[short] + position * (len(reach) - short)

        for rank, own in holders.items():
            held = sum(end - start for start, end in own)
            got[rank] += max(end for _, end in own) - held
            sent[rank] += sum(rows_before(end) - rows_before(start) for start, end in own) - held
    return tuple(sent), tuple(got)


def kv_traffic(spans: Spans) -> float:
    """The most rows that a rank sends or gets in a sparse exchange, over those of a gather of everything."""
    ranks = len(spans)
    if ranks == 1:
        return 0.0
    sent, got = kv_tokens(spans)
    size = sum(end - start for _, start, end in spans[0])
    return max(*sent, *got) / ((ranks - 1) * size) if size else 0.0


def _shared_documents(spans: Spans) -> dict[int, dict[int, list[tuple[int, int]]]]:
    """document -> rank -> its (start, end), of the documents that several ranks hold."""
    documents: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for rank, own in enumerate(spans):
        for doc, start, end in own:
            documents.setdefault(doc, {}).setdefault(rank, []).append((start, end))
    return {doc: holders for doc, holders in documents.items() if len(holders) > 1}
