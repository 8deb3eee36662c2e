"""How long a user waits: for the help text, and for the first batch after a restart."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.data import lognormal, write_conversations, write_tokenizer
from benchmarks.result import Result, Settings
from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.streaming.loader import Stream, StreamState
from mmscale.streaming.plan import Plan, PlanState
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MediaSpecs

NUM_ROWS = 20_000
EPOCHS_BEFORE = 50
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
    """Wall time from opening the data to the first batch, far into a run, two loader processes included."""
    tokenizer = write_tokenizer(settings.folder / "tokenizer")
    lengths = lognormal(np.random.default_rng(3), 120, 0.8, 20, 1000, NUM_ROWS)
    write_conversations(settings.folder / "rows", lengths.tolist(), seed=3)
    late = _late_state(open_stream(settings.folder, tokenizer))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        stream = open_stream(settings.folder, tokenizer)
        batches = stream.steps(stream.restore(json.loads(late)))
        next(batches)
        times.append(time.perf_counter() - started)
        batches.close()
    replay = _replay_s(settings.folder / "rows")
    peer = f"webdataset has no state: replaying one epoch of these {NUM_ROWS} rows, read only, takes {replay:.1f} s"
    text = f"after {EPOCHS_BEFORE} epochs, state {len(late)} bytes; {peer}"
    return Result("resume_first_batch_s", statistics.median(times), "s", "<= 1", text)


def open_stream(folder: Path, tokenizer: TextTokenizer) -> Stream:
    """The stream of the rows in `folder` with two loader processes."""
    sources = {"rows": SourceConfig(path="rows")}
    data = DataConfig(root=str(folder), sources=sources, seq_len=4096, workers=2)
    options = {"global_batch": 8, "dp_rank": 0, "dp_size": 1, "workers": data.workers}
    return Stream.open(data, sources, tokenizer, MediaSpecs(), **options)


def _late_state(stream: Stream) -> str:
    """A resume point of many epochs later, as JSON."""
    data = stream.data
    plan = Plan(
        stream.plan_sources, seq_len=data.seq_len, plan_group=data.plan_group, window=data.window, seed=data.seed
    )
    start = PlanState(window=EPOCHS_BEFORE * NUM_ROWS // plan.window)
    places = (after for _, _, after in plan.packs(start))
    late = next(p for p in places if p.window == start.window + WINDOWS_RUN and p.pack == 8)
    return json.dumps(StreamState(stream.facts, replace(late, step=100_000)).to_dict())


def _replay_s(folder: Path) -> float:
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    started = time.perf_counter()
    count = sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))
    assert count == NUM_ROWS, "webdataset reads every row"
    return time.perf_counter() - started
