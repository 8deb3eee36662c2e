"""The tests of the kernels as a group of their own: pytest's counts as figures, its failures as failures.

Tests of `tests/numerics` that take the GPU where there is one run with it: kernels are compiled then, not interpreted.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.measure import Bench

REPO = Path(__file__).parents[2]
ON_ANY_DEVICE = ("tests/numerics/test_downsample_norm.py", "tests/numerics/test_token_merge.py")
"""Files whose tests take the GPU where there is one; the others of their folder are about the CPU."""
PROCESSES = 4
"""On one GPU, where pytest-xdist is installed: most of the time is compilation on the host."""


def run(bench: Bench) -> None:
    """Runs `tests/gpu` and `ON_ANY_DEVICE`; a dry run the former only, whose tests skip themselves without a GPU."""
    folders = ["tests/gpu", *(() if bench.dry else ON_ANY_DEVICE)]
    spread = [] if bench.dry or importlib.util.find_spec("xdist") is None else ["-n", str(PROCESSES)]
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *spread]
        code = subprocess.run([*command, "--show-capture=no", *folders], cwd=REPO, check=False).returncode
        if not results.exists():
            bench.report.failure(f"pytest ended with exit code {code} and wrote no results")
            return
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    report(bench, cases)


def report(bench: Bench, cases: list[ElementTree.Element]) -> None:
    """Counts, and one failure for each test that failed."""
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    bench.report.claim("passed", len(cases) - len(failed) - len(skipped))
    bench.report.claim("skipped", len(skipped))
    bench.report.claim("failed", len(failed), "", "== 0")
    bench.report.claim("seconds of tests", sum(float(case.get("time", 0)) for case in cases))
    for case in failed:
        bench.report.failure(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}: {_why(case)}")


def _why(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    message = "" if found is None else found.get("message") or ""
    return (message.strip().splitlines() or ["no message"])[0][:160]
