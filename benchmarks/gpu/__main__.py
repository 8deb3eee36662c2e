"""Runs GPU tests and benchmarks: `python -m benchmarks.gpu [--part all|tests|kernels|steps]`.

Figures are printed as they come and as a short table last; `benchmarks/results/<date>-<gpu>.json` holds all of them, also in the
folder that the variable OUT names. Exit code 1 when something did not work; a figure short of its target is no failure.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.gpu.groups import GROUPS, Group, run_group
from benchmarks.gpu.report import Entry, Failure, Report, read_lines, store, table

REPO = Path(__file__).parents[2]
RESULTS = REPO / "benchmarks" / "results"


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen groups; gives 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=("all", "tests", "kernels", "steps"), default="all")
    parser.add_argument("--only", default="", help="a part of the names of groups")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--limit-s", type=float, default=0.0, help="seconds after which no group starts or goes on")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, nothing is measured, no processes")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.group:
        run_group(args.group, args.lines)
        return 0
    if not args.dry and not torch.cuda.is_available():
        print("a CUDA GPU is expected, torch finds none; --dry runs without one", file=sys.stderr)
        return 2
    chosen = choose(args.part, args.only)
    limit_s = args.limit_s or (float("inf") if args.part == "all" else 560.0)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "entries.jsonl"
        entries = run_all(chosen, lines, limit_s, dry=args.dry)
    facts = describe(args.dry)
    name = re.sub(r"[^\w.-]+", "-", f"{facts['date']}-{facts['device']}.json")
    for target in filter(None, (str(args.results), os.environ.get("OUT"))):
        store(Path(target) / name, facts, entries)
    print(table(facts, entries), flush=True)
    return int(any(isinstance(entry, Failure) for entry in entries))


def choose(part: str, only: str) -> list[Group]:
    """The groups of a part, or of all, whose names hold `only`; with any kernel also the ceilings that it is held against."""
    chosen = [g for g in GROUPS if part in ("all", g.part) and only in g.name]
    ceilings = [
        g for g in GROUPS if g.name == "ceilings" and g not in chosen and any(c.part == "kernels" for c in chosen)
    ]
    return ceilings + chosen


def run_all(groups: list[Group], lines: Path, limit_s: float, *, dry: bool) -> list[Entry]:
    """The entries of all groups, each run in a process of its own unless `dry`; one that is ended keeps what it had found."""
    ends_at = time.monotonic() + limit_s
    for group in groups:
        left_s = ends_at - time.monotonic()
        problem = ""
        if left_s < 1:
            problem = f"not run: the {limit_s:.0f} s are over"
        elif dry:
            run_group(group.name, lines, dry=True)
        else:
            problem = in_process(group, lines, min(group.limit_s, left_s))
        if problem:
            Report(group.name, lines).failure(problem)
    return read_lines(lines)


def in_process(group: Group, lines: Path, limit_s: float) -> str:
    """Runs a group in a new process; gives what was wrong with its end, or nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--group", group.name, "--lines", str(lines)]
    with subprocess.Popen(command, cwd=REPO, start_new_session=True) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"ended after {limit_s:.0f} s"
    return f"its process ended with exit code {code}" if code else ""


def describe(dry: bool) -> dict[str, str]:
    """What the figures belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True, check=False
    )
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "liger-kernel")}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    device = "dry run on a CPU" if dry else torch.cuda.get_device_name()
    return {"date": today, "device": device, "commit": commit.stdout.strip() or "unknown", **versions}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    sys.exit(main())
