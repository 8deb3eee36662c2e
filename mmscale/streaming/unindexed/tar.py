"""The members of a tar as they come from a pipe or a server: one pass forward, nothing trusted, no silent end.

The same rules as `mmscale.streaming.tar`, which has the whole file before it: every header's checksum, sizes against the
bytes that really come, the end marker, only zeros behind it. gzip and zstd are opened by content; what grows too far is refused.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

from mmscale.errors import DataError
from mmscale.streaming.storage.zstd import MAX_RATIO, RATIO_FROM_BYTES
from mmscale.streaming.tar import (
    BLOCK,
    DIRECTORY,
    EXTENDED,
    MAX_EXTENDED_BYTES,
    Extended,
    Member,
    as_member,
    read_extended,
    read_header,
)

HEAD_BYTES = 128
"""What is given of a payload that nobody asked for: enough to tell what it is."""

_PIECE_BYTES = 1 << 20
_MAX_ZSTD_WINDOW = 128 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class Readable(Protocol):
    """A file of which only the next bytes can be had."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer at the end."""
        ...


def read_members(stream: Readable, shard: str, keep: Callable[[Member], bool]) -> Iterator[tuple[Member, bytes]]:
    """Every member in order with its payload, or with the first HEAD_BYTES of one that `keep` does not want or has a fault.

    Args:
        stream: a plain, gzip or zstd tar; read to its end.
        shard: for messages.

    Raises:
        DataError: damaged, cut off, empty, not a tar, or decompressed beyond MAX_RATIO; the members before it were given.
        OSError: the stream cannot be read.
    """
    data = _Content(stream, shard)
    extended, is_empty = Extended(), True
    while True:
        position = data.position
        header = data.read(BLOCK)
        if len(header) == BLOCK and not header.strip(b"\0"):
            break
        kind, size = read_header(shard, header, position, data.position)
        if kind in EXTENDED:
            body = data.payload(size, size) if size <= MAX_EXTENDED_BYTES else None
            if body is None:
                data.payload(size, 0)
            read_extended(shard, kind, body, position, extended)
            continue
        size = size if extended.size is None else extended.size
        member = as_member(header, kind, data.position, size, extended)
        extended = Extended()
        payload = data.payload(size, size if not member.fault and keep(member) else HEAD_BYTES)
        if kind != DIRECTORY:
            is_empty = False
            yield member, payload
    data.expect_end()
    if is_empty:
        raise DataError(
            f"{shard}: expected the files of samples, found a tar without any; write it again, or remove it"
        )


class _Content:
    """What a stream holds once decompressed, and how far it has been read."""

    def __init__(self, stream: Readable, shard: str) -> None:
        self.position = 0
        self._shard = shard
        self._input = _Input(stream)
        self._file: Readable = self._input
        if self._input.head.startswith(_GZIP):
            self._file = gzip.GzipFile(fileobj=self._input, mode="rb")  # type: ignore[call-overload]
        elif self._input.head == _ZSTD:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
            self._file = decompressor.stream_reader(self._input, read_across_frames=True)  # type: ignore[arg-type]

    def read(self, size: int) -> bytes:
        """The next `size` bytes (at most _PIECE_BYTES), fewer only at the end."""
        try:
            data = self._file.read(size)
            while 0 < len(data) < size and (more := self._file.read(size - len(data))):
                data += more
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
            raise DataError(
                f"{self._shard}: cannot be decompressed behind byte {self.position} ({error}); copy it again"
            ) from None
        self.position += len(data)
        if self.position > max(RATIO_FROM_BYTES, MAX_RATIO * self._input.count):
            raise DataError(
                f"{self._shard}: {self._input.count} bytes decompress to more than {self.position}, {MAX_RATIO} times is the "
                "most for an honest shard; it is not read on: look where it comes from"
            )
        return data

    def payload(self, size: int, keep: int) -> bytes:
        """The first `keep` bytes of the next `size`, which are read with their padding."""
        start, kept, left = self.position, bytearray(), -(-size // BLOCK) * BLOCK
        while left:
            data = self.read(min(left, _PIECE_BYTES))
            if not data:
                raise DataError(
                    f"{self._shard}: the member at offset {start - BLOCK} has {size} bytes, but the stream ends after "
                    f"{self.position - start} of them; the shard is cut off: copy it again"
                )
            kept += data[: max(0, min(size, keep) - len(kept))]
            left -= len(data)
        return bytes(kept)

    def expect_end(self) -> None:
        """Refuses anything but zeros up to the end: a zeroed header in the middle must not hide what follows."""
        position = self.position
        while data := self.read(_PIECE_BYTES):
            if data.strip(b"\0"):
                raise DataError(
                    f"{self._shard}: data follows the end marker at offset {position - BLOCK}; the shard is damaged or made of "
                    "several tars joined: write it again as one tar"
                )


class _Input:
    """The bytes as they arrive, counted; `head` are the first ones, read ahead."""

    def __init__(self, stream: Readable) -> None:
        self.count = 0
        self.head = stream.read(4)
        self._ahead = self.head
        self._stream = stream

    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes, fewer at the end."""
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            data += self._stream.read(size - len(data))
        self.count += len(data)
        return data
