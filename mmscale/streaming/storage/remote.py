"""Objects behind any other URL (s3://, gs://, ...) through fsspec, which is an optional package and imported only here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmscale.errors import DataError, MissingExtraError
from mmscale.redact import bare_url
from mmscale.streaming.storage.source import Range, read_coalesced, retry

T = TypeVar("T")

THREADS = 8
_GAP_BYTES = 64 << 10
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
_FOREIGN = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
)
"""Errors of the stores' own libraries that are no OSError and reach through fsspec."""


class FsspecClient:
    """The file system of a URL; each process has its own, because those of fsspec do not survive a fork."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def call(self, method: str, url: str, **options: int) -> Any:
        """What the file system's `method` gives for `url`. Raises OSError: worth another try; DataError: it is not."""
        filesystem = self._filesystem()
        try:
            return getattr(filesystem, method)(filesystem._strip_protocol(url), **options)
        except _FINAL as e:
            raise DataError(f"{bare_url(url)}: {type(e).__name__}: {e}; check address and access") from e
        except _foreign_errors() as e:
            raise OSError(f"{type(e).__name__}: {e}") from e

    def _filesystem(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                self._opened = os.getpid(), url_to_fs(self.url, skip_instance_cache=True)[0]
            except ImportError as e:
                scheme = self.url.partition(":")[0]
                raise MissingExtraError(e.name or "fsspec", "remote", f"reading {scheme}:// URLs", e) from e
        return self._opened[1]


def _foreign_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules.get(module), name) for module, name in _FOREIGN]
    return tuple(getattr(module, name) for module, name in loaded if module is not None)


class FsspecFile:
    """An object behind a URL that fsspec reads, as a source."""

    def __init__(self, url: str, client: FsspecClient) -> None:
        self.url = url
        self._client = client
        self._version: tuple[int, str] | None = None

    def size(self) -> int:
        """Bytes of the object. Raises DataError when it is missing."""
        return self._known()[0]

    def identity(self) -> str:
        """Address, size and what the store says of the version."""
        size, version = self._known()
        return f"{bare_url(self.url)}|{size}|{version}"

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises DataError: gone, shorter, or still failing after the last try."""
        data: bytes = self._retry(lambda: self._client.call("cat_file", self.url, start=offset, end=offset + size))
        if len(data) != size:
            found = f"expected {size} bytes at offset {offset}, found {len(data)}"
            raise DataError(
                f"{bare_url(self.url)}: {found}; the object is not the indexed one: restore it and start again"
            )
        return data

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range in the order asked for, near neighbours in one request, several requests at a time."""
        return read_coalesced(self.read, ranges, _GAP_BYTES, threads=THREADS)

    def close(self) -> None:
        """Nothing is open but what the file system keeps."""

    def _known(self) -> tuple[int, str]:
        if self._version is None:
            info = self._retry(lambda: self._client.call("info", self.url))
            version = next(
                (str(info[k]) for k in ("ETag", "etag", "version_id", "mtime", "LastModified") if info.get(k)), ""
            )
            self._version = int(info["size"]), version
        return self._version

    def _retry(self, action: Callable[[], T]) -> T:
        return retry(action, bare_url(self.url))


def fsspec_get(url: str, client: FsspecClient, max_bytes: int) -> bytes:
    """A whole small object. Raises DataError: missing, larger than `max_bytes`, or still failing after the last try."""
    file = FsspecFile(url, client)
    if file.size() > max_bytes:
        raise DataError(
            f"{bare_url(url)}: expected at most {max_bytes} bytes, found {file.size()}; it is not what its name says"
        )
    return file.read(0, file.size())
