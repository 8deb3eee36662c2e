"""Ranges of a local file by pread: no seek, no shared position, safe to use from forked processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmscale.errors import DataError
from mmscale.streaming.storage.source import Range, read_coalesced, retry

_JOIN_BYTES = 64 << 10
"""Members of one read together, at most: a longer copy costs more than the system call that it saves."""

_GAP_BYTES = 1 << 10
"""A tar header and the padding before it."""


class LocalFile:
    """A local file as a source. Opened at the first read; another size than expected is an error then."""

    def __init__(self, path: Path, expected_size: int) -> None:
        self._fd: int | None = None
        self.path = path
        self._expected_size = expected_size

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        self.close()

    def size(self) -> int:
        """Bytes of the file as it is now. Raises DataError when it cannot be looked at."""
        try:
            return self.path.stat().st_size
        except OSError as e:
            raise DataError(f"{self.path}: {e.strerror}; {self._remedy}") from None

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises DataError: unreadable, of another size, or cut off."""
        fd = self._fd if self._fd is not None else self._open()
        try:
            data = os.pread(fd, size, offset)
        except OSError as e:
            data = retry(lambda: os.pread(fd, size, offset), f"{self.path}: offset {offset}", e)
        if len(data) != size:
            raise DataError(
                f"{self.path}: expected {size} bytes at offset {offset}, found {len(data)}; the file was cut off while it "
                "was read: restore it and start again"
            )
        return data

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range in the order asked for, small neighbours in one read."""
        return read_coalesced(self.read, ranges, _GAP_BYTES, _JOIN_BYTES)

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        fd = self._fd = retry(lambda: os.open(self.path, os.O_RDONLY), str(self.path))
        found = os.fstat(fd).st_size
        if found != self._expected_size:
            self.close()
            raise DataError(f"{self.path}: {found} bytes, {self._expected_size} when it was indexed; {self._remedy}")
        return fd

    @property
    def _remedy(self) -> str:
        return f"restore the shard, or index the folder again: mmscale-data index {self.path.parent}"
