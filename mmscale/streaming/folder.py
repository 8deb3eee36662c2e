"""Where a dataset lies: its manifest, indexes and shards from a local folder, or from a URL with or without a cache."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from mmscale.config.schema import CacheConfig
from mmscale.errors import DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.redact import bare_url
from mmscale.streaming.index import ShardIndex, decode_index, index_path, map_index
from mmscale.streaming.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    ShardEntry,
    idx_digest,
    parse_manifest,
    read_manifest,
    refuse_compressed,
)
from mmscale.streaming.storage.cache import BlockCache, CachedFile
from mmscale.streaming.storage.http import HttpClient, HttpFile, http_get
from mmscale.streaming.storage.local import LocalFile
from mmscale.streaming.storage.remote import FsspecClient, FsspecFile, fsspec_get
from mmscale.streaming.storage.source import ByteSource, RemoteSource
from mmscale.streaming.storage.urls import HTTP_SCHEMES, is_url, join_url

log = get_logger(__name__)

MAX_INDEX_BYTES = 4 << 30
_GB = 10**9


class DatasetFolder(Protocol):
    """A dataset folder. `where`: its path or URL for messages. `threads`: shards that are worth reading at the same time."""

    where: str
    threads: int

    @property
    def remedy(self) -> str:
        """What to do about a shard that is not the indexed one."""
        ...

    def manifest(self) -> Manifest:
        """The manifest. Raises RefusedInputError."""
        ...

    def modified_ns(self, name: str) -> int | None:
        """When a file was written last, in ns; None when that cannot be known. Raises OSError."""
        ...

    def check_index(self, entry: ShardEntry) -> ShardIndex:
        """The index of a shard, its digest and every number in it checked. Raises DataError."""
        ...

    def open_index(self, entry: ShardEntry) -> ShardIndex:
        """The index that `check_index` has passed, with as little of it in memory as can be. Raises DataError."""
        ...

    def source(self, entry: ShardEntry) -> ByteSource:
        """The shard's file, compressed or not."""
        ...

    def strays(self, known: Iterable[str]) -> dict[str, str]:
        """Shards that lie in the folder and are not `known`, with the reason why they are not used."""
        ...

    def sidecars(self, shard: str, suffix: str) -> tuple[Path, ...]:
        """Where a file about a shard may be kept, the best place first; its folder may be missing, or read-only."""
        ...


def open_folder(place: Path | str, cache: CacheConfig | None = None) -> DatasetFolder:
    """The folder at a path or URL; nothing is read yet. Raises RefusedInputError: a command or a scheme that is not read."""
    if isinstance(place, str) and is_url(place):
        if cache is None or cache.dir is None:
            log.info(
                "%s is read without a cache (data.cache.dir): samples one by one, indexes by every process",
                bare_url(place),
            )
        return RemoteFolder(place, cache)
    return LocalFolder(Path(place), cache)


def split_pattern(place: Path | str) -> tuple[Path | str, str]:
    """A dataset folder, and the pattern of shard names at its end (`folder/{000..009}.tar`); empty when there is none."""
    if isinstance(place, str) and is_url(place):
        parts = urlsplit(place)
        head, _, last = parts.path.rpartition("/")
        return (urlunsplit(parts._replace(path=head)), last) if _is_pattern(last) else (place, "")
    path = Path(place)
    return (path.parent, path.name) if _is_pattern(path.name) and not path.is_dir() else (path, "")


def _is_pattern(name: str) -> bool:
    return name.endswith((".tar", ".tar.zst"))


def _sidecar_name(shard: str, suffix: str) -> str:
    return index_path(Path(shard)).stem + suffix


def _decode_checked(data: bytes, entry: ShardEntry, where: str, remedy: str) -> ShardIndex:
    if entry.idx_digest and idx_digest(data) != entry.idx_digest:
        raise DataError(f"{where}: not the index that the manifest names; {remedy}")
    return decode_index(data, where)


