"""What a run of the GPU benchmarks has found: entries that are stored as they come, a results file, a short table."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
MAX_LINES = 30
"""Of the table: what one looks at when everything else has scrolled away."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One implementation of one case.

    ms           median time on the device, without the launches' time on the host; NaN = it ran out of memory
    spread       the larger over the smaller of two medians, less 1
    host_ms      median time until the call has returned on the host, the device busy with something else
    peak_mb      most device memory in use during the call, less that before it
    extra_mb     most device memory in use during the call, less that of the result
    floor_share  time that reading inputs and writing outputs once takes (or the products of matrices) over `ms`; 0 = not stated
    """

    group: str
    case: str
    impl: str
    ms: float
    spread: float
    host_ms: float
    peak_mb: float
    extra_mb: float
    floor_share: float

    def line(self) -> str:
        """For the log."""
        floor = f"  {self.floor_share:4.0%} of floor" if self.floor_share else ""
        return (
            f"time {self.case:44} {self.impl:16} {self.ms:9.4f} ms +{self.spread:.1%}  host {self.host_ms:.3f} ms  "
            f"peak {self.peak_mb:,.0f} MB  extra {self.extra_mb:,.1f} MB{floor}"
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure with what it should be: `target` is an operator and a number such as `>= 5`, or empty for a figure without one."""

    group: str
    text: str
    value: float
    unit: str = ""
    target: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the value meets the target; NaN never does."""
        compare, _, bound = self.target.partition(" ")
        return not self.target or _COMPARE[compare](self.value, float(bound))

    def short(self) -> str:
        """For the table."""
        wanted = f" ({self.target} {'ok' if self.is_ok else 'SHORT'})" if self.target else ""
        return f"{self.text} {self.value:.4g}{self.unit}{wanted}"

    def line(self) -> str:
        """For the log."""
        return f"figure {self.group}: {self.short()}"


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that did not work, with its last line of error."""

    group: str
    text: str

    def line(self) -> str:
        """For the log and the table."""
        return f"FAILED {self.group}: {self.text}"


Entry = Timing | Claim | Failure
_KINDS: dict[str, type[Entry]] = {"timing": Timing, "claim": Claim, "failure": Failure}


class Report:
    """Takes the entries of one group: prints each, and appends it to a file of JSON lines at once."""

    def __init__(self, group: str, path: Path | None = None, *, dry: bool = False) -> None:
        self.group = group
        self.entries: list[Entry] = []
        self._path = path
        self._dry = dry

    def timing(self, case: str, impl: str, **numbers: float) -> Timing:
        """Adds a `Timing`."""
        entry = Timing(self.group, case, impl, **numbers)
        self.add(entry)
        return entry

    def claim(self, text: str, value: float, unit: str = "", target: str = "") -> None:
        """Adds a `Claim`; a dry run's figures have no targets, as its times mean nothing."""
        self.add(Claim(self.group, text, value, unit, "" if self._dry else target))

    def failure(self, text: str) -> None:
        """Adds a `Failure`."""
        self.add(Failure(self.group, text))

    def add(self, entry: Entry) -> None:
        """Adds any entry."""
        self.entries.append(entry)
        print(entry.line(), flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(as_json(entry)) + "\n")


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry for a results file; numbers with five digits, NaN as null."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(entry, cls))
    values = {"kind": kind, **{name: _rounded(value) for name, value in asdict(entry).items()}}
    return values | {"ok": entry.is_ok} if isinstance(entry, Claim) else values


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None


def of_json(values: Mapping[str, Any]) -> Entry:
    """The entry that `as_json` gave."""
    numbers = {
        name: math.nan if value is None else value for name, value in values.items() if name not in ("kind", "ok")
    }
    return _KINDS[values["kind"]](**numbers)


def read_lines(path: Path) -> list[Entry]:
    """The entries of a file of JSON lines, of which the last may be cut short: its writer was ended."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(of_json(json.loads(line)))
        except json.JSONDecodeError:
            break
    return entries


def store(path: Path, facts: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Writes a results file. Entries of groups that did not run this time stay as they are."""
    known = json.loads(path.read_text())["entries"] if path.exists() else []
    ran = {entry.group for entry in entries}
    kept = [values for values in known if values["group"] not in ran]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = ",\n".join(json.dumps(values) for values in [*kept, *map(as_json, entries)])
    temporary.write_text(f'{json.dumps(dict(facts), indent=1)[:-2]},\n "entries": [\n{lines}\n]}}\n')
    os.replace(temporary, path)


def table(facts: Mapping[str, Any], entries: Sequence[Entry], width: int = 170) -> str:
    """At most `MAX_LINES` lines: the figures of each group side by side, then the failures."""
    lines = ["", " | ".join(f"{name} {value}" for name, value in facts.items())[:width]]
    failures = [entry.line()[:width] for entry in entries if isinstance(entry, Failure)]
    summary = (
        f"{len(failures)} failed, {sum(isinstance(e, Claim) and not e.is_ok for e in entries)} short of their target"
    )
    for group in dict.fromkeys(entry.group for entry in entries):
        figures = [entry.short() for entry in entries if isinstance(entry, Claim) and entry.group == group]
        lines += _filled(f"{group:13}", figures, width)
    room = MAX_LINES - len(lines) - 1
    if len(failures) > room:
        room = max(room - 1, 1)
        failures = [*failures[:room], f"... and {len(failures) - room} more failures, see the results file"]
    return "\n".join([*lines[: MAX_LINES - 1 - len(failures)], *failures, summary])


def _filled(head: str, parts: Iterable[str], width: int) -> list[str]:
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" | {part}"
        else:
            lines.append(f"{head if not lines else ' ' * len(head)} {part}"[:width])
    return lines
