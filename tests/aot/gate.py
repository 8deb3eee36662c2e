"""Compiles every Triton kernel for GPUs that need not be there, and reads from the machine code what would make it slow.

    python tests/aot/gate.py [--only NAME]      one line per kernel, specialisation and GPU; exit 1 when any of them fails

Triton's compiler needs no GPU when it is told the target. What it makes is opened with the tools that come with it:
`cuobjdump` gives registers and stack, `nvdisasm` the instructions. A kernel fails on stack use or local memory (spilled
registers), where it moves rows without a 128-bit access, and where it should use tensor cores and does not.

This says nothing about results (tests in the interpreter do) nor about speed (benchmarks on a GPU do). It runs in a process
of its own: a kernel that was defined under `TRITON_INTERPRET=1` cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
"""A100, H100 / H200, B200."""


@dataclass(frozen=True)
class Variant:
    """One kernel with the types and constants of one way it is launched.

    kernel          `module.function` in `mmscale.kernels.triton_kernels`
    types           argument -> Triton type, such as `*bf16` or `i32`; every other argument is a constant
    constants       argument -> value of a `constexpr`
    divisible       integer arguments that are multiples of 16 in this specialisation; pointers always are
    wide            it moves rows: 128-bit loads and stores are expected
    tensor_cores    it multiplies matrices: tensor-core instructions are expected
    must_fail       a control that is known to spill: it passes when the gate finds that
    """

    name: str
    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    wide: bool = False
    tensor_cores: bool = False
    must_fail: bool = False


@dataclass(frozen=True)
class Report:
    """What the machine code of a variant on one target holds. `faults` is empty when it passes."""

    name: str
    capability: int
    registers: int
    stack: int
    shared_bytes: int
    local_loads: int
    local_stores: int
    wide_loads: int
    wide_stores: int
    tensor_instructions: int
    seconds: float
    faults: tuple[str, ...]


def variants() -> list[Variant]:
    """Of all kernels: what the modules in `variants/` list."""
    sys.path.insert(0, str(HERE))
    found: list[Variant] = []
    for path in sorted((HERE / "variants").glob("*.py")):
        found += importlib.import_module(f"variants.{path.stem}").VARIANTS
    names = [v.name for v in found]
    assert len(set(names)) == len(names), "every variant has a name of its own"
    return found


def compile_and_read(job: tuple[Variant, int]) -> Report:
    """Compiles a variant for a target and reads its machine code."""
    variant, capability = job
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = variant.kernel.partition(".")
    kernel = getattr(importlib.import_module(f"mmscale.kernels.triton_kernels.{module}"), function)
    names = kernel.arg_names
    unknown = {*variant.types, *variant.constants, *variant.divisible} - {*names}
    assert not unknown, f"{variant.name}: {variant.kernel} has no arguments {sorted(unknown)}"
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = [name for name in names if signature[name].startswith("*") or name in variant.divisible]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    started = time.perf_counter()
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _said(tools / "cuobjdump", "-res-usage", file.name)
        code = _said(tools / "nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, f"{variant.name}: no resource usage in {usage!r}"
    registers, stack = map(int, match.groups())
    local_loads, local_stores = _count(r"\bLDL", code), _count(r"\bSTL", code)
    # cp.async (LDGSTS) is a load, too; from Hopper on bulk copies may take its place
    wide_loads = _count(r"\b(?:LDG|LDGSTS)\.E\.[\w.]*128", code) + _count(r"\bUBLKCP|\bUTMALDG", code)
    wide_stores = _count(r"\bSTG\.E\.[\w.]*128", code)
    tensor = _count(r"\b(?:HMMA|IMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)\b", code)
    faults = []
    if stack or local_loads or local_stores:
        faults.append(f"spills: stack {stack}, local loads and stores {local_loads} and {local_stores}")
    if variant.wide and not (wide_loads and wide_stores):
        faults.append(f"128-bit accesses expected, found {wide_loads} loads and {wide_stores} stores")
    if variant.tensor_cores and not tensor:
        faults.append("tensor-core instructions expected, found none")
    return Report(
        variant.name, capability, registers, stack, compiled.metadata.shared, local_loads, local_stores, wide_loads, wide_stores,
        tensor, round(time.perf_counter() - started, 2), tuple(faults),
    )  # fmt: skip


def _said(tool: Path, *args: str) -> str:
    done = subprocess.run([str(tool), *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _count(pattern: str, code: str) -> int:
    return len(re.findall(pattern, code))


def run(only: str = "", processes: int = 2) -> list[Report]:
    """The reports of all variants whose name holds `only`, on all targets."""
    jobs = [(variant, capability) for variant in variants() if only in variant.name for capability in CAPABILITIES]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(compile_and_read, jobs, chunksize=1)


def main() -> int:
    """Prints the table; 1 when a variant fails, or a control passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    controls = {variant.name for variant in variants() if variant.must_fail}
    reports = run(args.only)
    wrong = [report for report in reports if bool(report.faults) != (report.name in controls)]
    for report in reports:
        if args.json:
            print(json.dumps(asdict(report) | {"must_fail": report.name in controls}))
            continue
        said = "; ".join(report.faults) or "clean"
        print(
            f"sm_{report.capability:<4}{report.name:46} reg {report.registers:3} smem {report.shared_bytes:6} "
            f"wide {report.wide_loads:3}/{report.wide_stores:<3} mma {report.tensor_instructions:3} {report.seconds:5.1f} s  {said}",
            flush=True,
        )
    return int(bool(wrong))


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), "start it without TRITON_INTERPRET"
    # the default of triton 3.10 is another one: what is compiled here is what runs
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.exit(main())
