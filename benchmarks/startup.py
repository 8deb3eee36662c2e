"""How long a user waits: for the help text, and for the first batch after a restart."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np

from benchmarks.data import lognormal, write_conversations, write_tokenizer
from benchmarks.result import Result, Settings
from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.streaming.loader import Stream, StreamState
from mmscale.streaming.plan import PlanState, _planned
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MediaSpecs

NUM_ROWS = 20_000
PLACES = (10, 1000, 100_000)
"""Packs before the resume points."""
WINDOWS_RUN = 8
"""Windows that are really planned before the resume point, so that its carry is a typical one."""


def help_s(_: Settings) -> Result:
    """Wall time of a whole `mmscale --help` process."""
    command = [sys.executable, "-m", "mmscale", "--help"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p),
    }
    bare = [sys.executable, "-c", "pass"]
    times: dict[str, list[float]] = {"help": [], "bare": []}
    for _round in range(7):
        for name, argv in (("help", command), ("bare", bare)):
            started = time.perf_counter()
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=environment)
            times[name].append(time.perf_counter() - started)
    peer = f"an empty Python process: {statistics.median(times['bare']):.2f} s"
    return Result("help_s", statistics.median(times["help"]), "s", "<= 0.5", peer)


def resume_first_batch_s(settings: Settings) -> Result:
    """Wall time from opening the data to the first batch, two loader processes included, at the slowest of three places."""
    tokenizer = write_tokenizer(settings.folder / "tokenizer")
    lengths = lognormal(np.random.default_rng(3), 120, 0.8, 20, 1000, NUM_ROWS)
    write_conversations(settings.folder / "rows", lengths.tolist(), seed=3)
    took = {}
    for num_packs in PLACES:
        saved = _state_after(open_stream(settings.folder, tokenizer), num_packs)
        times = []
        for _ in range(5):
            _planned.cache_clear()  # a new process has planned nothing yet
            started = time.perf_counter()
            stream = open_stream(settings.folder, tokenizer)
            batches = stream.steps(stream.restore(json.loads(saved)))
            next(batches)
            times.append(time.perf_counter() - started)
            batches.close()
        took[num_packs] = statistics.median(times)
    replay = _replay_s(settings.folder / "rows")
    peer = f"webdataset has no state: replaying one epoch of these {NUM_ROWS} rows, read only, takes {replay:.1f} s"
    places = ", ".join(f"{seconds:.2f} s after {num_packs} packs" for num_packs, seconds in took.items())
    text = f"{places}; the last state has {len(saved)} bytes; {peer}"
    return Result("resume_first_batch_s", max(took.values()), "s", "<= 1", text)


def open_stream(folder: Path, tokenizer: TextTokenizer) -> Stream:
    """The stream of the rows in `folder` with two loader processes."""
    sources = {"rows": SourceConfig(path="rows")}
    data = DataConfig(root=str(folder), sources=sources, seq_len=4096, workers=2)
    options = {"global_batch": 8, "dp_rank": 0, "dp_size": 1, "workers": data.workers}
    cost = CostConfig(token=1.0, pair=0.0)
    return Stream.open(data, sources, tokenizer, MediaSpecs(), cost=cost, **options)


def _state_after(stream: Stream, num_packs: int) -> str:
    """A resume point after about so many packs, as JSON; the last windows before it are really planned."""
    plan = stream.plan
    per_window = sum(1 for _ in takewhile(lambda found: found[2].window == 0, plan.packs(PlanState())))
    window = num_packs // per_window
    start = PlanState(window=max(0, window - WINDOWS_RUN))
    wanted = window, max(1, num_packs % per_window - 1)
    late = next(after for _, _, after in plan.packs(start) if (after.window, after.pack) >= wanted)
    return json.dumps(StreamState(stream.facts, replace(late, step=num_packs // stream.global_batch)).to_dict())


def _replay_s(folder: Path) -> float:
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    started = time.perf_counter()
    count = sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))
    assert count == NUM_ROWS, "webdataset reads every row"
    return time.perf_counter() - started
