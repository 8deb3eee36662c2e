"""Writes a dataset folder: deterministic WebDataset tars with index and manifest, whole shard by whole shard.

With `zstd` the shards are `.tar.zst` of independent frames, for text: media hardly shrink and cost time to unpack.

Stopping at any moment is safe. Run the same writes again: shards that are already there are compared instead of
written, so the result is the same bytes as if nothing had happened.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from mmscale.errors import DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.index import build_index, encode_index, index_path, read_index, sync_folder, write_atomic
from mmscale.streaming.manifest import Manifest, ShardEntry, file_sha256, idx_digest, write_manifest
from mmscale.streaming.media import modality_of
from mmscale.streaming.shards import Shard
from mmscale.streaming.storage.zstd import FrameWriter
from mmscale.streaming.tar import BLOCK, name_fault, split_name

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

log = get_logger(__name__)

Members = Mapping[str, bytes | Path]
"""Extension -> content. A Path is read when its shard is really written; nothing but its size is needed to resume."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Held while a command writes into a folder; it ends with the process, however that ends.

    Raises:
        RefusedInputError: another command holds it.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedInputError(
                f"{folder}: another command writes here; wait for its end, or choose another folder"
            ) from None
        except OSError as e:  # a file system without locks, or (NFS) without locks on folders
            log.warning("%s cannot be locked (%s); see to it that no other command writes here", folder, e.strerror)
        yield
    finally:
        os.close(fd)


class ShardWriter:
    """Context manager that writes samples into `folder/000000.tar`, `000001.tar`, ... and the manifest at the end.

    An exception inside the `with` block leaves all whole shards in place and writes no manifest.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = 512 * 2**20,
        max_samples: int = 10_000,
        *,
        zstd: bool = False,
        force: bool = False,
    ) -> None:
        """Prepares a dataset folder.

        Args:
            folder: made when missing. Shards in it must come from the same writes.
            max_bytes: a shard is closed before it would grow beyond this; a larger sample gets its own shard. With `zstd`
                the bytes before compression count.
            max_samples: samples per shard at most.
            zstd: write `.tar.zst`; samples with media are refused, unless `force`.
        """
        self.folder = folder
        self.max_bytes = max_bytes
        self.max_samples = max_samples
        self.num_samples = 0
        self._suffix = ".tar.zst" if zstd else ".tar"
        self._refuses_media = zstd and not force
        self._keys: set[str] = set()
        self._entries: list[ShardEntry] = []
        self._current: _NewShard | _OldShard | None = None

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, key: str, members: Members) -> None:
        """Adds one sample.

        Args:
            key: unique in its shard, without a dot in its last part.
            members: extension (lower case, such as `0.png` or `json`) -> content.

        Raises:
            DataError: a name that a reader would refuse, or a key that its shard already has.
            RefusedInputError: other content than a shard that is already there, or media in a `.tar.zst`.
        """
        sizes = {ext: len(data) if isinstance(data, bytes) else data.stat().st_size for ext, data in members.items()}
        _check_names(key, sizes)
        if self._refuses_media:
            _refuse_media(key, sizes)
        cost = sum(BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK for size in sizes.values())
        current = self._current
        if current and (current.num_samples >= self.max_samples or current.num_bytes + cost > self.max_bytes):
            self._finish_shard()
        if self._current is None:
            self._current = self._start_shard()
            self._keys.clear()
        if key in self._keys:
            raise DataError(f"{self._current.path}: two samples have the key {key!r}; give all new keys with --rename")
        self._keys.add(key)
        self._current.write(key, members, sizes)
        self._current.num_samples += 1
        self._current.num_bytes += cost
        self.num_samples += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._current is not None:
                self._current.abandon()
            return
        if self._current is not None:
            self._finish_shard()
        for suffix in (".tar", ".tar.zst"):
            _refuse_left_over(self.folder / _shard_name(len(self._entries), suffix))
        write_manifest(self.folder, Manifest(tuple(self._entries)))

    def _start_shard(self) -> _NewShard | _OldShard:
        for suffix in {".tar", ".tar.zst"} - {self._suffix}:  # the two would share one index file
            _refuse_left_over(self.folder / _shard_name(len(self._entries), suffix))
        path = self.folder / _shard_name(len(self._entries), self._suffix)
        if path.exists() and index_path(path).exists():
            return _OldShard(path)
        return _NewShard(path)

    def _finish_shard(self) -> None:
        assert self._current is not None, "a shard is open"
        self._entries.append(self._current.finish())
        self._current = None


class _NewShard:
    """A shard that is being written under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(path.name + ".tmp")
        self.num_samples = 0
        self.num_bytes = 0
        self._file = _HashingFile(self.temporary)
        self._frames = FrameWriter(self._file) if path.suffix == ".zst" else None
        self._tar = _tar_writer(self._frames or self._file)

    def write(self, key: str, members: Members, sizes: Mapping[str, int]) -> None:
        content = {ext: data if isinstance(data, bytes) else data.read_bytes() for ext, data in members.items()}
        self._tar.write({"__key__": key, **content})

    def finish(self) -> ShardEntry:
        """The tar under its name first, then the index: a shard with an index is a whole shard."""
        self._tar.close()
        if self._frames:
            self._frames.close()
        self._file.close()
        index_path(self.path).unlink(missing_ok=True)
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)
        index = build_index(self.path)
        if len(index) != self.num_samples:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in index.skipped.items())
            raise DataError(f"{self.path}: {self.num_samples} samples written, {len(index)} are usable ({reasons})")
        data = encode_index(index)
        write_atomic(index_path(self.path), data)
        return ShardEntry(self.path.name, len(index), self.path.stat().st_size, self._file.sha256, idx_digest(data))

    def abandon(self) -> None:
        """Drops what was written so far."""
        try:
            self._tar.close()
        finally:
            self._file.close()
            self.temporary.unlink(missing_ok=True)


