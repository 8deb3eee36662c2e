"""What it takes to open ten million samples and to plan the first window, in a fresh process, from synthetic shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.data import lognormal, write_tokenizer
from benchmarks.result import Result, Settings
from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.streaming.index import MEMBER_COLUMNS, ShardIndex, encode_index, index_path
from mmscale.streaming.lengths import COLUMNS, encode_lengths, lengths_places
from mmscale.streaming.loader import Stream, open_encoder
from mmscale.streaming.manifest import Manifest, ShardEntry, idx_digest, write_manifest
from mmscale.streaming.plan import PlanState
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import ImageSpec, MediaSpecs

NUM_SHARDS, ROWS = 1000, 10_000
SPECS = MediaSpecs(ImageSpec(size=224, tokens=196))


def plan_10m_start_s(_: Settings) -> Result:
    """Wall time of a process that opens ten million samples and plans the first window."""
    found = _measured()
    text = f"{found['imports_s']:.1f} s of them imports, {found['first_window_s']:.1f} s the first window"
    peer = "a permutation of 10 million rows in numpy alone: 0.5 s and 80 MB in every process"
    return Result("plan_10m_start_s", found["seconds"], "s", "<= 30", f"{text}; {peer}")


def plan_10m_rss_mb(_: Settings) -> Result:
    """Peak resident memory of that process."""
    found = _measured()
    text = f"{found['imports_mb']:.0f} MB of them after the imports; lengths of all rows are 80 MB"
    return Result("plan_10m_rss_mb", found["rss_mb"], "MB", "<= 1000", text)


@cache
def _measured() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as folder:
        _write_dataset(Path(folder))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", os.getcwd()]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.planning", folder, str(time.time())]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        measured: dict[str, float] = json.loads(done.stdout)
        return measured


def _write_dataset(folder: Path) -> None:
    """Shards without content, their indexes and lengths, all alike."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    rows = folder / "rows"
    rows.mkdir()
    index = _index()
    data = encode_index(index)
    entries = []
    for number in range(NUM_SHARDS):
        tar = rows / f"{number:06}.tar"
        with tar.open("wb") as file:
            file.truncate(index.tar_size)
        os.utime(tar, (0, 0))  # older than the manifest: it need not be hashed again
        index_path(tar).write_bytes(data)
        entries.append(ShardEntry(tar.name, ROWS, index.tar_size, f"{number:064x}", idx_digest(data)))
    write_manifest(rows, Manifest(tuple(entries)))
    rng = np.random.default_rng(0)
    columns = {name: np.zeros(ROWS, dtype) for name, dtype in COLUMNS.items()}
    columns["tokens"][:] = lognormal(rng, 180, 1.0, 16, 3500, ROWS) + 196
    columns["image_tokens"][:], columns["vision"][:] = 196, 1
    lengths = encode_lengths(columns, {})
    encoder = open_encoder(_data(folder), SourceConfig(path="rows"), tokenizer, SPECS)
    for shard in ShardSet.open(rows, "rows").shards:
        lengths_places(shard, encoder)[0].write_bytes(lengths)


def _index() -> ShardIndex:
    """A shard of pairs of a picture of 60 KB and its text."""
    size = np.tile([60_000, 400], ROWS).astype("<u8")
    block = 512 + -(-size // 512) * 512
    columns = {name: np.zeros(2 * ROWS, dtype) for name, dtype in MEMBER_COLUMNS.items()}
    columns["size"], columns["offset"] = size, np.cumsum(block) - block + 512
    columns["width"][::2], columns["height"][::2], columns["frames"][::2] = 640, 480, 1
    columns["text_bytes"][1::2], columns["ext"][1::2] = 400, 1
    columns["first"] = np.arange(0, 2 * ROWS + 1, 2, dtype="<u8")
    keys = "\n".join(f"{i:09}" for i in range(ROWS)).encode()
    return ShardIndex(int(block.sum()) + 1024, "0" * 16, ("jpg", "json"), columns, keys, {})


def _data(folder: Path) -> DataConfig:
    return DataConfig(root=str(folder), sources={"rows": SourceConfig(path="rows")}, seq_len=4096, plan_group=64)


def main(folder: Path, started: float) -> None:
    """Opens and plans, and prints what it took as JSON; times count from `started`, a Unix time."""
    imported, imports_mb = time.time(), _peak_mb()
    tokenizer = TextTokenizer.load(folder / "tokenizer")
    data = _data(folder)
    sizes = {"global_batch": 64, "dp_rank": 0, "dp_size": 1, "workers": 0}
    cost = CostConfig(token=1.0, pair=1e-5, vision_input=50.0)
    stream = Stream.open(data, data.sources, tokenizer, SPECS, cost=cost, **sizes)
    assert sum(source.num_rows for source in stream.plan.sources) == NUM_SHARDS * ROWS, "every row is there"
    opened = time.time()
    step = next(stream.plan.steps(PlanState(), 64))
    assert len(step.packs) == 64, "a whole step is planned"
    ended = time.time()
    figures = {"seconds": ended - started, "imports_s": imported - started, "first_window_s": ended - opened}
    print(json.dumps({**figures, "imports_mb": imports_mb, "rss_mb": _peak_mb()}))


def _peak_mb() -> float:
    """Peak resident memory of this program; what getrusage says begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
