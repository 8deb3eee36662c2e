"""Random access to page-cached shards, held against plain webdataset on the same files and against reading in order."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import write_photos, write_small_rows
from benchmarks.result import Result, Settings, interleaved, median_ratio
from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.index import build_index
from mmscale.streaming.plan import Plan, PlanRules, PlanState
from mmscale.streaming.shards import ShardSet

ROUNDS = 7
PHOTO_TOKENS = 640
"""Tokens of a photo with its conversation; what they are changes the packs, not what is read."""


def read_ratio_75k(settings: Settings) -> Result:
    """Members read per CPU second from shards of 75 KB JPEGs with their JSON, ours / webdataset."""
    write_photos(settings.folder, 1000, seed=4)
    return _race("read_ratio_75k", settings.folder, ">= 5")


def read_ratio_2k(settings: Settings) -> Result:
    """Members read per CPU second from shards of 2 KB JSON rows, ours / webdataset."""
    write_small_rows(settings.folder, 5000, 2000, seed=5)
    return _race("read_ratio_2k", settings.folder, ">= 10")


def read_shuffled_ratio(settings: Settings) -> Result:
    """CPU time of reading an epoch of 75 KB photos pack by pack in the order of the plan / in the order of the tars."""
    write_photos(settings.folder, 3000, seed=7)
    shards = ShardSet.open(settings.folder, "photos")
    packs = _planned_packs(len(shards))
    assert sorted(row for pack in packs for row in pack) == list(range(len(shards))), "one epoch"
    sizes = [len(pack) for pack in packs]
    in_order = np.split(np.arange(len(shards)), np.cumsum(sizes)[:-1])
    actions = [lambda: _read_packs(shards, packs), lambda: _read_packs(shards, [rows.tolist() for rows in in_order])]
    shuffled_s, ordered_s = interleaved(actions, ROUNDS, time.process_time)
    us = [statistics.median(times) / len(shards) * 1e6 for times in (shuffled_s, ordered_s)]
    peer = f"CPU us per sample of 76 KB in packs of {statistics.mean(sizes):.0f}: shuffled {us[0]:.1f}, in order {us[1]:.1f}"
    return Result("read_shuffled_ratio", median_ratio(shuffled_s, ordered_s), "x", "<= 1.3", peer)


def index_gb_per_s(settings: Settings) -> Result:
    """GB of tar indexed per CPU second, in one process from the page cache: shards of 75 KB JPEGs with their JSON."""
    write_photos(settings.folder, 1000, seed=8)
    tars = sorted(settings.folder.glob("*.tar"))
    size = sum(tar.stat().st_size for tar in tars)
    (times,) = interleaved([lambda: [build_index(tar) for tar in tars]], ROUNDS, time.process_time)
    used_s = statistics.median(times)
    peer = f"{used_s / 1000 * 1e6:.0f} CPU us per sample: tar headers, names, the picture's own header"
    return Result("index_gb_per_s", size / used_s / 1e9, "GB/s", ">= 1", peer)


def _planned_packs(num_rows: int) -> list[list[int]]:
    """The rows of each pack of the first epoch."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(PHOTO_TOKENS // 2, 2 * PHOTO_TOKENS, num_rows).astype(np.uint32)
    ones, zeros = np.ones(num_rows, np.uint16), np.zeros(num_rows, np.uint16)
    source = PlanSource("photos", tokens, ones, zeros, max_epochs=1)
    data = DataConfig(sources={"photos": SourceConfig(path="photos")}, seq_len=16_384)
    plan = Plan((source,), PlanRules.of(data, CostConfig(token=1.0, pair=0.0)))
    return [[draw.row for draw in pack] for pack, _, _ in plan.packs(PlanState())]


def _read_packs(shards: ShardSet, packs: Iterable[list[int]]) -> None:
    for pack in packs:
        shards.read_many(pack)


def _race(name: str, folder: Path, target: str) -> Result:
    shards = ShardSet.open(folder, "rows")
    urls = [str(shard.path) for shard in shards.shards]
    same = [dict(members) for members in _ours(shards)] == [_members(sample) for sample in _webdataset(urls)]
    assert same, "both read the same bytes"
    num_members = len(shards.columns.size)
    actions = [lambda: deque(_ours(shards), maxlen=0), lambda: deque(_webdataset(urls), maxlen=0)]
    ours_s, theirs_s = interleaved(actions, ROUNDS, time.process_time)
    ours_us, theirs_us = (statistics.median(times) / num_members * 1e6 for times in (ours_s, theirs_s))
    size_kb = int(shards.columns.size.sum()) / num_members / 1e3
    peer = f"CPU us per member of {size_kb:.1f} KB on average: ours {ours_us:.1f}, webdataset {theirs_us:.1f}"
    return Result(name, median_ratio(theirs_s, ours_s), "x", target, peer)


def _ours(shards: ShardSet) -> Iterator[list[tuple[str, bytes]]]:
    return (shards.members(row) for row in range(len(shards)))


def _webdataset(urls: list[str]) -> Iterator[dict[str, Any]]:
    import webdataset

    return iter(webdataset.WebDataset(urls, shardshuffle=False))


def _members(sample: dict[str, Any]) -> dict[str, bytes]:
    return {key: value for key, value in sample.items() if not key.startswith("__")}
