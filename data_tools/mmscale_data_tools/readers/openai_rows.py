"""OpenAI chat messages to a LLaVA row. Media parts keep their place among the text parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmscale.errors import BadSampleError
from mmscale.types import MEDIA_TOKENS, Modality

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
_MEDIA_PARTS: dict[str, Modality] = {
    "image_url": "image",
    "video_url": "video",
    "input_audio": "audio",
    "audio_url": "audio",
}


def from_openai(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `conversations` and `images`, `videos`, `audios` in the place of `messages`.

    A medium in front of a user's text gets a newline behind it, unless the text begins with white space: the same rule as
    in the chat template of an export.

    Raises:
        BadSampleError: `messages` is not as the format has it, or a medium stands in another turn than a user's.
    """
    messages = row["messages"]
    if not isinstance(messages, list):
        raise BadSampleError("json_fields", f"`messages` is a {type(messages).__name__}, expected a list")
    media: dict[Modality, list[Any]] = {}
    turns = [_turn(message, media) for message in messages]
    fields = {k: v for k, v in row.items() if k != "messages"}
    for modality, values in media.items():
        fields.update({modality: values[0]} if len(values) == 1 else {f"{modality}s": values})
    return {**fields, "conversations": turns}


def _turn(message: Any, media: dict[Modality, list[Any]]) -> dict[str, Any]:
    """One turn; its media are appended to `media`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadSampleError("json_fields", f"a message is {str(message)[:80]!r}, expected `role` and `content`")
    role = _ROLES.get(message["role"])
    if role is None:
        raise BadSampleError("roles", f"`role` is {message['role'][:40]!r}, expected one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return {"from": role, "value": content}
    if not isinstance(content, list):
        raise BadSampleError(
            "json_fields", f"`content` is a {type(content).__name__}, expected text or a list of parts"
        )
    parts = [_part(part) for part in content]
    found = [(modality, value) for modality, value in parts if modality != "text"]
    if found and role != "human":
        raise BadSampleError("roles", f"a medium in a message of {message['role']}; only a user can show one")
    for modality, value in found:
        media.setdefault(modality, []).append(value)  # type: ignore[arg-type]
    return {"from": role, "value": _join(parts)}


def _join(parts: list[tuple[str, Any]]) -> str:
    out, leads = "", True
    for i, (kind, value) in enumerate(parts):
        if kind == "text":
            out, leads = out + value, False
            continue
        out += MEDIA_TOKENS[kind]  # type: ignore[index]
        following = parts[i + 1] if i + 1 < len(parts) else None
        if leads and following and not (following[0] == "text" and following[1][:1] in (" ", "\t", "\n")):
            out += "\n"
    return out


def _part(part: Any) -> tuple[str, Any]:
    """("text", text), or a modality and what is said about the medium: a name, a URL or `{"bytes"}`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    if not isinstance(kind, str) or kind not in _MEDIA_PARTS:
        raise BadSampleError(
            "json_fields", f"a part is {str(part)[:80]!r}, expected the type text, {', '.join(_MEDIA_PARTS)}"
        )
    value = part.get(kind)
    if isinstance(value, dict) and isinstance(value.get("data"), str):  # input_audio holds base64 text
        value = f"data:;base64,{value['data']}"
    elif isinstance(value, dict):
        value = value.get("url")
    if not isinstance(value, str) or not value:
        raise BadSampleError("json_fields", f"`{kind}` is {str(part.get(kind))[:80]!r}, expected a URL or file name")
    return _MEDIA_PARTS[kind], value
