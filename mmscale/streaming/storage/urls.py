"""Addresses of data: which are local paths, which are URLs that we read, and how they are joined."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from mmscale.errors import RefusedInputError
from mmscale.redact import bare_url

HTTP_SCHEMES = ("http", "https")

FSSPEC_SCHEMES = (
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "adl",
    "hdfs",
    "webhdfs",
    "sftp",
    "oci",
    "oss",
    "hf",
    "memory",
)
"""Object stores and remote file systems; no scheme that runs a command, unpacks or reads local files by another name."""


def is_url(text: str) -> bool:
    """Whether `text` is a URL that we read, and not a local path.

    Raises:
        RefusedInputError: a command (`pipe:`), a chain (`a::b`) or a scheme that is not read; nothing is run or opened.
    """
    if text.startswith("pipe:"):
        raise RefusedInputError(
            f"{text[:200]!r}: expected a folder or a URL, found a command; nothing was run: write its output to a shard, or "
            "use a source of `mode: stream` with `allow_commands: true`"
        )
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//|:)", text)
    if match is None:
        return False
    scheme = match[1].lower()
    if match[2] == "//" and scheme in (*HTTP_SCHEMES, *FSSPEC_SCHEMES) and "::" not in text:
        return True
    raise RefusedInputError(
        f"{bare_url(text)!r}: expected a local path or a URL of {', '.join((*HTTP_SCHEMES, *FSSPEC_SCHEMES))}, found "
        f"'{match[0]}'; nothing was opened: give a path or one of these"
    )


def expand_braces(pattern: str, most: int) -> list[str]:
    """The texts that braces such as `{000..041}` stand for, as webdataset reads them.

    Raises:
        ValueError: braces that do not close, or more than `most` texts.
    """
    from braceexpand import braceexpand

    ranges = re.findall(
        r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern
    )  # looked at first: the library writes each out in memory
    too_wide = any(abs(int(last) - int(first)) >= most for first, last in ranges)
    found = [] if too_wide else list(islice(braceexpand(pattern), most + 1))
    if too_wide or len(found) > most:
        raise ValueError(f"its braces stand for more than {most} names")
    return found


def join_root(root: str, path: str) -> Path | str:
    """The place of a source: `path` below `root`, unless it is absolute or a URL itself. A Path is local, a str is a URL.

    Raises:
        RefusedInputError: a command or a scheme that is not read.

    Example:
        >>> join_root("https://host/data/", "photos"), join_root("/data", "https://host/photos")
        ('https://host/data/photos', 'https://host/photos')
    """
    if is_url(path):
        return path
    if is_url(root) and not path.startswith("/"):
        return join_url(root, path)
    return Path(path) if is_url(root) else Path(root) / path


def join_url(url: str, name: str) -> str:
    """The URL of something below the folder `url`; a query such as an access signature stays."""
    parts = urlsplit(url)
    if parts.scheme.lower() in HTTP_SCHEMES:
        name = quote(name)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
