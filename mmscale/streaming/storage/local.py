"""Ranges of a local file by pread: no seek, no shared position, safe to use from forked processes."""

from __future__ import annotations

import hashlib
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
    """A local file as a source. Opened at the first read; other content than expected is an error then."""

    def __init__(self, path: Path, expected_size: int, sha256: str = "") -> None:
        """`sha256`: of a file that was written after `size` was asked for is looked at before it is read; empty = unknown."""
        self._fd: int | None = None
        self.path = path
        self._expected_size = expected_size
        self._sha256 = sha256
        self._modified_ns: int | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_fd": None}

    def __del__(self) -> None:
        self.close()

    def size(self) -> int:
        """Bytes of the file as it is now. Raises DataError when it cannot be looked at."""
        try:
            stat = self.path.stat()
        except OSError as e:
            raise DataError(f"{self.path}: {e.strerror}; {self._remedy}") from None
        self._modified_ns = stat.st_mtime_ns
        return stat.st_size

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
        stat = os.fstat(fd)
        if stat.st_size != self._expected_size:
            self.close()
            raise DataError(
                f"{self.path}: {stat.st_size} bytes, {self._expected_size} when it was indexed; {self._remedy}"
            )
        if self._sha256 and self._modified_ns not in (None, stat.st_mtime_ns):
            with open(fd, "rb", closefd=False) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self._sha256:
                self.close()
                raise DataError(f"{self.path}: changed since it was opened first (its sha256 differs); {self._remedy}")
            self._modified_ns = stat.st_mtime_ns
        return fd

    @property
    def _remedy(self) -> str:
        return f"restore the shard, or index the folder again: mmscale-data index {self.path.parent}"
