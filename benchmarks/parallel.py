"""Tokens per second of two processes against one, on the same two cores: what dividing the work costs.

One process computes with two threads, each of two processes with one, so that both sides have the whole machine. 1.0 means that
processes use it as well as threads do. Real processes of the real command; speeds and bytes are those of `metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result import Result, Settings
from benchmarks.step import run_config, write_data
from mmscale.config.load import dump_config
from mmscale.config.schema import Config

ROUNDS = 2
STEPS, WARM_UP = 10, 3
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the steps of a run: useful tokens per second, MB that rank 0 sent and share of the step that it waited."""

    tokens_per_s: float
    sent_mb: float
    wait_frac: float


def step_sp2_ratio(settings: Settings) -> Result:
    """Every pack over two ranks: by Ulysses, and for comparison by the exchange of keys and values."""
    runs = _race(settings, {"ulysses": ["parallel.ulysses=2"], "exchange": ["parallel.ring=2", "parallel.sp=exchange"]})
    return _result("step_sp2_ratio", ">= 0.7", runs, "ulysses")


def step_tp2_ratio(settings: Settings) -> Result:
    """Every layer over two ranks."""
    return _result("step_tp2_ratio", ">= 0.7", _race(settings, {"tensor": ["parallel.tensor=2"]}), "tensor")


def step_dp2_ratio(settings: Settings) -> Result:
    """Half of the packs on each of two ranks."""
    return _result("step_dp2_ratio", ">= 0.8", _race(settings, {"data": []}), "data")


def _race(settings: Settings, layouts: dict[str, Sequence[str]]) -> dict[str, Speed]:
    """The speed of one process (`one`) and of each layout of two, which take turns."""
    write_data(settings)
    config = run_config(settings, workers=0, steps=STEPS)
    path = settings.folder / "config.yaml"
    path.write_text(dump_config(_with_two_packs(config)), encoding="utf-8")
    found: dict[str, list[Speed]] = {"one": [], **{name: [] for name in layouts}}
    for number in range(ROUNDS):
        for name in found:
            folder = settings.folder / f"{name}-{number}"
            _train(path, folder, [] if name == "one" else layouts[name], 1 if name == "one" else 2)
            found[name].append(_speed(folder))
    return {name: _median(speeds) for name, speeds in found.items()}


def _with_two_packs(config: Config) -> Config:
    """A step of two packs on any layout, so that two data-parallel ranks have one each."""
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch": 2})})


def _train(config: Path, run: Path, words: Sequence[str], num_processes: int) -> None:
    """Trains on so many processes with two threads together; fails with what the first of them said."""
    threads = 2 // num_processes
    command = [
        sys.executable,
        "-m",
        "mmscale",
        "train",
        str(config),
        f"run.dir={run}",
        f"run.threads={threads}",
        *words,
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": str(threads)}
    logs = [run.with_suffix(f".{rank}.log") for rank in range(num_processes)]
    processes = []
    for rank, log in enumerate(logs):
        env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), f"{words}: exit codes {codes}\n" + "\n".join(log.read_text()[-2000:] for log in logs)


def _speed(run: Path) -> Speed:
    """Of the steps after the warm-up."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    return Speed(
        statistics.median(row["tokens_per_s"] for row in rows),
        statistics.median(sum(row["comm_bytes"].values()) for row in rows) / 1e6,
        statistics.median(row["comm_wait_s"] / row["step_time_s"] for row in rows),
    )


def _median(speeds: Sequence[Speed]) -> Speed:
    return Speed(
        *(
            statistics.median(column)
            for column in zip(*((s.tokens_per_s, s.sent_mb, s.wait_frac) for s in speeds), strict=True)
        )
    )


def _result(name: str, target: str, runs: dict[str, Speed], chosen: str) -> Result:
    one = runs["one"]
    texts = [
        f"{layout} {run.tokens_per_s:,.0f} ({run.sent_mb:.1f} MB sent per rank and step, {run.wait_frac:.0%} of it waiting)"
        for layout, run in runs.items()
        if layout != "one"
    ]
    peer = f"one process, two threads: {one.tokens_per_s:,.0f} tokens/s; two processes, one thread each: {'; '.join(texts)}"
    return Result(name, runs[chosen].tokens_per_s / one.tokens_per_s, "x", target, peer)
