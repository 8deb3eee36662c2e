"""The whole loader on page-cached shards, held against webdataset in a DataLoader on the same files."""

from __future__ import annotations

import io
import json
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.data import write_photos, write_tokenizer
from benchmarks.result import Result, Settings, median_ratio
from mmscale.config.schema import CostConfig, DataConfig, SourceConfig
from mmscale.data_tools.indexing import index_folder
from mmscale.streaming.encode import Encoder
from mmscale.streaming.loader import StepBatch, Stream
from mmscale.streaming.shards import ShardSet
from mmscale.types import EncodedSample, ImageSpec, MediaSpecs, Sample

SIDE = 224
"""Pixels of the pictures' sides after decoding."""


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
    # 26 documents of 576 image tokens and some text to a pack
    stream = _without_decoding(_open_photos(settings.folder, ImageSpec(size=336, tokens=576), seq_len=16_384))
    urls = _urls(settings.folder / "photos")
    ours, theirs = _race_loaders(stream, lambda epochs: _read_webdataset(urls, epochs, _parse), rounds=3)
    peer = f"webdataset in a DataLoader, two processes, batches of 32, JSON parsed: {statistics.median(theirs):.3f}"
    return Result("loader_cpu_ms", statistics.median(ours), "ms", "<= 0.20", peer)


def e2e_ratio_webdataset(settings: Settings) -> Result:
    """Samples per CPU second from 75 KB JPEGs to packs of 224-pixel pictures and tokens, ours / webdataset with Pillow."""
    write_photos(settings.folder / "photos", 1000, seed=7)
    stream = _open_photos(settings.folder, ImageSpec(size=SIDE, tokens=196), seq_len=8192)
    urls = _urls(settings.folder / "photos")
    _check_same_pixels(stream, urls)
    ours, theirs = _race_loaders(stream, lambda epochs: _read_webdataset(urls, epochs, _decode_and_parse), rounds=3)
    found = f"CPU ms per sample, two processes: ours {statistics.median(ours):.2f} (with tokens, labels and packing)"
    peer = f"{found}, webdataset + Pillow in a DataLoader, batches of 32 {statistics.median(theirs):.2f}"
    return Result("e2e_ratio_webdataset", median_ratio(theirs, ours), "x", ">= 1.5", peer)


def corrupt_1pct_slowdown(settings: Settings) -> Result:
    """Share by which CPU time per sample grows when 1 % of the pictures are damaged; same plan, every one skipped by name."""
    clean, damaged = settings.folder / "clean", settings.folder / "damaged"
    write_photos(clean / "photos", 600, seed=8)
    shutil.copytree(clean, damaged)
    bad = _damage(damaged / "photos", every=100)
    spec = ImageSpec(size=SIDE, tokens=196)
    streams = [replace(_open_photos(folder, spec, seq_len=2048), workers=0) for folder in (clean, damaged)]
    used, skipped, num_samples = _read_in_turn(streams, epochs=5)
    assert skipped == [set(), bad], "every damaged picture is named"
    clean_ms, damaged_ms = (sum(times) / num_samples * 1e3 for times in used)
    peer = f"CPU ms per sample in one process, pack by pack in turn: whole {clean_ms:.3f}, 1 % damaged {damaged_ms:.3f}"
    peer = f"{peer}; webdataset's warn_and_continue sleeps 500 ms per bad sample"
    return Result("corrupt_1pct_slowdown", damaged_ms / clean_ms - 1, "", "<= 0.02", peer)


def _read_in_turn(streams: list[Stream], epochs: int) -> tuple[list[list[float]], list[set[str]], int]:
    """CPU seconds of each stream's steps, the ids that it skipped, and the number of samples of one stream.

    A shared machine changes its speed within seconds, so the streams take turns at each step.
    """
    readers = [_epochs(stream, epochs) for stream in streams]
    used: list[list[float]] = [[] for _ in streams]
    skipped: list[set[str]] = [set() for _ in streams]
    num_samples = 0
    while True:
        ids = []
        for reader, times, names in zip(readers, used, skipped, strict=True):
            began = time.process_time()
            batch = next(reader, None)
            times.append(time.process_time() - began)
            if batch is None:
                return used, skipped, num_samples
            names.update(skip.id for pack in batch.packs for skip in pack.skipped)
            ids.append(batch.ids)
        assert all(others == ids[0] for others in ids), "damage does not move the plan"
        num_samples += len(ids[0])


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


