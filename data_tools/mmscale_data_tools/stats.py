"""What is in a dataset folder, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmscale.errors import BadSampleError
from mmscale.streaming.shards import ShardSet
from mmscale.types import MODALITIES


@dataclass(frozen=True, slots=True)
class Spread:
    """Sum and spread of a quantity over the samples or files that have it."""

    count: int
    total: float
    smallest: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True, slots=True)
class Stats:
    """Numbers of a dataset. `spreads`: quantity (with its unit) -> Spread; `skipped`: by reason; `media`: files by kind."""

    shards: int
    bytes: int
    samples: int
    skipped: Counter[str]
    media: Counter[str]
    spreads: dict[str, Spread]


def dataset_stats(folder: Path, on_row: Callable[[int, int], None] | None = None) -> Stats:
    """Statistics of a dataset folder: lengths from the index, turns and text from the rows themselves.

    Args:
        folder: dataset folder with a manifest.
        on_row: called with (rows done, rows in all) now and then.
    """
    data = ShardSet.open(folder, folder.name)
    columns = data.columns
    skipped, turns, text_bytes = Counter(data.skipped), [], []
    for row in range(len(data)):
        try:
            sample = data.read(row)
        except BadSampleError as e:
            skipped[e.reason] += 1
        else:
            turns.append(len(sample.turns))
            text_bytes.append(sum(len(turn.text.encode()) for turn in sample.turns))
        if on_row and row % 256 == 0:
            on_row(row, len(data))
    has_size, has_rate = columns.width > 0, columns.rate_hz > 0
    kinds = Counter(
        dict(zip(MODALITIES, np.bincount(columns.modality[columns.modality >= 0], minlength=3).tolist(), strict=True))
    )
    spreads = {
        "turns per sample": _spread(np.array(turns)),
        "text per sample, bytes": _spread(np.array(text_bytes)),
        "image width, pixels": _spread(columns.width[has_size]),
        "image height, pixels": _spread(columns.height[has_size]),
        "audio, seconds": _spread(columns.audio_samples[has_rate] / columns.rate_hz[has_rate]),
    }
    size = sum(shard.index.tar_size for shard in data.shards)
    return Stats(len(data.shards), size, len(turns), skipped, kinds, {k: v for k, v in spreads.items() if v.count})


def _spread(values: np.ndarray) -> Spread:
    if not values.size:
        return Spread(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    middle, high = np.percentile(values, [50, 95])
    return Spread(
        values.size, float(values.sum()), float(values.min()), float(middle), float(high), float(values.max())
    )
