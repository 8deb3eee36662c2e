"""Caption sidecars: JSON files beside the tars that give a sample another caption, found by its url, key or place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.strict_json import JsonFault, parse_json

MAX_BYTES = 1 << 30


class TarCaptions:
    """The captions that the sidecars of one tar give, one file of each caption folder."""

    def __init__(self, folders: Sequence[Path], tar: str) -> None:
        """Reads the sidecars of a tar.

        Args:
            folders: one caption folder; or two, of which the second has the long descriptions.
            tar: path of the tar relative to its data folder.

        Raises:
            RefusedInputError: a sidecar is not a JSON object.
        """
        self._tables = [_table(folder, tar) for folder in folders]

    def caption(self, names: Sequence[str]) -> str:
        """The caption of a sample under the first of some names that the sidecar has.

        Raises:
            BadSampleError: `missing_caption`, the sidecar is missing or has none of the names; `json_fields`, it has
                something else there than a caption.
        """
        texts = [_find(table, names) for table in self._tables]
        if len(texts) == 1:
            return texts[0]
        return f"### Short description: \n{texts[0]} \n\n### Long description: \n{texts[1]}"


def wids_key(key: str) -> str:
    """A sample's key by the rule of wids: folder, slash, name; in the root of a tar the folder is empty.

    Example:
        >>> wids_key("a"), wids_key("sub/a"), wids_key("./sa_1")
        ('/a', 'sub/a', './sa_1')
    """
    return key if "/" in key else f"/{key}"


def place_name(number: int) -> str:
    """Under which a caption is found by the number of its sample in the shard; no key or url looks like it."""
    return f"\0{number}"


def _table(folder: Path, tar: str) -> Mapping[str, Any]:
    """The sidecar of a tar by any name; places in the shard (SAM's `<shard path>/<number>`) are cut to `place_name`."""
    stem = re.sub(r"\.tar(\.gz|\.zst)?$|\.tgz$", "", tar)
    places = [folder / f"{tar}.json", folder / f"{stem}.tar.json", folder / f"{Path(stem).name}.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {}
    try:
        content = parse_json(path.read_bytes(), MAX_BYTES)
    except JsonFault as e:
        raise RefusedInputError(
            f"{path}: not a usable caption file: {e}; correct it, or leave out --captions"
        ) from None
    if not isinstance(content, dict):
        raise RefusedInputError(f"{path}: expected one JSON object of captions, found a {type(content).__name__}")
    return {**content, **_places(path, content, f"{Path(stem).name}.tar")}


def _places(path: Path, content: Mapping[str, Any], shard: str) -> dict[str, Any]:
    """Captions by number in the shard, whatever folder the shard lay in when they were written."""
    places: dict[str, Any] = {}
    for name, value in content.items():
        found = re.fullmatch(rf"(?:.*/)?{re.escape(shard)}/([0-9]+)", name)
        if found and places.setdefault(place_name(int(found[1])), value) is not value:
            raise RefusedInputError(f"{path}: two captions for sample {found[1]} of {shard}; keep one of them")
    return places


def _find(table: Mapping[str, Any], names: Sequence[str]) -> str:
    name = next((name for name in names if name in table), None)
    if name is None:
        raise BadSampleError("missing_caption", f"the sidecar has no caption for {' or '.join(map(repr, names[:2]))}")
    value = table[name]
    if isinstance(value, dict) and isinstance(value.get("summary"), dict):
        value = value["summary"]
    text = value.get("output") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BadSampleError(
            "json_fields", f"the caption of {name!r} is {str(value)[:80]!r}, expected text in `output`"
        )
    return text
