"""The configuration reference as Markdown, made from the schema."""

from __future__ import annotations

import types
import typing

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mmscale.config.schema import Config

_HEAD = """# Configuration reference

Made from the schema by `python -m mmscale.config.reference > docs/configuration.md`; a test keeps it current.
A config is a YAML file; `include: [other.yaml, ...]` builds on other files (paths relative to the including file), and
words `a.b=value` on the command line win over the files. Unknown keys are errors.
"""


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _type_text(kind: object) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " \\| ".join(str(a) for a in arguments)
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " \\| ".join("null" if a is type(None) else _type_text(a) for a in arguments)
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else _type_text(a) for a in arguments)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return getattr(kind, "__name__", str(kind))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next((kind for kind in kinds if _is_section(kind)), None)
        key = f"{prefix}{name}"
        if inner is None:
            rows.append(f"| `{key}` | {_type_text(field.annotation)} | {_default_text(field)} | {field.description} |")
            continue
        named = typing.get_origin(field.annotation) is dict
        rows.append(f"| **`{key}`** | {'named sections' if named else 'section'} | | {field.description} |")
        rows.extend(_rows(inner, f"{key}.NAME." if named else f"{key}."))
    return rows


def config_reference() -> str:
    """The whole reference: one table per top-level section."""
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        assert _is_section(field.annotation), f"top-level key {name} must be a section"
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *_rows(field.annotation, f"{name}.")]  # type: ignore[arg-type]
        parts.append(f"## {name}\n{field.description}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    import sys

    sys.stdout.write(config_reference())
