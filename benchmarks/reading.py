"""Reading from page-cached shards, held against plain webdataset on the same files."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import write_photos, write_small_rows, write_tokenizer
from benchmarks.result import Result, Settings, interleaved, median_ratio
from mmscale.config.schema import DataConfig, SourceConfig
from mmscale.streaming.encode import Encoder
from mmscale.streaming.loader import Stream
from mmscale.streaming.shards import ShardSet
from mmscale.types import EncodedSample, ImageSpec, MediaSpecs, Sample

ROUNDS = 7


def read_ratio_75k(settings: Settings) -> Result:
    """Members read per CPU second from shards of 75 KB JPEGs with their JSON, ours / webdataset."""
    write_photos(settings.folder, 1000, seed=4)
    return _race("read_ratio_75k", settings.folder, ">= 5")


def read_ratio_2k(settings: Settings) -> Result:
    """Members read per CPU second from shards of 2 KB JSON rows, ours / webdataset."""
    write_small_rows(settings.folder, 5000, 2000, seed=5)
    return _race("read_ratio_2k", settings.folder, ">= 10")


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


@dataclass(frozen=True)
class Undecoded(Encoder):
    """Gives every sample a document of its planned length, without decoding or tokenising anything."""

    planned: dict[str, int] = field(default_factory=dict)

    def encode(self, sample: Sample) -> EncodedSample:
        """The filler document of `sample`."""
        return self.filler(sample.id, self.planned[sample.id])


def loader_cpu_ms(settings: Settings) -> Result:
    """CPU time per sample of the whole loader (plan, read, parse, collate, two processes and the way back), no decoding."""
    write_photos(settings.folder / "photos", 3000, seed=6)
    stream = _stream_without_decoding(settings.folder)
    urls = [str(path) for path in sorted((settings.folder / "photos").glob("*.tar"))]
    ours, theirs = [], []
    for _ in range(3):
        ours.append(cpu_ms_per_sample(lambda epochs: _read_stream(stream, epochs)))
        theirs.append(cpu_ms_per_sample(lambda epochs: _read_webdataset(urls, epochs)))
    peer = f"webdataset in a DataLoader, two processes, batches of 32, JSON parsed: {statistics.median(theirs):.3f}"
    return Result("loader_cpu_ms", statistics.median(ours), "ms", "<= 0.20", peer)


def cpu_ms_per_sample(read: Callable[[int], int]) -> float:
    """CPU milliseconds per sample, of this process and its children: three epochs less one, so that the start cancels.

    Args:
        read: reads so many epochs in processes that end inside, and gives the number of samples.
    """
    used, counts = [], []
    for epochs in (1, 3):
        before = _cpu_s()
        counts.append(read(epochs))
        used.append(_cpu_s() - before)
    return (used[1] - used[0]) / (counts[1] - counts[0]) * 1e3


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _stream_without_decoding(folder: Path) -> Stream:
    tokenizer = write_tokenizer(folder / "tokenizer")
    sources = {"photos": SourceConfig(path="photos")}
    # 24 documents of 576 image tokens and some text to a pack
    data = DataConfig(root=str(folder), sources=sources, seq_len=16_384, workers=2, plan_group=1)
    specs = MediaSpecs(image=ImageSpec(size=336, tokens=576))
    stream = Stream.open(data, sources, tokenizer, specs, global_batch=1, dp_rank=0, dp_size=1, workers=2)
    (source,), (plan,) = stream.sources, stream.plan_sources
    planned = {source.shards.id(row): int(tokens) for row, tokens in enumerate(plan.tokens)}
    return replace(stream, sources=(replace(source, encoder=Undecoded(**vars(source.encoder), planned=planned)),))


def _read_stream(stream: Stream, epochs: int) -> int:
    """Samples read in about so many epochs."""
    count = 0
    batches = stream.steps()
    for batch in batches:
        assert not any(pack.skipped for pack in batch.packs), "every photo is read"
        count += len(batch.ids)
        if batch.num_epochs >= epochs:
            break
    batches.close()
    return count


def _read_webdataset(urls: list[str], epochs: int) -> int:
    import webdataset

    def parse(sample: dict[str, Any]) -> tuple[str, int, int]:
        row = json.loads(sample["json"])
        return sample["__key__"], len(sample["jpg"]), len(row["conversations"])

    rows = webdataset.WebDataset(urls, shardshuffle=False).map(parse).batched(32)
    rows = rows.repeat(nepochs=epochs)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context="fork")
    return sum(len(batch[0]) for batch in loader)
