"""From the members of a sample to a `Sample`, and from turns to the JSON that the builder writes: both ends of one format.

Three layouts: a LLaVA/ShareGPT row in `.json` with its media beside it; media with a caption in `.txt` (img2dataset; its
metadata `.json` has no `conversations`); a document, in the field `text` of a `.json` or alone in a `.txt`, with its media
beside it. Placeholders keep their position; they count in user turns and in the `text` of a document only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmscale.errors import BadSampleError
from mmscale.streaming.media import member_order, modality_of
from mmscale.streaming.strict_json import JsonFault, parse_json
from mmscale.types import MEDIA_TOKENS, MODALITIES, MediaBytes, Modality, Role, Sample, Turn

USER_NAMES = ("human", "user")
"""What rows call the user."""
_ROLE: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(USER_NAMES, "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
}
_PLACED = ("user", "document")
_FROM = {"system": "system", "user": "human", "assistant": "gpt"}
MEDIA_FIELDS: dict[Modality, tuple[str, str]] = {modality: (modality, f"{modality}s") for modality in MODALITIES}
"""The fields of a row that name its media; the second counts when both are there."""


def parse_sample(id: str, members: Sequence[tuple[str, bytes]], offset: int = 0) -> Sample:
    """A sample from its members, not decoded.

    Args:
        id: `"<shard>:<key>"`.
        members: (extension, bytes), in any order; extensions that are neither text nor media are ignored.
        offset: byte position of the first member in the tar.

    Raises:
        BadSampleError: with a reason word such as `json_syntax`, `roles`, `media_count`, `missing_text`.
    """
    ordered = sorted(members, key=lambda member: member_order(member[0]))
    media = tuple(
        MediaBytes(modality, ext.rpartition(".")[2], data) for ext, data in ordered if (modality := modality_of(ext))
    )
    text = dict(members)
    row = _parse_object(text["json"]) if "json" in text else {}
    order = [item.modality for item in media]
    if "conversations" in row:
        turns = parse_row(row, order)
    elif "txt" in text:
        turns = _parse_txt(text["txt"], order, alone="json" not in text)
    elif "text" in row:
        turns = parse_row(row, order)
    else:
        found = ", ".join(ext for ext, _ in members)
        detail = f"no `.json` with `conversations` or `text` and no `.txt`, found: {found}"
        raise BadSampleError("missing_text", detail)
    return Sample(id, turns, media, offset)


def parse_row(row: Mapping[str, Any], media: Sequence[Modality]) -> tuple[Turn, ...]:
    """Turns of a LLaVA/ShareGPT row, or the one turn of a document, with a placeholder for each medium.

    Args:
        row: parsed JSON object with `conversations`, or with the `text` of a document.
        media: modality of each medium that the sample really has, in order.

    Raises:
        BadSampleError: wrong types or roles, or media that do not fit the row.
    """
    for modality in MODALITIES:
        declared = declared_media(row, modality)
        if declared is not None and len(declared) != media.count(modality):
            detail = f"the row names {len(declared)} {modality} file(s), the sample has {media.count(modality)}"
            raise BadSampleError("missing_media", detail)
    turns = _parse_turns(row["conversations"]) if "conversations" in row else _parse_document(row["text"])
    return place_media(turns, media)


def declared_media(row: Mapping[str, Any], modality: Modality) -> list[str] | None:
    """Media files that a row names under `image` or `images` (and so on); None when it has neither field.

    Raises:
        BadSampleError: the field is not a string, a list of strings or of objects with `path`.
    """
    for name in reversed(MEDIA_FIELDS[modality]):
        value = row.get(name)
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        paths = [item.get("path") if isinstance(item, dict) else item for item in items]
        names = [path for path in paths if isinstance(path, str) and path]
        if len(names) != len(items):
            found = f"`{name}` is {str(value)[:80]!r}"
            raise BadSampleError("json_fields", f"{found}, expected a file name or a list of them")
        return names
    return None


def place_media(turns: tuple[Turn, ...], media: Sequence[Modality]) -> tuple[Turn, ...]:
    """Turns in which every medium has its placeholder: media without any tag come first, a tag and a newline each.

    Raises:
        BadSampleError: `media_count`, when the tags in user turns and documents are not as many as the media.
    """
    untagged = []
    for modality in MODALITIES:
        count = media.count(modality)
        if not count:
            continue
        tags = sum(turn.text.count(MEDIA_TOKENS[modality]) for turn in turns if turn.role in _PLACED)
        if not tags:
            untagged.append(modality)
        elif tags != count:
            raise BadSampleError(
                "media_count", f"{tags} {MEDIA_TOKENS[modality]} tag(s) for {count} {modality} file(s)"
            )
    front = "".join(f"{MEDIA_TOKENS[modality]}\n" for modality in media if modality in untagged)
    if not front:
        return turns
    first = next(i for i, turn in enumerate(turns) if turn.role in _PLACED)
    return (*turns[:first], Turn(turns[first].role, front + turns[first].text), *turns[first + 1 :])


def encode_row(turns: Sequence[Turn], media: Mapping[Modality, Sequence[str]] | None = None, id: str = "") -> bytes:
    """The `.json` member of a sample: a LLaVA row that `parse_sample` reads back to the same turns.

    Args:
        turns: system (optional), user, assistant, ...; or one document.
        media: names of the media files by modality; with them a reader notices a file that is missing.
        id: optional row id.
    """
    row: dict[str, Any] = {"id": id} if id else {}
    for modality, names in (media or {}).items():
        one, several = MEDIA_FIELDS[modality]
        row.update({one: names[0]} if len(names) == 1 else {several: list(names)})
    if turns[0].role == "document":
        row["text"] = turns[0].text
    else:
        row["conversations"] = [{"from": _FROM[turn.role], "value": turn.text} for turn in turns]
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        row = parse_json(data)
    except JsonFault as e:
        raise BadSampleError(e.reason, str(e)) from None
    if not isinstance(row, dict):
        raise BadSampleError("json_fields", f"the row is a {type(row).__name__}, expected an object")
    return row


def _parse_turns(conversations: Any) -> tuple[Turn, ...]:
    """Turns with our roles: one system turn in front or none, other leading turns dropped, then user and assistant."""
    if not isinstance(conversations, list):
        raise BadSampleError("json_fields", f"`conversations` is a {type(conversations).__name__}, expected a list")
    turns = [_parse_turn(turn) for turn in conversations]
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = turns[len(system) :]
    while rest and rest[0].role != "user":
        rest = rest[1:]
    for i, turn in enumerate(rest):
        expected = ("user", "assistant")[i % 2]
        if turn.role != expected:
            raise BadSampleError("roles", f"turn {len(turns) - len(rest) + i} is of {turn.role}, expected {expected}")
    if len(rest) < 2:
        raise BadSampleError("roles", "no answer by the assistant to a user turn")
    return (*system, *rest)


def _parse_turn(turn: Any) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise BadSampleError("json_fields", f"a turn is {str(turn)[:80]!r}, expected `from` and `value` as strings")
    role = _ROLE.get(turn["from"])
    if role is None:
        raise BadSampleError("roles", f"`from` is {turn['from'][:40]!r}, expected one of {', '.join(_ROLE)}")
    return Turn(role, turn["value"])


def _parse_document(text: Any) -> tuple[Turn, ...]:
    if not isinstance(text, str):
        raise BadSampleError("json_fields", f"`text` is a {type(text).__name__}, expected a string")
    if not text.strip():
        raise BadSampleError("empty_text", "the document is empty")
    return (Turn("document", text),)


def _parse_txt(data: bytes, media: Sequence[Modality], alone: bool) -> tuple[Turn, ...]:
    """The caption of the media; a document when it stands `alone`. Tags in it are plain text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise BadSampleError("text_utf8", f"byte {e.start} of the `.txt` is not UTF-8") from None
    if not text.strip():
        raise BadSampleError("empty_text", "the `.txt` is empty")
    if media:
        return place_media((Turn("user", ""), Turn("assistant", text)), media)
    if alone:
        return _parse_document(text)
    # Metadata beside it speak of a medium that is missing: training on the caption alone would hide the loss.
    raise BadSampleError(
        "missing_media", "a caption in `.txt` and metadata in `.json` without the media file they are of"
    )
