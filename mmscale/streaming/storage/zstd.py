"""Seekable zstd: independent frames and a table of where each begins, so that a read decompresses only what it needs.

The files stay plain zstd (`zstd -d`). A table is made without decompressing anything, and nothing is decompressed that
says it would grow beyond a frame's limit, or does without having said so.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from mmscale.errors import DataError
from mmscale.streaming.storage.source import ByteSource, Range

FRAME_BYTES = 256 << 10
"""Content of the frames that we write: about 0.8 ms to read one at random, at 1.03 times the size of one single frame."""

MAX_FRAME_BYTES = 1 << 20
MAX_RATIO = 200
"""Content may be so many times its compressed size; text is 5 to 10 times. Judged from `RATIO_FROM_BYTES` on."""
RATIO_FROM_BYTES = 64 << 20

_MAGIC = 0xFD2FB528
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_KEPT_FRAMES = 16
_RAW, _RLE, _RESERVED = 0, 1, 3


@dataclass(frozen=True, eq=False)
class FrameTable:
    """Where frames begin: `file` in the compressed file, `content` in what it holds; uint64 [frames + 1], ends included."""

    file: NDArray[np.uint64]
    content: NDArray[np.uint64]

    @property
    def file_bytes(self) -> int:
        """Size of the compressed file."""
        return int(self.file[-1])

    @property
    def content_bytes(self) -> int:
        """Size of what it holds."""
        return int(self.content[-1])


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class FrameWriter:
    """A file to write to: its content reaches `file` in independent frames with checksums. Close it for the last one."""

    def __init__(self, file: _Writable, level: int = 3) -> None:
        self._file = file
        self._rest = bytearray()
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)

    def write(self, data: bytes) -> int:
        """Takes all of `data`; gives its size."""
        self._rest += data
        while len(self._rest) >= FRAME_BYTES:
            self._file.write(self._compressor.compress(bytes(self._rest[:FRAME_BYTES])))
            del self._rest[:FRAME_BYTES]
        return len(data)

    def close(self) -> None:
        """Writes what is left; leaves the underlying file open."""
        if self._rest:
            self._file.write(self._compressor.compress(bytes(self._rest)))
            self._rest.clear()


def read_frame_table(path: Path) -> FrameTable:
    """The frames of a zstd file by their headers alone.

    Raises:
        DataError: not zstd, cut off, a frame too large for random access or of unknown size (one single frame, as `zstd` and
            `tar` write it), or a bomb.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path}: expected a zstd file, found 0 bytes; remove the file or copy it again")
    file, content = [], [0]
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = 0
        while position < len(data):
            magic = int.from_bytes(data[position : position + 4], "little")
            if magic in _SKIPPABLE:
                position += 8 + int.from_bytes(data[position + 4 : position + 8], "little")
                continue
            if magic != _MAGIC:
                raise DataError(f"{path}: no zstd frame at offset {position}; the file is damaged: copy it again")
            file.append(position)
            size, position = _frame(path, data, position)
            content.append(content[-1] + size)
        if position != len(data):
            raise DataError(f"{path}: cut off at offset {len(data)}; copy it again")
    if content[-1] > max(RATIO_FROM_BYTES, MAX_RATIO * position):
        raise DataError(
            f"{path}: {content[-1]} bytes in a file of {position}, more than {MAX_RATIO} times its size; a shard of samples "
            "is never so: remove it"
        )
    return FrameTable(np.array([*file, position], np.uint64), np.array(content, np.uint64))


