"""The shards of a `stream` source: which files, URLs or commands its `path` stands for. Nothing is opened or run here."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from mmscale.config.schema import SourceConfig
from mmscale.errors import ConfigError, RefusedInputError
from mmscale.redact import bare_url
from mmscale.streaming.storage.urls import HTTP_SCHEMES, expand_braces, join_root

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
MAX_SHARDS = 100_000
_COMMAND = "pipe:"


class ShardUrl(NamedTuple):
    """A shard: what the webdataset library opens, and its name in sample ids and messages, without passwords and queries."""

    url: str
    name: str


def list_shards(name: str, source: SourceConfig, root: str) -> tuple[ShardUrl, ...]:
    """The shards of a source in a fixed order.

    Braces such as `{000..041}` stand for several shards; `*`, `?` and `[...]` for the files that exist; a folder for all the
    tars in it.

    Args:
        name: of the source, for messages and for the names of commands.
        root: `data.root`.

    Raises:
        ConfigError: a command without `allow_commands`, braces that do not close, or `max_samples`.
        RefusedInputError: a scheme that is not read, nothing found, or a shard that stands twice.
    """
    assert source.path is not None, "check_mixture refuses sources without a path"
    if source.max_samples is not None:
        raise ConfigError(
            f"data.sources.{name}.max_samples={source.max_samples}: the samples of a stream are not known in advance; index the "
            "tars (mmscale-data index DIR), or name fewer shards"
        )
    shards: list[ShardUrl] = []
    for number, text in enumerate(_braces(name, source.path)):
        shards += _command(name, number, text, source) if text.startswith(_COMMAND) else _files(name, text, root)
    if not shards:
        raise RefusedInputError(f"data.sources.{name}.path={bare_url(source.path)}: expected shards, found none")
    _refuse_twice(name, shards)
    return _distinct(shards)


def _braces(name: str, path: str) -> list[str]:
    try:
        return expand_braces(path, MAX_SHARDS)
    except ValueError as error:
        raise ConfigError(f"data.sources.{name}.path={bare_url(path)!r}: {error}; correct its braces") from None


def _command(name: str, number: int, text: str, source: SourceConfig) -> list[ShardUrl]:
    if not source.allow_commands:
        raise ConfigError(
            f"data.sources.{name}.path holds a command ({text.split()[0]} ...) and allow_commands is off; nothing was run: set "
            f"data.sources.{name}.allow_commands=true if the command is yours, or name files or URLs"
        )
    return [ShardUrl(text, f"{name}/command-{number:06d}")]  # the command itself may hold secrets


def _files(name: str, text: str, root: str) -> list[ShardUrl]:
    place = join_root(root, text)
    if isinstance(place, str):
        parts = urlsplit(place)
        if parts.scheme.lower() not in HTTP_SCHEMES:
            raise RefusedInputError(
                f"data.sources.{name}.path={bare_url(place)}: stream mode reads local files, http and https; nothing was opened: "
                f"index the shards (mmscale-data index) and leave out `mode: stream`"
            )
        return [ShardUrl(place, bare_url(place))]
    return [ShardUrl(str(path.absolute()), _local_name(path, root)) for path in _local(name, place)]


def _local(name: str, place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(p for p in place.iterdir() if p.name.endswith(SUFFIXES))
    if place.exists() or not glob.has_magic(str(place)):
        found = [place] if place.exists() else []
    else:
        found = sorted(map(Path, glob.glob(str(place))))
    if not found:
        raise RefusedInputError(
            f"data.sources.{name}.path: expected shards at {place}, found none; check the path and data.root"
        )
    return found


def _local_name(path: Path, root: str) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _distinct(shards: list[ShardUrl]) -> tuple[ShardUrl, ...]:
    """The same shards, with a number behind names that are shared: those of URLs that differ in their query only."""
    shared = {name for name, count in Counter(shard.name for shard in shards).items() if count > 1}
    return tuple(
        ShardUrl(url, f"{name}#{number}" if name in shared else name) for number, (url, name) in enumerate(shards)
    )


def _refuse_twice(name: str, shards: list[ShardUrl]) -> None:
    seen: set[str] = set()
    for url, shard in shards:
        if url in seen:
            raise RefusedInputError(
                f"data.sources.{name}.path: the shard {shard} stands there twice, so its samples would come twice; name it once"
            )
        seen.add(url)
