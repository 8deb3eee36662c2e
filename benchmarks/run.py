"""Runs benchmarks: `python -m benchmarks.run [PATTERN ...] [--device cpu|cuda]`.

A PATTERN is a part of a name or a shell pattern. Each result is one printed line and one entry of
`benchmarks/results/<device>.json`; entries of benchmarks that do not run stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from benchmarks import (
    attention,
    checkpoint,
    consolidate,
    decode,
    flops,
    indexed_reads,
    labels,
    loss,
    packing,
    parallel,
    planning,
    reading,
    sp_media,
    sp_plans,
    startup,
    step,
)
from benchmarks.result import Benchmark, Result, Settings

RESULTS = Path(__file__).parent / "results"

BENCHMARKS: tuple[Benchmark, ...] = (
    startup.help_s,
    packing.pack_fill_4k,
    packing.pack_fill_8k,
    packing.pack_fill_32k,
    packing.pack_fill_video_4k,
    packing.pack_us_per_sample,
    packing.cost_imbalance_8_8k,
    packing.cost_imbalance_64_8k,
    packing.cost_imbalance_256_8k,
    packing.cost_imbalance_64_32k,
    planning.plan_10m_start_s,
    planning.plan_10m_rss_mb,
    labels.labels_ms_16k,
    decode.decode224_ratio,
    indexed_reads.read_ratio_75k,
    indexed_reads.read_ratio_2k,
    indexed_reads.read_shuffled_ratio,
    indexed_reads.index_gb_per_s,
    reading.loader_cpu_ms,
    reading.e2e_ratio_webdataset,
    reading.corrupt_1pct_slowdown,
    startup.resume_first_batch_s,
    consolidate.consolidate_rss_ratio,
    sp_plans.sp_balance_mean,
    sp_plans.sp_balance_worst,
    sp_plans.sp_kv_ratio_mean,
    sp_media.vision_balance,
    loss.linear_ce_ratio_30,
    step.step_ratio_skewed,
    step.step_ratio_grouped,
    step.step_ratio_dense,
    step.step_overhead_frac,
    flops.step_not_compute_frac,
    flops.flop_counter_err,
    checkpoint.ckpt_async_blocked_frac,
    checkpoint.ckpt_sync_blocked_frac,
    checkpoint.ledger_overhead_frac,
)
"""Every benchmark; the function's name is the benchmark's name."""

CPU_BENCHMARKS: tuple[Benchmark, ...] = (parallel.step_sp2_ratio, parallel.step_tp2_ratio, parallel.step_dp2_ratio)
"""Those about two processes on two cores; they come last and not with `--device cuda`."""

CUDA_BENCHMARKS: tuple[Benchmark, ...] = (attention.attention_peak_share, attention.attention_planned_overhead)
"""Those that need a GPU; they come last and only with `--device cuda`."""


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmarks that match; gives 2 when none does. A value short of its target is no failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="parts of names, or shell patterns such as 'pack_*'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    known = BENCHMARKS + (CUDA_BENCHMARKS if args.device == "cuda" else CPU_BENCHMARKS)
    chosen = [b for b in known if any(p in b.__name__ or fnmatch(b.__name__, p) for p in args.patterns)]
    if not chosen:
        names = ", ".join(b.__name__ for b in known)
        print(f"no benchmark matches {' '.join(args.patterns)!r}; known: {names}", file=sys.stderr)
        return 2
    for benchmark in chosen:
        with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
            result = benchmark(Settings(args.device, Path(folder)))
        assert result.name == benchmark.__name__, "a benchmark gives a result under its own name"
        print(result.line(), flush=True)
        store(RESULTS / f"{args.device}.json", result)
    return 0


def store(path: Path, result: Result) -> None:
    """Puts one result into the results file."""
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[result.name] = result.entry()
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