def _frame(path: Path, data: mmap.mmap, position: int) -> tuple[int, int]:
    """Content size of the frame at `position`, and where it ends. Its blocks are walked over, not decompressed."""
    head = data[position : position + 18]
    try:
        parameters, header_size = zstandard.get_frame_parameters(head), zstandard.frame_header_size(head)
    except zstandard.ZstdError as e:
        raise DataError(f"{path}: damaged zstd frame at offset {position} ({e}); copy it again") from None
    size = parameters.content_size
    if size > MAX_FRAME_BYTES:  # an unknown size is the largest number
        found = "of unknown size" if size == zstandard.CONTENTSIZE_UNKNOWN else f"of {size} bytes"
        raise DataError(
            f"{path}: expected independent frames of at most {MAX_FRAME_BYTES} bytes, found one {found} at offset {position}; "
            f"samples cannot be read at random from it: mmscale-data reshard {path.parent} --out NEW_FOLDER"
        )
    end, is_last = position + header_size, False
    while not is_last:
        word = int.from_bytes(data[end : end + 3], "little")
        is_last, kind, block = bool(word & 1), word >> 1 & 3, word >> 3
        if end + 3 > len(data) or kind == _RESERVED:
            raise DataError(f"{path}: damaged or cut off zstd frame at offset {position}; copy it again")
        end += 3 + (1 if kind == _RLE else block)
    return size, end + (4 if parameters.has_checksum else 0)


class ZstdFile:
    """The content of a seekable zstd file as a source; the last few frames stay decompressed."""

    def __init__(self, packed: ByteSource, table: FrameTable, where: str) -> None:
        """`packed`: the compressed file; `where`: its name for messages."""
        self._packed = packed
        self._where = where
        self._file: list[int] = table.file.tolist()
        self._content: list[int] = table.content.tolist()
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def size(self) -> int:
        """Bytes of the content."""
        return self._content[-1]

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes of the content from `offset` on. Raises DataError: unreadable or damaged."""
        return self.read_many([(offset, size)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range in the order asked for; every frame is decompressed once."""
        needed = sorted({number for offset, size in ranges for number in self._numbers(offset, size)})
        missing = [number for number in needed if number not in self._kept]
        packed = self._packed.read_many([(self._file[n], self._file[n + 1] - self._file[n]) for n in missing])
        frames = {n: self._kept[n] for n in needed if n in self._kept}
        frames.update((n, self._decompress(n, data)) for n, data in zip(missing, packed, strict=True))
        for number in needed[-_KEPT_FRAMES:]:
            self._kept[number] = frames[number]
            self._kept.move_to_end(number)
        while len(self._kept) > _KEPT_FRAMES:
            self._kept.popitem(last=False)
        return [self._cut(frames, offset, size) for offset, size in ranges]

    def close(self) -> None:
        """Closes the file and drops the decompressed frames."""
        self._kept.clear()
        self._packed.close()

    def _numbers(self, offset: int, size: int) -> range:
        """The frames that hold a range."""
        if offset + size > self._content[-1]:
            raise DataError(f"{self._where}: {size} bytes at offset {offset} of {self._content[-1]}; index it again")
        return (
            range(bisect_right(self._content, offset) - 1, bisect_right(self._content, offset + size - 1))
            if size
            else range(0)
        )

    def _cut(self, frames: dict[int, bytes], offset: int, size: int) -> bytes:
        numbers = self._numbers(offset, size)
        if len(numbers) == 1:
            start = offset - self._content[numbers[0]]
            return frames[numbers[0]][start : start + size]
        joined = b"".join([frames[n] for n in numbers])
        start = offset - self._content[numbers[0]] if size else 0
        return joined[start : start + size]

    def _decompress(self, number: int, data: bytes) -> bytes:
        expected = self._content[number + 1] - self._content[number]
        try:
            # The library allocates what the header says: look at that first.
            if zstandard.get_frame_parameters(data).content_size == expected <= MAX_FRAME_BYTES:
                found = zstandard.ZstdDecompressor().decompress(data, max_output_size=expected)
                if len(found) == expected:
                    return found
            reason = "another size than when it was indexed"
        except zstandard.ZstdError as e:
            reason = str(e)
        raise DataError(
            f"{self._where}: damaged zstd frame at offset {self._file[number]} ({reason}); restore the shard and start again"
        )
