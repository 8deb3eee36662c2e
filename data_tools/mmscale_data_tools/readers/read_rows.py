"""Rows of `.json`, `.jsonl` and `.parquet` files with their media: LLaVA, ShareGPT, OpenAI messages, VILA's `texts`,
captions and documents. Each row says by its fields which of them it is; all end as the same LLaVA row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale.data_tools.kinds import Placement
from mmscale.data_tools.readers.items import Item, Source, encode_json
from mmscale.data_tools.readers.json_rows import Row, iter_rows
from mmscale.data_tools.readers.media_refs import Medium, name_media, row_media
from mmscale.data_tools.readers.openai_rows import from_openai
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.rows import USER_NAMES, parse_row
from mmscale.types import MEDIA_TOKENS


def read_rows(source: Source) -> Iterator[Item]:
    """The rows of some files, file after file; of a folder all `.json`, `.jsonl` and `.parquet` files in it, by name.

    Raises:
        RefusedInputError: a file or the media folder is missing, a name ends otherwise, or a list is not parseable.
    """
    if source.media is not None and not source.media.is_dir():
        raise RefusedInputError(f"{source.media}: expected the folder of the media files, found none; check --media")
    for path in [file for place in source.paths for file in _files(place)]:
        for row in _rows(path):
            yield _item(path, row, source)


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.suffix in (".json", ".jsonl", ".parquet"))
    if not found:
        raise RefusedInputError(f"{place}: expected .json, .jsonl or .parquet files in it, found none; check the path")
    return found


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        from mmscale.data_tools.readers.parquet_rows import iter_parquet

        return iter_parquet(path)
    return iter_rows(path)


def _item(path: Path, row: Row, source: Source) -> Item:
    where: dict[str, str | int] = {"file": path.name, "row": row.number}
    if row.line:
        where["line"] = row.line
    try:
        if row.fault is not None:
            raise BadSampleError(row.fault.reason, str(row.fault))
        if not isinstance(row.value, dict):
            raise BadSampleError("json_fields", f"the row is a {type(row.value).__name__}, expected an object")
        members, dropped = row_members(row.value, source)
    except BadSampleError as skip:
        return Item(where, skip=skip)
    return Item(where, members, dropped_turns=dropped)


def row_members(row: Mapping[str, Any], source: Source) -> tuple[dict[str, bytes | Path], int]:
    """The members of a row of any of the forms, and how many leading turns will be dropped on reading.

    Raises:
        BadSampleError: the row or one of its media cannot be used.
    """
    row = canonical(row)
    found = row_media(row, source.media)
    row = name_media(row, found)
    if source.placement is Placement.front:
        row = tags_in_front(row)
    turns = parse_row(row, [medium.modality for medium in found])
    return {**_media_members(found), "json": encode_json(row)}, len(row.get("conversations", turns)) - len(turns)


def _media_members(found: list[Medium]) -> dict[str, bytes | Path]:
    return {(f"{i}.{medium.ext}" if len(found) > 1 else medium.ext): medium.content for i, medium in enumerate(found)}


def canonical(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a LLaVA row (`conversations`) or a document (`text`); fields that are not understood are kept.

    Raises:
        BadSampleError: no known form, or a field of a wrong type.
    """
    convert = next((convert for name, convert in _FORMS.items() if name in row), None)
    if convert is None:
        raise BadSampleError("json_fields", f"the row has none of {', '.join(f'`{name}`' for name in _FORMS)}")
    return convert(row)


def tags_in_front(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with the media tags of each user turn moved to its front, a newline behind each, as LLaVA's code does.

    Example:
        >>> row = {"conversations": [{"from": "human", "value": "What is <image> this?"}]}
        >>> tags_in_front(row)["conversations"][0]["value"]
        '<image>\\nWhat is  this?'
    """
    if "conversations" not in row:
        return dict(row)
    return {**row, "conversations": [_front(turn) for turn in row["conversations"]]}


def _front(turn: Any) -> Any:
    if not isinstance(turn, dict) or turn.get("from") not in USER_NAMES or not isinstance(turn.get("value"), str):
        return turn
    tags = _TAGS.findall(turn["value"])
    text = _TAGS.sub("", turn["value"]).strip() if tags else turn["value"]
    return {**turn, "value": "".join(f"{tag}\n" for tag in tags) + text}


def _from_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """VILA's column `texts`: a list of `{"user", "assistant"}`."""
    texts = row["texts"]
    if not isinstance(texts, list) or not all(isinstance(text, dict) for text in texts):
        raise BadSampleError("json_fields", "`texts` is not a list of objects with `user` and `assistant`")
    names = (("user", "human"), ("assistant", "gpt"))
    turns = [{"from": role, "value": text.get(name)} for text in texts for name, role in names]
    return {**{k: v for k, v in row.items() if k != "texts"}, "conversations": turns}


def _from_caption(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": row["caption"]}]
    return {**{k: v for k, v in row.items() if k != "caption"}, "conversations": turns}


_TAGS = re.compile("|".join(MEDIA_TOKENS.values()))
_FORMS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "conversations": dict,
    "messages": from_openai,
    "texts": _from_texts,
    "text": dict,
    "caption": _from_caption,
}
