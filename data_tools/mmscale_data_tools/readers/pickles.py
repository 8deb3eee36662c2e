"""Lists of plain values out of pickle files, without ever loading a pickle.

The opcodes are read one by one (`pickletools` only names them) and few of them are obeyed: those that make lists, dicts,
texts, numbers, bytes, True, False and None. There is no way to name a class or call anything; no size is believed beyond
the file's end; and what a list or dict grows by when it is referred to again is limited.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from mmscale.errors import RefusedInputError

MAX_BYTES = 16 << 30
MAX_WORK = 20_000_000
"""Operations, and what is referred to again, between two elements of the outermost list (they come by the thousand)."""
_COPY_WORK, _TEXT_BYTES_PER_WORK = 20, 64
MAX_STACK = 1_000_000
MAX_MEMO = 5_000_000
MAX_MEMO_BYTES = 4096
"""Longer texts (pictures), and lists and dicts, are kept to be referred to again until their element is complete."""

_NUMBERS = {"INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_MARK = object()
_FORGOTTEN = object()
_TOO_MUCH = "more operations than any list of samples needs"
_CONSTANTS: dict[str, bool | None] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Refused(Exception):
    """Why a pickle is not read."""


def iter_pickled_list(path: Path) -> Iterator[Any]:
    """The elements of the list that a pickle file holds, as they are read: the file is never in memory as a whole.

    Raises:
        RefusedInputError: no such file, not a pickle of one list, or anything in it that is not a list, dict, text, number,
            bytes, True, False or None. Nothing that the file names is imported or run.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise _Refused(f"{size} bytes, at most {MAX_BYTES} are read")
            yield from _Reader(_Bounded(file, size)).elements()
    except FileNotFoundError:
        raise RefusedInputError(f"{path}: expected a pickle file, found none; check the path") from None
    except (_Refused, ValueError, OverflowError, RecursionError) as e:
        raise RefusedInputError(
            f"{path}: not a pickle of a plain list ({e}); only lists, dicts, texts, numbers and bytes are read: write it again "
            "as JSON, or get it from a source that you trust"
        ) from None


class _Bounded:
    """A file of which no more is asked for than there is."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= self._size - self._file.tell():
            raise _Refused(f"{count} bytes are announced at byte {self._file.tell()} of {self._size}")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline()

    def tell(self) -> int:
        return self._file.tell()


class _Reader:
    """A stack machine for the opcodes of plain values."""

    def __init__(self, file: _Bounded) -> None:
        self._ops = pickletools.genops(cast("IO[bytes]", file))
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._short_lived: list[int] = []
        self._copied: set[int] = set()
        self._work = 0

    def elements(self) -> Iterator[Any]:
        """The elements of the outermost list, each when it is complete."""
        for op, arg, _ in self._ops:
            if op.name == "STOP":
                break
            self._step(op.name, arg)
            self._work += 1
            if len(self._stack) > MAX_STACK or len(self._memo) > MAX_MEMO:
                raise _Refused(_TOO_MUCH)
            self._spend(1)
            if self._stack and isinstance(self._stack[0], list) and self._stack[0]:
                yield from self._take()
        if len(self._stack) != 1 or not isinstance(self._stack[0], list):
            raise _Refused("it holds no list")

    def _take(self) -> list[Any]:
        """The complete elements; what they were kept by is forgotten."""
        done, self._stack[0], self._work = self._stack[0], [], 0
        self._memo.update(dict.fromkeys(self._short_lived, _FORGOTTEN))
        self._short_lived.clear()
        self._copied.clear()
        return cast("list[Any]", done)

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise _Refused(_TOO_MUCH)

    def _step(self, name: str, arg: Any) -> None:
        if name in _TEXTS or name in _NUMBERS:
            self._stack.append(arg)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            self._stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "MARK":
            self._stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._remember(len(self._memo) if arg is None else arg)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._recall(arg))
        elif name in ("LIST", "DICT", "APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._collect(name)
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(f"the operation {name}")

    def _remember(self, place: int) -> None:
        value = self._top()
        is_long = isinstance(value, str | bytes) and len(value) > MAX_MEMO_BYTES
        if is_long or isinstance(value, list | dict):
            self._short_lived.append(place)
        self._memo[place] = value

    def _recall(self, place: int) -> Any:
        value = self._memo.get(place, _MARK)
        if value is _MARK:
            raise _Refused("a reference to nothing")
        if value is _FORGOTTEN:
            raise _Refused("a list, a dict or a long text that stands in two elements far apart")
        if isinstance(value, list | dict):
            self._copied.add(id(value))
        return self._copy(value)

    def _copy(self, value: Any) -> Any:
        """A list or dict as one of its own, so that every growth is paid for; other values as they are."""
        if isinstance(value, str | bytes):
            self._spend(len(value) // _TEXT_BYTES_PER_WORK)
            return value
        self._spend(_COPY_WORK)
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        return {k: self._copy(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _collect(self, name: str) -> None:
        """Takes values off the stack into a list or dict."""
        values = (
            [self._pop()]
            if name == "APPEND"
            else [self._pop(), self._pop()][::-1]
            if name == "SETITEM"
            else self._to_mark()
        )
        if name in ("LIST", "DICT"):
            self._stack.append([] if name == "LIST" else {})
        target = self._top()
        if id(target) in self._copied:  # it was not complete when it was referred to
            raise _Refused("a list or dict inside itself")
        if name in ("LIST", "APPEND", "APPENDS") and isinstance(target, list):
            target.extend(values)
        elif name in ("DICT", "SETITEM", "SETITEMS") and isinstance(target, dict) and len(values) % 2 == 0:
            keys = values[::2]
            if not all(isinstance(key, str) for key in keys) or any(key in target for key in keys):
                raise _Refused("a dict whose keys are not different texts")
            target.update(zip(keys, values[1::2], strict=True))
        else:
            raise _Refused(f"{name} where it cannot stand")

    def _to_mark(self) -> list[Any]:
        for i in range(len(self._stack) - 1, -1, -1):
            if self._stack[i] is _MARK:
                values = self._stack[i + 1 :]
                del self._stack[i:]
                return values
        raise _Refused("a missing mark")

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise _Refused("an empty stack")
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value