def _open_photos(folder: Path, spec: ImageSpec, seq_len: int) -> Stream:
    tokenizer = write_tokenizer(folder / "tokenizer")
    sources = {"photos": SourceConfig(path="photos")}
    data = DataConfig(root=str(folder), sources=sources, seq_len=seq_len, workers=2, plan_group=1, max_bad=1.0)
    specs = MediaSpecs(image=spec)
    sizes = {"global_batch": 1, "dp_rank": 0, "dp_size": 1, "workers": 2}
    return Stream.open(data, sources, tokenizer, specs, cost=CostConfig(token=1.0, pair=0.0), **sizes)


def _without_decoding(stream: Stream) -> Stream:
    (source,), (plan,) = stream.sources, stream.plan.sources
    planned = {source.shards.id(row): int(tokens) for row, tokens in enumerate(plan.tokens)}
    return replace(stream, sources=(replace(source, encoder=Undecoded(**vars(source.encoder), planned=planned)),))


def _race_loaders(stream: Stream, peer: Callable[[int], int], rounds: int) -> tuple[list[float], list[float]]:
    """CPU milliseconds per sample of the stream and of a peer that reads so many epochs, in turn."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(cpu_ms_per_sample(lambda epochs: _count(stream, epochs)))
        theirs.append(cpu_ms_per_sample(peer))
    return ours, theirs


def _epochs(stream: Stream, epochs: int) -> Iterator[StepBatch]:
    """The steps of about so many epochs."""
    batches = stream.steps()
    try:
        for batch in batches:
            yield batch
            if batch.num_epochs >= epochs:
                return
    finally:
        batches.close()


def _count(stream: Stream, epochs: int) -> int:
    """Reads about so many epochs; the number of their samples."""
    return sum(len(batch.ids) for batch in _epochs(stream, epochs))


def _damage(folder: Path, every: int) -> set[str]:
    """Wipes the second half of every so-many-th picture of a dataset and indexes it again; the ids of those samples."""
    shards, bad = ShardSet.open(folder, "photos"), set()
    for row in range(0, len(shards), every):
        number, i = shards.locate(row)
        start, size = shards.offset(row), shards.shards[number].sizes(i)["jpg"]
        with (folder / shards.shards[number].path.name).open("r+b") as file:
            file.seek(start + size // 2)
            file.write(b"\xff" * (size - size // 2))
        bad.add(shards.id(row))
    index_folder(folder)
    return bad


def _urls(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def _parse(sample: dict[str, Any]) -> tuple[str, int, int]:
    return sample["__key__"], len(sample["jpg"]), len(json.loads(sample["json"])["conversations"])


def _decode_and_parse(sample: dict[str, Any]) -> tuple[str, torch.Tensor, int]:
    with Image.open(io.BytesIO(sample["jpg"])) as image:
        pixels = np.array(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return (
        sample["__key__"],
        torch.from_numpy(pixels).permute(2, 0, 1),
        len(json.loads(sample["json"])["conversations"]),
    )


def _check_same_pixels(stream: Stream, urls: list[str]) -> None:
    import webdataset

    (source,) = stream.sources
    theirs = map(_decode_and_parse, webdataset.WebDataset(urls, shardshuffle=False))
    for row, (key, pixels, _) in zip(range(8), theirs, strict=False):
        document = source.encoder.encode(source.shards.read(row))
        difference = (document.media[0].data[0].int() - pixels.int()).abs().float().mean()
        assert document.id.endswith(key) and difference < 0.01, "both give the same pixels of 0 to 255"


def _read_webdataset(urls: list[str], epochs: int, use: Callable[[dict[str, Any]], tuple[Any, ...]]) -> int:
    import webdataset

    rows = webdataset.WebDataset(urls, shardshuffle=False).map(use).batched(32)
    rows = rows.repeat(nepochs=epochs)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context="fork")
    return sum(len(batch[0]) for batch in loader)
