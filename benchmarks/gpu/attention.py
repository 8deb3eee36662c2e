"""The attention benchmarks of `benchmarks.attention` among the others; they need a GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.attention import attention_peak_share, attention_planned_overhead
from benchmarks.gpu.measure import Bench
from benchmarks.result import Settings


def run(bench: Bench) -> None:
    """Share of the peak on a pack of documents, and what a planned rank's spans cost."""
    if bench.dry:
        return
    for benchmark in (attention_peak_share, attention_planned_overhead):
        with tempfile.TemporaryDirectory() as folder:
            result = benchmark(Settings(bench.device.type, Path(folder)))
        print(f"{result.name}: {result.peer}", flush=True)
        bench.report.claim(result.name.removeprefix("attention_"), result.value, "", result.target)
