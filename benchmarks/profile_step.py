"""Where a CPU step's time goes: `python -m benchmarks.profile_step` prints tables and writes them to
`benchmarks/results/step_profile_cpu.md`. The model is that of the step race, the data are the
instruction mix with about 8 documents to a pack."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.result import Settings
from benchmarks.run import RESULTS
from benchmarks.step import SIZES, opened, run_config, write_data
from mmscale.streaming.loader import StepBatch
from mmscale.train.setup import Run

WARM_UP, TIMED, PROFILED = 3, 20, 8
TOP = 20

GROUPS = {
    "matrix products": (
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
    ),
    "attention": ("flash_attention", "scaled_dot_product"),
    "loss": ("softmax", "nll_loss", "logsumexp", "cross_entropy"),
    "reading, tokenising, collating": ("DataLoader",),
    "optimizer and clipping": ("_fused_adamw", "_foreach"),
}
"""Group -> parts of operator names, first match wins; the rest is elementwise work, copies and lookups."""
REST, PYTHON = "elementwise, copies, lookups", "Python and dispatch between operators"


@dataclass(frozen=True, slots=True)
class Phases:
    """Median seconds of one step, without the profiler."""

    data: float
    forward_backward: float
    update: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.data + self.forward_backward + self.update


def main() -> None:
    """Profiles and writes the tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
        settings = Settings("cpu", Path(folder))
        write_data(settings)
        with opened(run_config(settings, workers=0, head_rows=SIZES["cpu"].head_rows)) as (run, _):
            steps = run.stream.steps()
            for _ in range(WARM_UP):
                _step(run, steps)
            phases = _phases(run, steps)
            text = report(phases, _profiled(run, steps), run)
            steps.close()
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_profile_cpu.md").write_text(text)


def _step(run: Run, steps: Iterator[StepBatch]) -> tuple[float, float, float]:
    """One step; the CPU seconds of its three phases."""
    marks = [time.process_time()]
    batch = next(steps)
    marks.append(time.process_time())
    run.engine.forward_backward(batch.packs, sum(pack.num_targets for pack in batch.packs))
    marks.append(time.process_time())
    run.engine.step([group.lr for group in run.groups])
    marks.append(time.process_time())
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def _phases(run: Run, steps: Iterator[StepBatch]) -> Phases:
    times = [_step(run, steps) for _ in range(TIMED)]
    return Phases(*(statistics.median(column) for column in zip(*times, strict=True)))


def _profiled(run: Run, steps: Iterator[StepBatch]) -> tuple[list[Any], float]:
    """The profiler's averages by operator, and the seconds of all profiled steps."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(PROFILED):
            _step(run, steps)
        took = time.perf_counter() - started
    return list(profiler.key_averages()), took


def group_of(operator: str) -> str:
    """The group of an operator by its name.

    Example:
        >>> group_of("aten::addmm")
        'matrix products'
    """
    return next((group for group, parts in GROUPS.items() if any(part in operator for part in parts)), REST)


def report(phases: Phases, profiled: tuple[list[Any], float], run: Run) -> str:
    """The tables as Markdown."""
    averages, took = profiled
    averages = sorted(averages, key=lambda a: -a.self_cpu_time_total)
    by_group: dict[str, float] = defaultdict(float)
    for average in averages:
        by_group[group_of(average.key)] += average.self_cpu_time_total / 1e6
    by_group[PYTHON] = max(0.0, took - sum(by_group.values()))
    parameters = sum(p.numel() for group in run.groups for p in group.params)
    lines = [
        "# Where the time of a CPU step goes",
        "",
        f"`python -m benchmarks.profile_step`, {time.strftime('%Y-%m-%d')}: {platform.machine()}, one thread, torch {torch.__version__}.",
        f"{parameters / 1e6:.1f} M parameters, one pack of {run.config.data.seq_len} tokens per step, fp32, lengths of the",
        "instruction mix, about 8 documents to a pack, read and decoded in the same process.",
        "",
        f"| phase (median of {TIMED} steps, without the profiler) | CPU ms | share |",
        "|---|---|---|",
    ]
    for name, seconds in (
        ("data: plan, read, decode, tokenise, collate", phases.data),
        ("forward and backward", phases.forward_backward),
        ("clipping and update", phases.update),
    ):
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {seconds / phases.total:.1%} |")
    lines += ["", f"| kind of work ({PROFILED} steps, with the profiler) | ms per step | share |", "|---|---|---|"]
    lines += [
        f"| {name} | {s / PROFILED * 1e3:.1f} | {s / took:.1%} |"
        for name, s in sorted(by_group.items(), key=lambda item: -item[1])
    ]
    lines += ["", "| operator | calls per step | self ms per step | share |", "|---|---|---|---|"]
    for average in averages[:TOP]:
        own_s = average.self_cpu_time_total / 1e6
        calls = average.count / PROFILED
        lines.append(f"| `{average.key}` | {calls:.1f} | {own_s / PROFILED * 1e3:.2f} | {own_s / took:.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
