"""Rows of a JSON list or a JSON Lines file one after the other: a list of a million rows is never held in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.errors import RefusedInputError
from mmscale.streaming.strict_json import DECODER, MAX_BYTES, JsonFault, check_value

CHUNK_BYTES = 1 << 20
# Finds the end of a row that is well-formed, but not strict: such a row is skipped, the rows after it are not.
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number from 0, its line from 1, and its value or the reason why it has none."""

    number: int
    line: int
    value: Any
    fault: JsonFault | None = None


def iter_rows(path: Path) -> Iterator[Row]:
    """The rows of `FILE.json` (one list) or `FILE.jsonl` (a row per line) in order.

    A row that is JSON but not strict (NaN, a duplicate key, ...), or a line that is not JSON at all, comes with its fault;
    the caller counts it. A byte order mark at the start is passed over.

    Raises:
        RefusedInputError: no such file, or a .json that is not a list or not parseable; the text has the line.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise RefusedInputError(
            f"{path}: expected a file that ends in .json (a list) or .jsonl (a row per line); rename it"
        )
    if not path.is_file():
        raise RefusedInputError(f"{path}: expected a JSON file, found none; check the path")
    yield from _lines(path) if path.suffix == ".jsonl" else _elements(path)


def _lines(path: Path) -> Iterator[Row]:
    number = 0
    with path.open("rb") as file:
        for line, data in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
            rest = data
            if line == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            while len(rest) > MAX_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_BYTES + 1)
            if not data.strip():
                continue
            try:
                value, fault = _line_value(data)
            except JsonFault as broken:
                value, fault = None, broken
            yield Row(number, line, value, fault)
            number += 1


def _line_value(data: bytes) -> tuple[Any, JsonFault | None]:
    """Value and fault of one line. Raises JsonFault when it is not one JSON value."""
    if len(data) > MAX_BYTES:
        raise JsonFault("json_size", f"more than {MAX_BYTES} bytes in a line")
    try:
        text = data.decode("utf-8").strip()
        value, end, fault = _decode(text, 0)
    except UnicodeDecodeError as e:
        raise JsonFault("json_utf8", f"byte {e.start} of the line is not UTF-8") from None
    except json.JSONDecodeError as e:
        raise JsonFault("json_syntax", f"{e.msg} at character {e.pos} of the line") from None
    if text[end:]:
        raise JsonFault("json_syntax", "more than one value in a line")
    return value, fault


class _Text:
    """A sliding window over a file's text that knows its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self.at_end = False
        self._line = 1
        self._counted = 0  # newlines before this position are in `_line`
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._file = path.open("rb")

    def more(self) -> None:
        """Drops what is behind `position` and reads on."""
        self.here()
        self.text = self.text[self.position :]
        self.position = self._counted = 0
        # Twice as much each time, so that a row of many chunks is not parsed many times.
        data = self._file.read(max(CHUNK_BYTES, len(self.text)))
        self.at_end = not data
        try:
            self.text += self._decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError:
            raise self.refused("text that is not UTF-8") from None

    def next_char(self) -> str:
        """The next character that is not space, without taking it; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.position)
            assert space is not None, "the pattern matches the empty string"
            self.position = space.end()
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.more()

    def here(self) -> int:
        """Line of `position`, which only ever grows."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def refused(self, found: str) -> RefusedInputError:
        """An error that names file and line."""
        return _refused(self.path, self.here(), found)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _elements(path: Path) -> Iterator[Row]:
    text = _Text(path)
    try:
        if (char := text.next_char()) != "[":
            hint = "; a file with a row per line must be named .jsonl" if char == "{" else ""
            raise text.refused(f"{char!r} where a list should begin{hint}" if char else "nothing")
        text.position += 1
        number = 0
        if text.next_char() == "]":
            text.position += 1
        else:
            while True:
                yield _element(text, number)
                number += 1
                char = text.next_char()
                if char not in ("]", ","):
                    raise text.refused(
                        f"{char!r} after a row, not ',' or ']'" if char else "no end of the list: it is cut off"
                    )
                text.position += 1
                if char == "]":
                    break
        if text.next_char():
            raise text.refused("more text after the list")
    finally:
        text.close()


def _element(text: _Text, number: int) -> Row:
    """Takes one value, reading on until it is whole."""
    text.next_char()
    while True:
        try:
            value, end, fault = _decode(text.text, text.position)
        except json.JSONDecodeError as e:
            # Either a mistake or the end of the window: only more text can tell.
            if text.at_end or len(text.text) - text.position > MAX_BYTES:
                limit = "" if text.at_end else f" (of a row, {MAX_BYTES >> 20} MiB are read at most)"
                text.position = min(e.pos, len(text.text))
                raise text.refused(e.msg + limit) from None
        else:
            if end < len(text.text) or text.at_end:  # a number at the window's edge may go on
                row = Row(number, text.here(), value, fault)
                text.position = end
                return row
        text.more()


def _decode(text: str, start: int) -> tuple[Any, int, JsonFault | None]:
    """Value, end and fault of the JSON value at `start`. Raises JSONDecodeError when there is none."""
    try:
        try:
            value, end = DECODER.raw_decode(text, start)
            check_value(value, text[start:end])
            return value, end, None
        except JsonFault as fault:
            return None, _LENIENT.raw_decode(text, start)[1], fault
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, start) from None


def _refused(path: Path, line: int, found: str) -> RefusedInputError:
    return RefusedInputError(f"{path}: line {line}: expected JSON rows, found: {found}; correct the file")
