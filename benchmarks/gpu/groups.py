"""What the GPU benchmarks consist of. Each group runs in a process of its own: after a fault on the device the others still can."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from benchmarks.gpu.measure import Bench, brief
from benchmarks.gpu.report import Report, read_lines

Part = Literal["tests", "kernels", "steps"]


@dataclass(frozen=True, slots=True)
class Group:
    """A module of `benchmarks.gpu` and what is different while its function runs.

    limit_s      seconds after which its process is ended
    settings     arguments of the function behind the bench
    environment  variables that are set; `without`: packages that cannot be imported
    """

    name: str
    part: Part
    module: str
    limit_s: float = 120.0
    function: str = "run"
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def _steps(
    name: str,
    settings: Mapping[str, Any] | None = None,
    function: str = "run_switched",
    limit_s: float = 100.0,
    without: tuple[str, ...] = (),
    **environment: str,
) -> Group:
    # whole steps fill the memory: without this a few gigabytes are lost between blocks of different sizes
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return Group(name, "steps", "steps", limit_s, function, settings or {}, environment, without)


_FROZEN_TOWER = {"llm": {"tune": "full"}, "vision": {"tune": "frozen"}, "vision_connector": {"tune": "full"}}

GROUPS: tuple[Group, ...] = (
    Group("tests", "tests", "suite", 500),
    Group("ceilings", "kernels", "ceilings"),
    Group("placement", "kernels", "placement"),
    Group("token_merge", "kernels", "merging"),
    Group("prologue", "kernels", "prologue"),
    Group("loss", "kernels", "loss", 200),
    Group("layers", "kernels", "layers"),
    Group("attention", "kernels", "attention"),
    _steps("steps", function="run", limit_s=240),
    _steps("steps padded", function="run_padded", limit_s=240),
    _steps("steps 1 chunk", {"name": "loss unbounded", "train": {"loss_memory_mb": 100_000}}),
    _steps("steps redone", {"name": "all recomputed", "train": {"checkpoint_activations": True}}),
    _steps("steps frozen", {"name": "tower frozen", "train": {"parts": _FROZEN_TOWER}}),
    _steps("steps -triton", {"name": "torch alone"}, MMSCALE_KERNELS="torch"),
    _steps("steps -liger", {"name": "without liger"}, without=("liger_kernel",)),
)


def run_group(name: str, lines: Path | None, *, dry: bool = False) -> Report:
    """Runs one group here; what it finds goes to `lines` at once, and an error is a failure among the rest."""
    group = next(g for g in GROUPS if g.name == name)
    report = Report(name, lines, dry=dry)
    seed = int(os.environ.get("MMSCALE_TEST_SEED") or secrets.randbelow(2**31))
    print(f"\n== {name}, seed {seed}", flush=True)
    known = read_lines(lines) if lines is not None else []
    # a dry run is about the code of the benchmarks: kernels in an interpreter would take hours
    environment = {**group.environment, **({"MMSCALE_KERNELS": "torch"} if dry else {})}
    with _set(environment), _hidden(group.without):
        try:
            torch.manual_seed(seed)
            device = torch.device("cpu" if dry else "cuda")
            bench = Bench(device, torch.float32 if dry else torch.bfloat16, report, dry, known=known)
            function = getattr(importlib.import_module(f"benchmarks.gpu.{group.module}"), group.function)
            function(bench, **group.settings)
        except Exception as error:  # the border of a group: the others go on
            traceback.print_exc()
            report.failure(brief(error))
    return report


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _hidden(packages: tuple[str, ...]) -> Iterator[None]:
    """Makes packages look as if they were not installed. In a process that imports them later."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    hidden = [name for name in packages if name not in modules]
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
