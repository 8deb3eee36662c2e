"""Blocks of remote objects on a node-local disk, shared by all processes of the node without any daemon.

    DIR/blocks/<object>/<number>     4 MiB of an object, then checksums; <object> follows from address, size and version
    DIR/used                         bytes in all blocks, changed under a lock; counted anew when it exceeds the cap

A block is written under another name and renamed, and what is read of it is held against its checksums: after a crash of
the node, or with a failing disk, a block of the right size may hold anything. Whatever the disk does (full,
read-only, files deleted by others), reading goes on from the remote object, after one loud warning.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import xxhash

from mmscale.logging import get_logger
from mmscale.streaming.storage.source import Range, RemoteSource, in_threads

log = get_logger(__name__)

BLOCK_BYTES = 4 << 20

_PIECE_BYTES = 64 << 10
"""Each has a checksum, so that a small read need not look at the whole block: 10 us."""
_SUM_BYTES = 8

_FETCH_THREADS = 4
_KEPT_SHARE = 0.9  # of the cap, when blocks are thrown out
_WAIT_S, _LOOK_AGAIN_S = 60.0, 0.02


class BlockCache:
    """The cache in a folder; see the module. Safe over threads, forks and pickling."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """`max_bytes`: cap of all blocks together, whoever wrote them."""
        self.folder = folder
        self.max_bytes = max_bytes
        self.is_writable = True

    def path(self, identity: str, number: int) -> Path:
        """Where block `number` of the object `identity` lies."""
        return self.folder / "blocks" / hashlib.sha256(identity.encode()).hexdigest()[:32] / str(number)

    def load(self, path: Path, offset: int, size: int, block_bytes: int) -> bytes | None:
        """`size` bytes at `offset` of a stored block of `block_bytes` bytes; None when they are not there, or damaged."""
        first, last = offset // _PIECE_BYTES, -(-(offset + size) // _PIECE_BYTES)
        start, stop = first * _PIECE_BYTES, min(last * _PIECE_BYTES, block_bytes)
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != block_bytes + _SUM_BYTES * -(-block_bytes // _PIECE_BYTES):
                    return None
                data = os.pread(file.fileno(), stop - start, start)
                sums = os.pread(file.fileno(), (last - first) * _SUM_BYTES, block_bytes + first * _SUM_BYTES)
        except OSError:
            return None
        if sums != _sums(data):
            log.warning("%s is damaged and fetched again; check the disk of data.cache.dir", path, all_ranks=True)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)  # when it was used last; many mounts do not keep that by themselves
        return data[offset - start : offset - start + size]

    def store(self, path: Path, data: bytes) -> None:
        """Keeps a block, and throws out those used least recently when all exceed the cap. Never fails: it warns."""
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = data + _sums(data)
            temporary.write_bytes(stored)
            os.replace(temporary, path)
            self._account(len(stored))
        except FileNotFoundError:  # somebody cleans the folder just now; the next block makes it again
            log.info("%s was removed while a block was written into it; that block is not kept", path.parent)
        except OSError as e:
            with suppress(OSError):
                temporary.unlink()
            self.is_writable = False
            text = "data.cache.dir=%s cannot be written (%s): this process goes on WITHOUT the cache and reads from the remote"
            log.warning(
                f"{text}; free the disk, lower data.cache.max_gb, or choose another folder",
                self.folder,
                e.strerror,
                all_ranks=True,
            )

    @contextmanager
    def fetching(self, path: Path) -> Iterator[None]:
        """Held while a block is fetched: other processes wait for it, but not for ever, instead of fetching it too."""
        lock = path.with_name(f"{path.name}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("wb")
        except OSError:
            yield  # `store` says so
            return
        with file:  # closing it gives the lock back, and so does the end of the process
            until = time.monotonic() + _WAIT_S
            while not _has_lock(file) and time.monotonic() < until:
                time.sleep(_LOOK_AGAIN_S)
            yield
            with suppress(OSError):
                lock.unlink()

    def _account(self, added: int) -> None:
        with (self.folder / "used").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read(32)
            used = int(text) + added if text.isdigit() else self.max_bytes + 1
            if used > self.max_bytes:
                used = self._throw_out()
            file.truncate(0)
            file.write(b"%d" % used)

    def _throw_out(self) -> int:
        """Removes blocks until they fit; gives the bytes that stay."""
        blocks = []
        for path in (self.folder / "blocks").glob("*/*"):
            with suppress(OSError):  # another process may remove it meanwhile
                stat = path.stat()
                blocks.append((stat.st_mtime_ns, stat.st_size, path))
        used = sum(size for _, size, _ in blocks)
        if used <= self.max_bytes:
            return used
        for _, size, path in sorted(blocks):
            if used <= self.max_bytes * _KEPT_SHARE:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            used -= size
        return used


def _sums(data: bytes) -> bytes:
    """The checksums of the pieces of some content that begins with a piece."""
    return b"".join(xxhash.xxh3_64_digest(data[i : i + _PIECE_BYTES]) for i in range(0, len(data), _PIECE_BYTES))


def _has_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: then a block may be fetched twice
    return True


class CachedFile:
    """A remote object as a source, read in whole blocks that stay in a `BlockCache`."""

    def __init__(self, remote: RemoteSource, cache: BlockCache) -> None:
        self._remote = remote
        self._cache = cache

    def size(self) -> int:
        """Bytes of the object."""
        return self._remote.size()

    def identity(self) -> str:
        """That of the object."""
        return self._remote.identity()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises DataError like the remote source."""
        return self.read_many([(offset, size)])[0]

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range in the order asked for; missing blocks are fetched first, some at a time."""
        if self._cache.is_writable:
            numbers = sorted({number for offset, size in ranges for number in _numbers(offset, size)})
            in_threads(self._ensure, numbers, _FETCH_THREADS)
        found = [self._load(offset, size) for offset, size in ranges]
        missing = [i for i, data in enumerate(found) if data is None]
        for i, data in zip(missing, self._remote.read_many([ranges[i] for i in missing]), strict=True):
            found[i] = data
        return [data for data in found if data is not None]

    def close(self) -> None:
        """Closes the remote source."""
        self._remote.close()

    def _ensure(self, number: int) -> None:
        """Fetches a block that is not there."""
        path, size = self._cache.path(self.identity(), number), self._block_bytes(number)
        if self._cache.load(path, 0, 0, size) is not None:
            return
        with self._cache.fetching(path):
            if self._cache.is_writable and self._cache.load(path, 0, 0, size) is None:
                self._cache.store(path, self._remote.read(number * BLOCK_BYTES, size))

    def _load(self, offset: int, size: int) -> bytes | None:
        parts = []
        for number in _numbers(offset, size):
            start = number * BLOCK_BYTES
            lo, hi = max(offset, start), min(offset + size, start + BLOCK_BYTES)
            path = self._cache.path(self.identity(), number)
            part = self._cache.load(path, lo - start, hi - lo, self._block_bytes(number))
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block_bytes(self, number: int) -> int:
        return min(BLOCK_BYTES, self.size() - number * BLOCK_BYTES)


def _numbers(offset: int, size: int) -> range:
    """The blocks that hold a range."""
    return range(offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES + 1) if size else range(0)
