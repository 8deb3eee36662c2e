"""Whether boxes make up a tensor: every element in exactly one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Box:
    """The elements from `offsets` on, `sizes` of them along each dimension; a scalar's box has no dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """How many elements lie in the box."""
        return math.prod(self.sizes)

    def overlaps(self, other: Box) -> bool:
        """True when both boxes have an element in common."""
        if not (self.num_elements and other.num_elements):
            return False
        pairs = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        return all(a < b + n and b < a + m for a, m, b, n in pairs)

    def is_inside(self, whole: Sequence[int]) -> bool:
        """True when the box lies in a tensor of this shape."""
        if not len(self.offsets) == len(self.sizes) == len(whole):
            return False
        return all(a >= 0 and m >= 0 and a + m <= w for a, m, w in zip(self.offsets, self.sizes, whole, strict=True))


def coverage_problem(whole: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should make up a tensor of shape `whole`; None when each element is in exactly one.

    Cost: sorts the boxes, then compares each with those that it meets along one dimension.

    Example:
        >>> coverage_problem((4, 2), [Box((0, 0), (3, 2)), Box((3, 0), (1, 2))]) is None
        True
        >>> coverage_problem((4, 2), [Box((0, 0), (3, 2))])
        '6 of 8 elements'
    """
    for box in boxes:
        if not box.is_inside(whole):
            return f"a chunk of shape {list(box.sizes)} at {list(box.offsets)}, which is outside"
    pair = _overlap(boxes)
    if pair is not None:
        first, second = pair
        return (
            f"the chunks {list(first.sizes)} at {list(first.offsets)} and {list(second.sizes)} at {list(second.offsets)}, "
            "which overlap"
        )
    if not boxes:
        return "no chunk"
    found, wanted = sum(box.num_elements for box in boxes), math.prod(whole)
    return None if found == wanted else f"{found} of {wanted} elements"


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    filled = [box for box in boxes if box.num_elements]
    if not filled:
        return None
    if not filled[0].sizes:
        return (filled[0], filled[1]) if len(filled) > 1 else None
    # the dimension with most cuts: fewest boxes meet along it
    dim = max(range(len(filled[0].sizes)), key=lambda d: len({box.offsets[d] for box in filled}))
    met: list[Box] = []
    for box in sorted(filled, key=lambda b: b.offsets[dim]):
        met = [other for other in met if other.offsets[dim] + other.sizes[dim] > box.offsets[dim]]
        for other in met:
            if box.overlaps(other):
                return other, box
        met.append(box)
    return None