class LocalFolder:
    """A dataset folder on this machine or a mounted file system."""

    threads = 1

    def __init__(self, path: Path, cache: CacheConfig | None = None) -> None:
        """`cache`: its folder takes what cannot be kept beside the shards."""
        self.path = path
        self.where = str(path)
        self._cache_dir = Path(cache.dir) if cache and cache.dir else None
        self._checked: dict[str, tuple[int, int, int]] = {}

    @property
    def remedy(self) -> str:
        """What to do about a shard that is not the indexed one."""
        return f"restore the shard, or index the folder again: mmscale-data index {self.path}"

    def manifest(self) -> Manifest:
        """The manifest. Raises RefusedInputError."""
        return read_manifest(self.path)

    def modified_ns(self, name: str) -> int | None:
        """When a file of the folder was written last, in ns. Raises OSError."""
        return (self.path / name).stat().st_mtime_ns

    def check_index(self, entry: ShardEntry) -> ShardIndex:
        """The index of a shard, its digest and every number in it checked. Raises DataError."""
        path = index_path(self.path / entry.name)
        try:
            with path.open("rb") as file:
                stamp = _stamp(os.fstat(file.fileno()))
                data = file.read()
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}; {self.remedy}") from None
        index = _decode_checked(data, entry, str(path), self.remedy)
        self._checked[entry.name] = stamp
        return index

    def open_index(self, entry: ShardEntry) -> ShardIndex:
        """The index that `check_index` has passed, mapped; checked again when the file is another one by now."""
        path = index_path(self.path / entry.name)
        try:
            stamp = _stamp(path.stat())
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}; {self.remedy}") from None
        if self._checked.get(entry.name) != stamp:
            self.check_index(entry)
        return map_index(path)

    def source(self, entry: ShardEntry) -> LocalFile:
        """The shard's file."""
        return LocalFile(self.path / entry.name, entry.bytes, entry.sha256)

    def strays(self, known: Iterable[str]) -> dict[str, str]:
        """Shards that lie in the folder and are not `known`, with the reason why they are not used."""
        names = sorted({path.name for path in self.path.glob("*.t*") if path.is_file()} - set(known))
        reasons = {name: refuse_compressed(name, self.path) for name in names}
        unlisted = f"not in {MANIFEST_NAME}; to use it run: mmscale-data index {self.path}"
        reasons.update((name, f"{self.path / name}: {unlisted}") for name in names if _is_pattern(name))
        return {name: reason for name, reason in reasons.items() if reason}

    def sidecars(self, shard: str, suffix: str) -> tuple[Path, ...]:
        """Beside the shard, or in the cache."""
        name = _sidecar_name(shard, suffix)
        return (self.path / name, *([self._cache_dir / "lengths" / name] if self._cache_dir else []))


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class RemoteFolder:
    """A dataset folder behind a URL. Indexes are kept in the cache's folder; without one each process fetches them again."""

    threads = 8

    def __init__(self, url: str, cache: CacheConfig | None = None) -> None:
        self.url = url
        self.where = bare_url(url)
        self._is_http = urlsplit(url).scheme.lower() in HTTP_SCHEMES
        self._http = HttpClient()
        self._fsspec = FsspecClient(url)
        self._cache_dir = Path(cache.dir) if cache and cache.dir else None
        self._cache = BlockCache(self._cache_dir, int(cache.max_gb * _GB)) if cache and self._cache_dir else None

    @property
    def remedy(self) -> str:
        """What to do about a shard that is not the indexed one."""
        return "restore it, or index the folder again where it was built (mmscale-data index) and upload it"

    def manifest(self) -> Manifest:
        """The manifest, always that of the server. Raises RefusedInputError."""
        try:
            data = self._get(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except DataError as e:
            raise RefusedInputError(
                f"{e}; expected a folder that `mmscale-data index` has written, and uploaded"
            ) from e
        return parse_manifest(data, f"{self.where}/{MANIFEST_NAME}", self.where)

    def modified_ns(self, name: str) -> int | None:
        """Not known: servers do not agree about it. The size is checked, the hash by `mmscale-data verify` at the source."""
        return None

    def check_index(self, entry: ShardEntry) -> ShardIndex:
        """The index of a shard, its digest and every number in it checked. Raises DataError."""
        name, kept = index_path(Path(entry.name)).name, self._kept_index(entry)
        data = _read_kept(kept) if kept else b""
        if idx_digest(data) != entry.idx_digest:
            data = self._get(name, MAX_INDEX_BYTES)
            if kept is not None:
                _keep(kept, data)
        return _decode_checked(data, entry, f"{self.where}/{name}", self.remedy)

    def open_index(self, entry: ShardEntry) -> ShardIndex:
        """The index from the cache, mapped, or fetched again."""
        kept = self._kept_index(entry)
        if kept is not None and kept.is_file():
            try:
                return map_index(kept)  # its name is the digest of its content, which `check_index` has looked at
            except DataError as e:
                log.warning("%s; it is fetched again", e)
        return self.check_index(entry)

    def source(self, entry: ShardEntry) -> RemoteSource:
        """The shard's object, through the cache when there is one."""
        url = join_url(self.url, entry.name)
        source: RemoteSource = HttpFile(url, self._http) if self._is_http else FsspecFile(url, self._fsspec)
        return CachedFile(source, self._cache) if self._cache else source

    def strays(self, known: Iterable[str]) -> dict[str, str]:
        """None: a server need not list what it has."""
        return {}

    def sidecars(self, shard: str, suffix: str) -> tuple[Path, ...]:
        """In the cache."""
        return (self._cache_dir / "lengths" / _sidecar_name(shard, suffix),) if self._cache_dir else ()

    def _kept_index(self, entry: ShardEntry) -> Path | None:
        return self._cache_dir / "indexes" / f"{entry.idx_digest}.idx" if self._cache_dir else None

    def _get(self, name: str, max_bytes: int) -> bytes:
        url = join_url(self.url, name)
        return http_get(url, self._http, max_bytes) if self._is_http else fsspec_get(url, self._fsspec, max_bytes)


def _read_kept(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # not there yet, or somebody cleans the cache


def _keep(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # other processes may be writing the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as e:
        log.warning("%s cannot be written (%s): every process fetches the index again", path, e.strerror)
