"""Ranges of objects on an HTTP server: kept connections, answers that are checked, failures tried again.

An answer counts only when it is exactly the bytes asked for (206 and its `Content-Range`) of the same version (`ETag` and
size) as all answers before. What a further try can heal (5xx, broken connections, cut bodies) is tried again; what it
cannot (404, a changed object, a server without ranges) ends the run at once.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from mmscale.errors import DataError
from mmscale.redact import bare_url
from mmscale.streaming.storage.source import Range, read_coalesced, retry
from mmscale.streaming.storage.urls import HTTP_SCHEMES

TIMEOUT_S = 30.0
THREADS = 8
"""Requests at the same time for one pack."""

_GAP_BYTES = 64 << 10
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_TRANSIENT = (408, 425, 429)  # and all 5xx


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class HttpClient:
    """Connections that stay open between requests, shared by all objects of a data set; each process has its own."""

    def __init__(self) -> None:
        self._forget()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._forget()

    def get(self, url: str, byte_range: Range | None, max_bytes: int) -> _Answer:
        """The answer to a GET, redirects followed; a body is read up to `max_bytes`.

        Raises:
            OSError: no answer, or one that another try may heal.
            DataError: a redirect that is not followed, or a body beyond `max_bytes`.
        """
        target = url
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self._request(target, url, byte_range, max_bytes)
            if answer.status in _TRANSIENT or answer.status >= 500:
                raise OSError(f"the server answers {answer.status}")
            if answer.status not in _REDIRECTS:
                return answer
            target = _redirected(url, target, answer.headers.get("Location", ""))
        raise DataError(f"{bare_url(url)}: more than {_MAX_REDIRECTS} redirects; give the address that they lead to")

    def _request(self, url: str, first_url: str, byte_range: Range | None, max_bytes: int) -> _Answer:
        parts = urlsplit(url)
        headers = {"Accept-Encoding": "identity", "User-Agent": "mmscale"}
        if byte_range is not None:
            headers["Range"] = f"bytes={byte_range[0]}-{byte_range[0] + byte_range[1] - 1}"
        if parts.username is not None and _host(url) == _host(first_url):  # a password goes to no other server
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
        idle = self._idle_of(_host(url))
        while True:
            connection, is_new = (idle.pop(), False) if idle else (_connect(url), True)
            try:
                connection.request("GET", target, headers=headers)
                answer, is_kept = _receive(connection, max_bytes, bare_url(url))
            except (http.client.HTTPException, OSError) as e:
                connection.close()
                if is_new:
                    raise OSError(f"{type(e).__name__}: {e}") from e
                continue  # the server had closed it in the meantime
            except DataError:
                connection.close()
                raise
            if is_kept:
                idle.append(connection)
            else:
                connection.close()
            return answer

    def _idle_of(self, host: tuple[str, str]) -> list[http.client.HTTPConnection]:
        if self._pid != os.getpid():  # forked: the connections are those of the other process
            self._forget()
        return self._idle[host]

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._idle: defaultdict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(list)


def _host(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.netloc.rpartition("@")[2].lower()


def _connect(url: str) -> http.client.HTTPConnection:
    scheme, host = _host(url)
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    return kind(host, timeout=TIMEOUT_S)


def _receive(connection: http.client.HTTPConnection, max_bytes: int, where: str) -> tuple[_Answer, bool]:
    """The answer, and whether the connection can be used again."""
    with connection.getresponse() as response:
        if response.status not in (200, 206):
            response.read(64 << 10)
            return _Answer(response.status, response.headers, b""), response.isclosed()
        length = response.headers.get("Content-Length")
        body = response.read(max_bytes + 1)
        if len(body) > max_bytes:
            raise DataError(
                f"{where}: expected at most {max_bytes} bytes, found {length or 'more'}; the server is not usable"
            )
        if length is not None and length.isdigit() and len(body) < int(length):
            raise OSError(f"{len(body)} of {length} bytes came")
        return _Answer(response.status, response.headers, body), not response.will_close


def _redirected(first_url: str, url: str, location: str) -> str:
    """Where a redirect leads; never from https to http, and never to another kind of address."""
    target = urljoin(url, location)
    scheme = urlsplit(target).scheme.lower()
    if not location or scheme not in HTTP_SCHEMES or (urlsplit(url).scheme.lower(), scheme) == ("https", "http"):
        raise DataError(
            f"{bare_url(first_url)}: a redirect to {bare_url(target)!r} is not followed; give the final address"
        )
    return target


class HttpFile:
    """An object on an HTTP server as a source. Its version is that of the first answer; another one is an error."""

    def __init__(self, url: str, client: HttpClient) -> None:
        self.url = url
        self._client = client
        self._version: tuple[int, str] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def size(self) -> int:
        """Bytes of the object as the server says. Raises DataError: missing, or a server without ranges."""
        return self._known()[0]

    def identity(self) -> str:
        """Address, size and version."""
        size, version = self._known()
        return f"{bare_url(self.url)}|{size}|{version}"

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises DataError: gone, changed, or still failing after the last try."""
        if not size:
            return b""
        return retry(lambda: self._fetch(offset, size), f"{bare_url(self.url)}: offset {offset}")

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range in the order asked for, near neighbours in one request, several requests at a time."""
        return read_coalesced(self.read, ranges, _GAP_BYTES, threads=THREADS)

    def close(self) -> None:
        """Nothing is open but the client's connections."""

    def _known(self) -> tuple[int, str]:
        if self._version is None:
            self.read(0, 1)
        assert self._version is not None, "the first answer gives the version"
        return self._version

    def _fetch(self, offset: int, size: int) -> bytes:
        answer = self._client.get(self.url, (offset, size), size)
        if answer.status != 206:
            self._refuse(offset, answer)
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", "").strip())
        if match is None or (int(match[1]), int(match[2])) != (offset, offset + size - 1) or len(answer.body) != size:
            found = f"Content-Range {answer.headers.get('Content-Range')!r} and {len(answer.body)} bytes"
            raise DataError(
                f"{bare_url(self.url)}: asked for {size} bytes at offset {offset}, found {found}; the server is not usable"
            )
        version = int(match[3]), answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        with self._lock:
            known = self._version = self._version or version
        if version != known:
            raise DataError(
                f"{bare_url(self.url)}: expected size and version {known}, found {version}; the object changed while it was read: "
                "restore it, or start again with the new one"
            )
        return answer.body

    def _refuse(self, offset: int, answer: _Answer) -> NoReturn:
        where = f"{bare_url(self.url)}: offset {offset}"
        if answer.status == 200:
            raise DataError(f"{where}: the server ignores `Range`; use one that serves ranges, or copy the data")
        raise DataError(
            f"{where}: expected the bytes (206), the server answers {answer.status}; check address and access"
        )


def http_get(url: str, client: HttpClient, max_bytes: int) -> bytes:
    """A whole small object. Raises DataError: missing, larger than `max_bytes`, or still failing after the last try."""
    answer = retry(lambda: client.get(url, None, max_bytes), bare_url(url))
    if answer.status != 200:
        raise DataError(
            f"{bare_url(url)}: expected the file (200), the server answers {answer.status}; check address and access"
        )
    return answer.body
