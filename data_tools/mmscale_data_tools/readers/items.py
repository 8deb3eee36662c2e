"""What every reader of foreign data gives: rows on their way into a shard, or the reason why one cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.data_tools.kinds import Placement
from mmscale.data_tools.writer import Members
from mmscale.errors import BadSampleError, RefusedInputError


@dataclass(frozen=True, slots=True)
class Source:
    """What a reader is asked for.

    `paths`: files or folders. `media`: folder that file names in rows are relative to. `captions`: folders of caption
    sidecars, at most two. `unfinished`: img2dataset tars without their stats file are taken too. `rename`: samples of tars
    get running numbers as keys. `scratch`: folder for temporary files, which the writer sets to its own.
    """

    paths: tuple[Path, ...]
    media: Path | None = None
    captions: tuple[Path, ...] = ()
    placement: Placement = Placement.keep
    unfinished: bool = False
    rename: bool = False
    scratch: Path = Path()


@dataclass(frozen=True, slots=True)
class Item:
    """A row of any source: its members, or why it is left out. `where` names file and row for the skip list.

    `key`: its key in the shard, empty = its running number. `dropped_turns`: leading turns that are not the user's.
    """

    where: Mapping[str, str | int]
    members: Members | None = None
    skip: BadSampleError | None = None
    dropped_turns: int = 0
    key: str = ""


Reader = Callable[[Source], Iterator[Item]]
"""Gives the rows of a source one after the other; two calls give the same."""


def encode_json(value: Mapping[str, Any]) -> bytes:
    """The `.json` member of a row. Raises BadSampleError when strict JSON cannot carry a value."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode()
    except (ValueError, TypeError) as e:  # NaN, a type of Python, lone surrogates
        raise BadSampleError("json_fields", f"a field that JSON cannot hold: {e}") from None
    except RecursionError:
        raise BadSampleError("json_depth", "nested too deeply") from None


def refuse_twice(paths: Sequence[Path]) -> None:
    """Refuses a place that is given twice: its samples would come twice. Raises RefusedInputError."""
    seen: set[Path] = set()
    for path in paths:
        real = path.resolve()
        if real in seen:
            raise RefusedInputError(f"{path}: given twice, so its samples would come twice; give it once")
        seen.add(real)


def extension(name: str) -> str:
    """What stands behind the last dot, in lower case."""
    return name.rpartition(".")[2].lower()
