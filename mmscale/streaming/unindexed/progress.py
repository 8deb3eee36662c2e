"""How far a source has been read: whole shards, and of the shards that were begun every sample by its number.

The shards of a source form one endless list, epoch after epoch in an order that the seed decides; a *unit* is a place in
that list. So progress is a number, and a little about the units above it that readers have begun or finished out of turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from mmscale.streaming.permute import permute


class Place(NamedTuple):
    """Where a sample stands: its source, the unit and its number in that shard."""

    source_idx: int
    unit: int
    number: int


class End(NamedTuple):
    """A unit was read to its end and has `total` samples."""

    source_idx: int
    unit: int
    total: int


@dataclass(frozen=True)
class Partial:
    """A unit that was begun. Bit i of `taken`: the sample with number i was delivered or skipped. `total`: how many there
    are, None until the shard's end was seen."""

    taken: int = 0
    total: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether every sample was taken."""
        whole = -1 if self.total is None else (1 << self.total) - 1
        return whole >= 0 and self.taken & whole == whole


@dataclass(frozen=True)
class Progress:
    """All units below `next` are done, and those in `done`; `begun` has the others that were begun."""

    next: int = 0
    done: frozenset[int] = frozenset()
    begun: Mapping[int, Partial] = field(default_factory=dict)

    @property
    def num_done(self) -> int:
        """Units read to their end."""
        return self.next + len(self.done)

    def is_done(self, unit: int) -> bool:
        """Whether every sample of a unit was taken."""
        return unit < self.next or unit in self.done

    def remaining(self, stop: int | None) -> Iterator[int]:
        """The units that are not done, in order, endless when `stop` is None."""
        units = count(self.next) if stop is None else range(self.next, stop)
        return (unit for unit in units if unit not in self.done)

    def after(self, taken: Iterable[tuple[int, int]], ended: Iterable[tuple[int, int]]) -> Progress:
        """Progress when some samples were taken.

        Args:
            taken: (unit, number of the sample).
            ended: (unit, how many samples it has).
        """
        begun = dict(self.begun)
        for unit, number in taken:
            part = begun.get(unit, Partial())
            begun[unit] = replace(part, taken=part.taken | 1 << number)
        for unit, total in ended:
            begun[unit] = replace(begun.get(unit, Partial()), total=total)
        finished = {unit for unit, part in begun.items() if part.is_done}
        done, first = set(self.done | finished), self.next
        while first in done:
            done.remove(first)
            first += 1
        return Progress(first, frozenset(done), {u: part for u, part in begun.items() if u not in finished})

    def to_dict(self) -> dict[str, Any]:
        """Progress as JSON values: bits as hexadecimal text, without what is all ones in front."""
        done = sum(1 << unit - self.next for unit in self.done)
        begun = {str(u): [*_coded(part.taken), part.total] for u, part in sorted(self.begun.items())}
        return {"next": self.next, "done": f"{done:x}", "begun": begun}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """What `to_dict` wrote. Raises KeyError, TypeError or ValueError when it is something else."""
        first, done = int(data["next"]), int(data["done"], 16)
        begun = {
            int(unit): Partial((1 << full) - 1 | int(rest, 16) << full, None if total is None else int(total))
            for unit, (full, rest, total) in data["begun"].items()
        }
        return cls(first, frozenset(first + i for i in range(done.bit_length()) if done >> i & 1), begun)


def advance(progress: Sequence[Progress], taken: Sequence[Place], ended: Sequence[End]) -> tuple[Progress, ...]:
    """Progress by source when some samples were taken and the ends of some units found."""
    return tuple(
        before.after(
            [(place.unit, place.number) for place in taken if place.source_idx == i],
            [(end.unit, end.total) for end in ended if end.source_idx == i],
        )
        for i, before in enumerate(progress)
    )


def place_of(unit: int, num_shards: int, key: str) -> tuple[int, int]:
    """(epoch, shard) of a unit; every epoch has each shard once, in an order of its own.

    Args:
        key: the seed and the source's name.

    Example:
        >>> sorted(place_of(unit, 3, "seed 0")[1] for unit in range(3, 6))
        [0, 1, 2]
    """
    epoch, position = divmod(unit, num_shards)
    return epoch, int(permute(np.array([position], np.int64), num_shards, f"{key}/{epoch}")[0])


def _coded(bits: int) -> tuple[int, str]:
    """How many ones stand in front, and the rest."""
    full = (~bits & bits + 1).bit_length() - 1
    return full, f"{bits >> full:x}"