class _OldShard:
    """A whole shard from an earlier run, held against what would be written now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        self.num_bytes = 0
        self._shard = Shard.at(path, read_index(index_path(path)))

    def write(self, key: str, members: Members, sizes: Mapping[str, int]) -> None:
        """Compares: bytes of what is in memory, sizes of files (so that resuming reads no media)."""
        i = self.num_samples
        same = i < len(self._shard) and self._shard.key(i) == key
        if same:
            in_memory = {ext: data for ext, data in members.items() if isinstance(data, bytes)}
            same = (
                self._shard.sizes(i) == dict(sizes)
                and dict(self._shard.members(i, in_memory.__contains__)) == in_memory
            )
        if not same:
            self._refuse(f"sample {i} is another one than {key!r}")

    def finish(self) -> ShardEntry:
        """The entry of the shard as it is on disk."""
        if self.num_samples != len(self._shard):
            self._refuse(f"it has {len(self._shard)} samples, this build gives {self.num_samples}")
        self.abandon()
        data = index_path(self.path).read_bytes()
        size = self.path.stat().st_size
        return ShardEntry(self.path.name, self.num_samples, size, file_sha256(self.path), idx_digest(data))

    def abandon(self) -> None:
        """Closes the file."""
        self._shard.close()

    def _refuse(self, found: str) -> None:
        raise RefusedInputError(
            f"{self.path}: a shard of another build: {found}; choose an empty folder, or delete this one to build it again"
        )


class _HashingFile:
    """A file that knows the sha256 of what went through it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _tar_writer(file: _HashingFile | FrameWriter) -> TarWriter:
    from webdataset.writer import TarWriter

    # Fixed owner, mode and time: equal samples give equal bytes.
    return TarWriter(file, user="mmscale", group="mmscale", mode=0o644, mtime=0, compress=False, encoder=False)


def _shard_name(number: int, suffix: str) -> str:
    return f"{number:06d}{suffix}"


def _refuse_left_over(path: Path) -> None:
    if path.exists():
        raise RefusedInputError(f"{path}: left over from another build; remove it, or choose an empty folder")


def _refuse_media(key: str, sizes: Mapping[str, int]) -> None:
    for ext in sizes:
        if modality_of(ext):
            raise RefusedInputError(
                f"sample {key!r} has the medium .{ext}: --zstd is for text; compressed media keep 97 % of their size and "
                "read 17 times slower; leave out --zstd (--force writes them all the same)"
            )


def _check_names(key: str, sizes: Mapping[str, int]) -> None:
    for ext in sizes:
        name = f"{key}.{ext}"
        fault = name_fault(name)
        if not fault and split_name(name) != (key, ext):
            fault = "a dot in the key, or an extension that is not lower case"
        if not fault and ext.startswith("_"):  # webdataset's writer leaves such members out
            fault = "an extension that starts with an underscore"
        if fault:
            raise DataError(f"member {name!r} cannot be written: {fault}; choose another key")
    if not sizes:
        raise DataError(f"sample {key!r} has no members; leave it out")
