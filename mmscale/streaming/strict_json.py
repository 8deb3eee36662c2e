"""JSON by RFC 8259 and nothing more: what Python's parser lets through besides is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_BYTES = 16 << 20
MAX_DEPTH = 32
MAX_DIGITS = 400


class JsonFault(ValueError):
    """Text that is not strict JSON. `reason` is a fixed word, `line` counts from 1 (0 = unknown)."""

    def __init__(self, reason: str, detail: str, line: int = 0) -> None:
        super().__init__(detail)
        self.reason = reason
        self.line = line


def _constant(name: str) -> NoReturn:
    raise JsonFault("json_number", f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise JsonFault("json_number", f"an integer of {len(text)} digits, at most {MAX_DIGITS} are allowed")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonFault("json_number", f"{text[:40]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise JsonFault("json_duplicate_key", f"the key {twice!r} stands twice in one object")
    return out


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite, parse_int=_integer)
"""Refuses duplicate keys, NaN, Infinity and numbers that overflow or have too many digits, with JsonFault."""


def check_value(value: Any, text: str) -> None:
    """Refuses a parsed value that is nested too deeply or holds text that cannot be encoded (lone surrogates)."""
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as e:
            raise JsonFault("json_text", f"text that is not valid Unicode: {e.reason}") from None
    if text.count("{") + text.count("[") > MAX_DEPTH:
        level, depth = [value], 0
        while level:
            depth += 1
            nested = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
            level = [item for items in nested for item in items if isinstance(item, dict | list)]
        if depth > MAX_DEPTH:
            raise JsonFault("json_depth", f"nested {depth} deep, at most {MAX_DEPTH} is allowed")


def parse_json(data: bytes, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a strict JSON text: UTF-8, finite numbers, one value per key, limits on depth, digits and bytes.

    Raises:
        JsonFault: anything else, with a reason word (`json_syntax`, `json_utf8`, `json_number`, ...).
    """
    if len(data) > max_bytes:
        raise JsonFault("json_size", f"{len(data)} bytes, at most {max_bytes} are allowed")
    try:
        text = data.decode("utf-8")
        value = DECODER.decode(text)
        check_value(value, text)
        return value
    except UnicodeDecodeError as e:
        raise JsonFault("json_utf8", f"byte {e.start} is not UTF-8") from None
    except json.JSONDecodeError as e:
        raise JsonFault("json_syntax", f"{e.msg} in line {e.lineno} column {e.colno}", e.lineno) from None
    except RecursionError:
        raise JsonFault("json_depth", f"nested too deeply, at most {MAX_DEPTH} is allowed") from None
