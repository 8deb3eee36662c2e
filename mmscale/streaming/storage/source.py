"""What a file or object must offer so that samples are read from it, wherever it lies, and how ranges become long reads."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mmscale.errors import DataError

S = TypeVar("S")
T = TypeVar("T")

Range = tuple[int, int]
"""Offset and size in bytes."""

RETRY_DELAYS_S = (0.1, 0.5, 2.0)
"""Waits before each further try, times a random 0.5 to 1.5 so that many readers do not come back at once."""

MAX_READ_BYTES = 8 << 20
"""Neighbouring ranges are joined up to reads of this size."""


class ByteSource(Protocol):
    """The bytes of one file or object that must not change. Works in forked processes and after pickling."""

    def size(self) -> int:
        """Bytes of the whole file or object."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises DataError with the offset when they cannot be had."""
        ...

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range in the order asked for. Raises DataError like `read`."""
        ...

    def close(self) -> None:
        """Gives back what is open; the next read opens it again."""
        ...


class RemoteSource(ByteSource, Protocol):
    """A source whose reads take long, so that it is worth keeping its bytes."""

    def identity(self) -> str:
        """Text that differs when the bytes may differ: address, size, and what the server says of the version."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """One read of `size` bytes at `offset` that covers the ranges with the numbers `members`."""

    offset: int
    size: int
    members: tuple[int, ...]


def coalesce(ranges: Sequence[Range], gap: int, max_bytes: int = MAX_READ_BYTES) -> list[Block]:
    """The reads that cover all ranges, by offset: near neighbours share one.

    Args:
        ranges: in any order; they may overlap.
        gap: bytes between two ranges up to which reading through is better than reading twice.
        max_bytes: a read ends before it would grow beyond this; a longer range gets a read of its own.

    Example:
        >>> [(b.offset, b.size, b.members) for b in coalesce([(512, 10), (2000, 5), (0, 500)], gap=100)]
        [(0, 522, (2, 0)), (2000, 5, (1,))]
    """
    blocks: list[Block] = []
    start, end, members = 0, 0, list[int]()
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        offset, size = ranges[number]
        if members and (offset - end > gap or max(end, offset + size) - start > max_bytes):
            blocks.append(Block(start, end - start, tuple(members)))
            members = []
        if not members:
            start, end = offset, offset
        end = max(end, offset + size)
        members.append(number)
    if members:
        blocks.append(Block(start, end - start, tuple(members)))
    return blocks


def read_coalesced(
    read: Callable[[int, int], bytes],
    ranges: Sequence[Range],
    gap: int,
    max_bytes: int = MAX_READ_BYTES,
    threads: int = 1,
) -> list[bytes]:
    """The bytes of each range through `read(offset, size)`, joined as `coalesce` says, `threads` reads at a time."""
    blocks = coalesce(ranges, gap, max_bytes)
    out = [b""] * len(ranges)
    for block, data in zip(
        blocks, in_threads(lambda block: read(block.offset, block.size), blocks, threads), strict=True
    ):
        if len(block.members) == 1:
            out[block.members[0]] = data
            continue
        for number in block.members:
            offset, size = ranges[number]
            out[number] = data[offset - block.offset : offset - block.offset + size]
    return out


def in_threads(action: Callable[[S], T], items: Sequence[S], threads: int) -> list[T]:
    """`action` of each item in order, so many at a time. The threads end inside: none is there when the process forks."""
    if threads == 1 or len(items) < 2:
        return [action(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        return list(pool.map(action, items))


def retry(action: Callable[[], T], where: str, failed: OSError | None = None) -> T:
    """What `action` gives, tried again after an OSError: file systems and networks have hiccups.

    Args:
        where: file or object, and the offset where it matters; for the message.
        failed: the error of a first try that the caller has made.

    Raises:
        DataError: every try failed; the text has the number of tries and the last reason.
    """
    error = failed
    if error is None:
        try:
            return action()
        except OSError as e:
            error = e
    for delay_s in RETRY_DELAYS_S:
        time.sleep(delay_s * random.SystemRandom().uniform(0.5, 1.5))
        try:
            return action()
        except OSError as e:
            error = e
    tries, reason = len(RETRY_DELAYS_S) + 1, error.strerror or str(error)
    raise DataError(f"{where}: cannot be read after {tries} tries ({reason}); restore it and start again") from error
