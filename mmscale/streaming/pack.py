"""Documents into packs of a fixed number of tokens, and how evenly packs of some cost keep ranks busy."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Packs:
    """Some packs of documents: pack p holds the documents `documents[starts[p]:starts[p + 1]]`, at least one.

    `documents` int64 [n] points into whatever was packed, `starts` int64 [packs + 1].
    """

    documents: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, packs: Sequence[int] | NDArray[Any]) -> Packs:
        """Some of the packs, in the order asked for."""
        sizes = self.sizes[packs]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return Packs(self.documents[np.repeat(self.starts[:-1][packs], sizes) + within], starts)

    @property
    def sizes(self) -> Ints:
        """Documents of each pack, int64 [packs]."""
        return np.diff(self.starts)

    def sums(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum of `values` (one per document that was packed) over each pack."""
        return np.add.reduceat(values[self.documents], self.starts[:-1]) if len(self) else values[:0]

    def lists(self) -> list[list[int]]:
        """The packs as lists of documents."""
        return [part.tolist() for part in np.split(self.documents, self.starts[1:-1])] if len(self) else []


def pack_documents(
    lengths: NDArray[Any], capacity: int, inputs: NDArray[Any] | None = None, max_inputs: int | None = None
) -> Packs:
    """Full packs: each sums to at most `capacity` tokens and `max_inputs` tower inputs, each document is in exactly one.

    A pack at a time. It begins with documents in the order given, so that what is packed together is mixed, as long as it has
    room for more than the two longest that are left; then the longest that still fits goes in next, again and again, and
    leaves the short ones for the gaps. With a limit on inputs it is all along the one with the largest share of what is left
    of both.

    Args:
        lengths: [n] tokens per document, each in `[1, capacity]`.
        capacity: tokens per pack.
        inputs: [n] tower inputs per document, each at most `max_inputs`.
        max_inputs: per pack; None = no limit.

    Cost: O(n log n), about 0.7 us per document, times the number of different `inputs` under a limit.

    Example:
        >>> pack_documents(np.array([3, 5, 4, 2]), 7).lists()
        [[1, 3], [2, 0]]
    """
    if inputs is None or max_inputs is None:
        return _fill_packs(lengths, capacity)
    shelves = []
    for count in np.unique(inputs).tolist():
        members = np.flatnonzero(inputs == count)
        shelves.append(_Shelf(count, members, lengths[members]))
    return _fill_limited_packs(shelves, len(lengths), capacity, max_inputs)


class _Shelf:
    """Documents with the same number of inputs, by length from the longest down; taken one by one.

    `after[j]` leads from length number j towards the next one, in this order, of which documents are left.
    """

    def __init__(self, inputs: int, members: Ints, lengths: NDArray[Any]) -> None:
        self.inputs = inputs
        order = np.argsort(-lengths.astype(np.int64), kind="stable")
        self.members: list[int] = members[order].tolist()
        distinct, first = np.unique(-lengths[order].astype(np.int64), return_index=True)
        self.negative: list[int] = distinct.tolist()
        self.next: list[int] = first.tolist()
        self.end: list[int] = [*self.next[1:], len(self.members)]
        self.after = list(range(len(distinct) + 1))

    def find(self, room: int) -> int:
        """The number of the longest length of at most `room` tokens; `len(self.negative)` when there is none."""
        after = self.after
        j = bisect_left(self.negative, -room)
        while (further := after[j]) != j:
            after[j] = j = after[further]  # a shorter way for the next search
        return j

    def has_left(self, j: int) -> bool:
        """Whether a document of length number `j` is left."""
        return self.next[j] < self.end[j]

    def take(self, j: int) -> int:
        """The next document of length number `j`."""
        i = self.next[j]
        self.next[j] = i + 1
        if i + 1 == self.end[j]:
            self.after[j] = j + 1
        return self.members[i]


def _fill_packs(lengths: NDArray[Any], capacity: int) -> Packs:
    shelf = _Shelf(0, np.arange(len(lengths)), lengths)
    find, take, left, negative, none = shelf.find, shelf.take, shelf.has_left, shelf.negative, len(shelf.negative)
    # The length numbers of all documents in the order given: whoever comes next is of this length.
    coming = iter(np.searchsorted(np.array(negative), -lengths.astype(np.int64)).tolist())
    documents: list[int] = []
    starts = [0]
    while len(documents) < len(lengths):
        room, two_longest = capacity, -2 * negative[find(capacity)]
        while room > two_longest and (j := next(coming, none)) != none:
            if left(j):
                documents.append(take(j))
                room += negative[j]
        while (j := find(room)) != none:
            documents.append(take(j))
            room += negative[j]
        starts.append(len(documents))
    return Packs(np.array(documents, np.int64), np.array(starts, np.int64))


def _fill_limited_packs(shelves: Sequence[_Shelf], total: int, capacity: int, max_inputs: int) -> Packs:
    documents: list[int] = []
    starts = [0]
    while len(documents) < total:
        room, slots = capacity, max_inputs
        while True:
            best, chosen = -1, None
            for shelf in shelves:
                if shelf.inputs > slots:
                    break  # they stand in ascending order
                j = shelf.find(room)
                if j == len(shelf.negative):
                    continue
                # what a document takes of each resource weighs by how much of that is left: the two run out together
                score = -shelf.negative[j] * room * max_inputs**2 + shelf.inputs * slots * capacity**2
                if score > best:
                    best, chosen = score, (shelf, j)
            if chosen is None:
                break
            shelf, j = chosen
            documents.append(shelf.take(j))
            room, slots = room + shelf.negative[j], slots - shelf.inputs
        starts.append(len(documents))
    return Packs(np.array(documents, np.int64), np.array(starts, np.int64))


def cost_imbalance(costs: Sequence[float] | NDArray[Any], num_ranks: int) -> tuple[float, float]:
    """Dearest pack / mean pack among those that `num_ranks` ranks work on side by side: (mean over turns, worst turn).

    Args:
        costs: [packs] in the order of the plan, at least `num_ranks` of them; an incomplete last turn is left out.

    Example:
        >>> cost_imbalance([2, 2, 3, 1, 9], 2)
        (1.25, 1.5)
    """
    values = np.asarray(costs, np.float64)
    turns = values[: len(values) // num_ranks * num_ranks].reshape(-1, num_ranks)
    ratios = turns.max(1) / turns.mean(1)
    return float(ratios.mean()), float(ratios.max())
