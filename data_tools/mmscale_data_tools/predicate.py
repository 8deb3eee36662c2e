"""A small language for conditions on samples: comparisons, `in`, `and`, `or`, `not`. It is parsed, never run as Python.

    width >= 64 and height >= 64        numbers of each medium: true when it is true for every medium that has one
    images <= 4 and text_bytes < 1e4    numbers of the sample
    json.lang in ["en", "de"]           fields of the `.json` member, as deep as they go; absent = None

A comparison of unlike things (`None < 5`) is false. `key` and `shard` are texts: `not "test" in key`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mmscale.errors import ConfigError
from mmscale.registry import nearest

MAX_CHARACTERS = 10_000

MEDIA_NAMES = ("width", "height", "pixels", "frames", "keyframes", "fps", "audio_s", "rate_hz", "bytes")
"""One number for each medium that has it: pixels as displayed, frames per second, seconds, Hz, bytes of the file."""

SAMPLE_NAMES = ("images", "videos", "audios", "text_bytes", "key", "shard")
"""One value for the sample: counts of media, bytes of its `.json` and `.txt`, texts."""


class Facts(Protocol):
    """What a condition can ask about a sample."""

    def named(self, name: str) -> Any:
        """A value of SAMPLE_NAMES, or for one of MEDIA_NAMES the list of its numbers."""

    def json(self) -> Any:
        """The `.json` member, None when there is none or it is not JSON."""


Condition = Callable[[Facts], bool]
_Value = Callable[[Facts], Any]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.eq, ast.IsNot: operator.ne, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


class _Each(list[Any]):
    """The numbers of all media of a sample."""


def parse_condition(text: str) -> Condition:
    """The condition that `text` says.

    Raises:
        ConfigError: it is no condition; the text names the word or sign at fault.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"--where has {len(text)} characters, at most {MAX_CHARACTERS} are read; shorten it")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        found = e.msg if isinstance(e, SyntaxError) else type(e).__name__
        raise ConfigError(
            f"--where {text[:200]!r} is no condition ({found}); write one such as 'width >= 64'"
        ) from None
    return lambda facts: _truth(value(facts))


def _value(node: ast.expr) -> _Value:
    """What gives the value of an expression; every kind of expression that is not named here is refused."""
    match node:
        case ast.BoolOp(op=op, values=parts):
            return _all(parts) if isinstance(op, ast.And) else _any(parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            inner = _value(part)
            return lambda facts: not _truth(inner(facts))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda facts: -number
        case ast.Compare():
            return _comparison(node)
        case ast.Constant(value=None | bool() | int() | float() | str() as constant):
            return lambda facts: constant
        case ast.List(elts=items) | ast.Tuple(elts=items):
            values = [_value(item) for item in items if isinstance(item, ast.Constant | ast.UnaryOp)]
            if len(values) == len(items):
                return lambda facts: [value(facts) for value in values]
        case ast.Name(id=name) if name != "json":
            return _named(name)
        case ast.Attribute() if fields := _json_fields(node):
            return lambda facts: _field(facts.json(), fields)
    raise ConfigError(
        f'--where: "{ast.unparse(node)[:80]}" cannot stand in a condition; use comparisons, in, and, or, not, numbers, texts, '
        f"json.FIELD and the names {', '.join(MEDIA_NAMES + SAMPLE_NAMES)}"
    )


def _all(parts: Sequence[ast.expr]) -> _Value:
    values = [_value(part) for part in parts]
    return lambda facts: all(_truth(value(facts)) for value in values)


def _any(parts: Sequence[ast.expr]) -> _Value:
    values = [_value(part) for part in parts]
    return lambda facts: any(_truth(value(facts)) for value in values)


def _comparison(node: ast.Compare) -> _Value:
    """`a < b < c` is `a < b and b < c`."""
    values = [_value(part) for part in (node.left, *node.comparators)]
    tests = [_COMPARE[type(op)] for op in node.ops]

    def compare(facts: Facts) -> bool:
        found = [value(facts) for value in values]
        return all(_holds(test, a, b) for test, a, b in zip(tests, found, found[1:], strict=False))

    return compare


def _holds(test: Callable[[Any, Any], Any], a: Any, b: Any) -> bool:
    if isinstance(a, _Each):
        return all(_holds(test, one, b) for one in a)
    if isinstance(b, _Each):
        return all(_holds(test, a, one) for one in b)
    try:
        return bool(test(a, b))
    except TypeError:  # unlike things, such as None and a number
        return False


def _truth(value: Any) -> bool:
    return all(value) if isinstance(value, _Each) else bool(value)


def _named(name: str) -> _Value:
    if name in MEDIA_NAMES:
        return lambda facts: _Each(facts.named(name))
    if name in SAMPLE_NAMES:
        return lambda facts: facts.named(name)
    raise ConfigError(
        f"--where: unknown name '{name}'; {nearest(name, MEDIA_NAMES + SAMPLE_NAMES)}; fields are json.{name}"
    )


def _json_fields(node: ast.expr) -> tuple[str, ...]:
    """`json.a.b` as ("a", "b"); empty when it is something else."""
    if isinstance(node, ast.Name):
        return ()
    if not isinstance(node, ast.Attribute):
        return ()
    if isinstance(node.value, ast.Name):
        return (node.attr,) if node.value.id == "json" else ()
    outer = _json_fields(node.value)
    return (*outer, node.attr) if outer else ()


def _field(value: Any, fields: Sequence[str]) -> Any:
    for field in fields:
        value = value.get(field) if isinstance(value, dict) else None
    return value
