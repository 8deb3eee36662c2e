"""YAML files plus `a.b=value` words in, a checked `Config` out; every complaint names the file, the line and the key."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mmscale.config.schema import Config
from mmscale.errors import ConfigError
from mmscale.redact import find_secrets, hidden_keys, hide, redact_values
from mmscale.registry import nearest

_TAGS = ("map", "seq", "str", "int", "float", "bool", "null")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars people mean: `1e-4` is a float, `no`, `0777` and `12:30:00` stay strings."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|false|False)$", "tTfF"),
    ("null", r"^(?:null|Null|~|)$", "nN~"),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$", "-+0123456789."),
):  # fmt: skip
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first, ""] if _tag == "null" else list(_first)
    )


@dataclass
class _Document:
    """Plain values of merged YAML files, and where each dotted key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def merge(self, other: _Document) -> None:
        _merge(self.values, other.values)
        self.places.update(other.places)


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _construct(node: yaml.Node, loader: _Loader, path: str, file: str, places: dict[str, str]) -> Any:
    """Python values of a node; refuses duplicate and non-string keys and remembers the line of every key."""
    if node.tag.removeprefix("tag:yaml.org,2002:") not in _TAGS:
        raise ConfigError(
            f"{file}:{node.start_mark.line + 1}: this is not plain YAML: tag {node.tag}; write a plain value"
        )
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            line = f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise ConfigError(f"{line}: a key must be text, found {key!r}; put it in quotes")
            if key in result:
                raise ConfigError(f"{line}: the key '{key}' is written twice in one section; remove one")
            dotted = f"{path}.{key}" if path else key
            places[dotted] = line
            result[key] = _construct(value_node, loader, dotted, file, places)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, loader, f"{path}.{i}", file, places) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _parse(text: str, file: str) -> _Document:
    document = _Document()
    try:
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.AliasToken):  # aliases of aliases can stand for more values than memory holds
                line = token.start_mark.line + 1
                raise ConfigError(f"{file}:{line}: YAML aliases are not read; write the value out, or use `include`")
        loader = _Loader(text)
        node = loader.get_single_node()
        values = _construct(node, loader, "", file, document.places) if node is not None else {}
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        RecursionError,
    ) as error:  # the last three: a tag that its text contradicts
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{file}{where}: this is not plain YAML: {problem}; write plain keys and values") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected sections (`model:`, `data:`, ...), found {type(values).__name__}")
    document.values = values
    return document


def _read(path: Path, stack: tuple[Path, ...] = ()) -> _Document:
    """One file with its includes; later files and the file's own keys win over what it includes."""
    path = path.resolve()
    if path in stack:
        raise ConfigError(f"{path} includes itself through {' -> '.join(str(p) for p in stack)}; break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, found byte {error.start} that is not; save it as UTF-8"
        ) from error
    own = _parse(text, str(path))
    includes = own.values.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(i, str) for i in includes):
        raise ConfigError(f"{own.places['include']}: `include` takes a list of paths relative to this file")
    document = _Document()
    for name in includes:
        document.merge(_read(path.parent / name, (*stack, path)))
    document.merge(own)
    return document


def _override(document: _Document, word: str) -> None:
    key, separator, text = word.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        raise ConfigError(f"override '{word}': expected a.b=value, such as train.lr=1e-4")
    place = f"override '{word}'"
    value = _parse(f"value: {text}" if text else "value: null", place).values["value"]
    *parents, last = key.split(".")
    section = document.values
    for parent in parents:
        child = section.setdefault(parent, {})
        if not isinstance(child, dict):
            child = section[parent] = {}
        section = child
    section[last] = value
    document.places[key] = place


def _known_keys(model: type[BaseModel], location: Sequence[Hashable]) -> list[str]:
    """The keys that are allowed at a location of the schema."""
    current: Any = model
    for part in location:
        annotation = (
            current.model_fields[part].annotation if _is_section(current) and part in current.model_fields else None
        )
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        current = next((c for c in candidates if _is_section(c)), current if annotation is None else None)
    return list(current.model_fields) if _is_section(current) else []


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _explain(error: ValidationError, places: Mapping[str, str]) -> str:
    """One line per fault: place, key, what was expected and found, what to do."""
    lines = []
    for fault in error.errors(include_url=False):
        location = [str(part) for part in fault["loc"]]
        key = ".".join(location)
        place = next((places[k] for k in _prefixes(location) if k in places), None)
        where = f"{place}: " if place else ""
        if fault["type"] == "extra_forbidden":
            lines.append(f"{where}unknown key '{key}'; {nearest(location[-1], _known_keys(Config, location[:-1]))}")
        elif fault["type"] == "missing":
            lines.append(f"{where}'{key}' is required and missing; add it")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            found = "" if fault["type"] == "value_error" else f", found {fault['input']!r}"
            lines.append(f"{where}{key}: {message[0].lower()}{message[1:]}{found}")
    return "; ".join(lines)


def _prefixes(location: Sequence[str]) -> Iterable[str]:
    return (".".join(location[:n]) for n in range(len(location), 0, -1))


def _absolute(config: Config) -> Config:
    """The same config with every path absolute, so that the saved copy reruns from any folder."""
    is_remote = "://" in config.data.root
    root = config.data.root if is_remote else str(Path(config.data.root).absolute())

    def existing(path: str | None) -> str | None:
        """Relative to `data.root` when found there, else to the current folder."""
        if path is None or Path(path).is_absolute():
            return path
        below = Path(root) / path
        return str(below if not is_remote and below.exists() else Path(path).absolute())

    def part(section: Any) -> Any:
        return section and section.model_copy(update={"path": existing(section.path)})

    model = config.model.model_copy(
        update={name: part(getattr(config.model, name)) for name in ("llm", "vision", "audio", "tokenizer")}
    )
    return config.model_copy(
        update={
            "model": model,
            "data": config.data.model_copy(update={"root": root}),
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir).absolute())}),
        }
    )  # fmt: skip


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of a run, with absolute paths.

    Args:
        path: YAML file; its `include` list names files that it builds on, relative to itself.
        overrides: `a.b.c=value` words, the value parsed as YAML (`1e-4` is a float); they win over the files.

    Raises:
        ConfigError: unreadable or unsafe YAML, duplicate or unknown key, wrong type; the text gives file, line and key.
    """
    document = _read(Path(path))
    for word in overrides:
        _override(document, word)
    hide(find_secrets(document.values))  # before anything is said about a value
    try:
        return _absolute(Config.model_validate(document.values))
    except ValidationError as error:
        raise ConfigError(_explain(error, document.places)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of one YAML file, read with the same care as a config. Raises ConfigError naming file and line."""
    return _read(path).values


def dump_config(config: Config) -> str:
    """The config as YAML, to be kept: `load_config` reads an equal config back, but for the secrets in addresses and commands."""
    values = redact_values(config.model_dump(mode="json"))
    hidden = hidden_keys(values)
    note = (
        f"# Secrets were left out (***) of: {', '.join(hidden)}. To rerun, give these keys again.\n" if hidden else ""
    )
    return note + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
