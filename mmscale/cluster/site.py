"""Settings of a cluster: `slurm/site.env`, which bash reads in the job and this module reads for `mmscale submit`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from mmscale.cluster.times import parse_time
from mmscale.errors import ConfigError
from mmscale.registry import nearest

LEAD_S = 120
_EXPORT = "export "


@dataclass(frozen=True, slots=True)
class Site:
    """What the site file says, each key in upper case there; see `slurm/site.env.example` for their meaning.

    The keys from `venv` on are read by the job itself; the others become options of sbatch.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    export: str = ""
    sbatch_extra: str = ""
    lead_s: int = LEAD_S
    procs_per_node: int | None = None
    venv: str | None = None
    modules: str | None = None
    container: str | None = None
    container_runtime: str = "apptainer"
    mounts: str | None = None


def read_site(path: Path) -> Site:
    """The settings in a site file.

    The file is plain: `KEY=value` with the quotes of a shell, comments, and `export NAME=value` lines, which only the job reads.

    Raises:
        ConfigError: the file cannot be read, a line is none of these, a key is unknown, or a number or time is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the site file {path}: {error}; correct MMSCALE_SITE or --site") from error
    values: dict[str, str | int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith(("#", _EXPORT)):
            key, value = _setting(line, f"{path}:{number}")
            values[key] = value
    return Site(**values)  # type: ignore[arg-type]  # _setting has checked names and types


def _setting(line: str, where: str) -> tuple[str, str | int]:
    key, separator, text = line.strip().partition("=")
    if not separator or not re.fullmatch(r"[A-Z_]+", key):
        raise ConfigError(
            f"{where}: expected KEY=value or `export NAME=value`, found {line.strip()!r}; correct the line"
        )
    kinds = {field.name: str(field.type) for field in fields(Site)}
    if key.lower() not in kinds:
        raise ConfigError(f"{where}: unknown key {key}; {nearest(key, [name.upper() for name in kinds])}")
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ConfigError(
            f"{where}: expected a value with closed quotes, found {text!r} ({error}); close them"
        ) from error
    if len(words) > 1:
        raise ConfigError(f"{where}: expected one value, found {len(words)} words in {text!r}; put them in quotes")
    value = words[0] if words else ""
    if "$" in value:
        raise ConfigError(f"{where}: expected a plain value, found {value!r}; write out what the variable stands for")
    return key.lower(), _typed(key, value, kinds[key.lower()], where)


def _typed(key: str, value: str, kind: str, where: str) -> str | int:
    if key == "TIME":
        try:
            parse_time(value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    if key == "CONTAINER_RUNTIME" and value not in ("apptainer", "pyxis"):
        raise ConfigError(f"{where}: expected CONTAINER_RUNTIME=apptainer or pyxis, found {value!r}; write one of them")
    if not kind.startswith("int"):
        return value
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(
            f"{where}: expected {key} to be a number of at least 1, found {value!r}; correct it or remove the line"
        )
    return int(value)
