"""Every Triton kernel compiles without spills for the GPUs it is meant for, none of which is needed here."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which compiles the kernels")

GATE = Path(__file__).parent / "gate.py"
FOLDER = Path(__file__).parents[2] / "kernels/mmscale_kernels/triton_kernels"


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    """What the gate says of every kernel, specialisation and target."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(GATE), "--json"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout and done.returncode in (0, 1), done.stderr[-3000:]  # 1: some kernel fails, which a test names
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_all_kernels_are_clean(reports) -> None:
    faults = [(r["name"], r["capability"], r["faults"]) for r in reports if r["faults"] and not r["must_fail"]]
    assert not faults
    assert {r["capability"] for r in reports} == {80, 90, 100}


def test_a_kernel_that_spills_is_found(reports) -> None:
    """The gate itself is tested: a backward pass that keeps a gradient of 10,368 columns in registers does spill."""
    controls = [r for r in reports if r["must_fail"]]
    assert len(controls) == 3, "one for each target"
    assert all(any("spills" in fault for fault in r["faults"]) for r in controls)


def test_every_kernel_is_in_the_gate(monkeypatch) -> None:
    monkeypatch.syspath_prepend(GATE.parent)
    listed = {variant.kernel for variant in importlib.import_module("gate").variants()}
    for path in FOLDER.glob("*.py"):
        defined = re.findall(r"^@triton\.jit.*\ndef (\w+)", path.read_text(), flags=re.MULTILINE)
        launched = [name for name in defined if not name.startswith("_")]
        missing = [name for name in launched if f"{path.stem}.{name}" not in listed]
        assert not missing, f"{path.name}: {missing} are not compiled by the gate"
