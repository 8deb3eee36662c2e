"""Reads what a run has written down, the newest first: a long run's files are never read from their beginning."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK_BYTES = 1 << 16


def rows_backward(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines from the last to the first; none when there is no such file.

    A line that is no JSON object, such as one that a kill cut off, is left out. A step may come several times: the first that comes
    here is the one that counts.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in lines_backward(file, file.seek(0, os.SEEK_END)):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def rows_of_steps(path: Path, steps: Collection[int]) -> dict[int, dict[str, Any]]:
    """step -> its newest row, for those of `steps` that have one. Cost: reads back to the first of them."""
    wanted, found = set(steps), dict[int, dict[str, Any]]()
    for row in rows_backward(path) if wanted else ():
        step = row.get("step")
        if step in wanted:
            found[step] = row
            wanted.remove(step)
        if not wanted:
            break
    return found


def lines_backward(file: BinaryIO, end: int) -> Iterator[bytes]:
    """The lines of an open file's first `end` bytes from the last to the first; the first one is what stands behind the last line end."""
    start, begun = end, b""
    while start:
        end, start = start, max(0, start - _BLOCK_BYTES)
        file.seek(start)
        # the first may have begun in an earlier block
        begun, *whole = (file.read(end - start) + begun).split(b"\n")
        yield from reversed(whole)
    yield begun
