"""What is in a dataset folder, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import BadSampleError
from mmscale.streaming.index import TEXT_EXTENSIONS
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import Columns, ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MEDIA_TOKENS, MODALITIES, Sample

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Spread:
    """Sum and spread of a quantity over the samples or files that have it."""

    count: int
    total: float
    smallest: float
    median: float
    p95: float
    largest: float


@dataclass(frozen=True)
class Stats:
    """Numbers of a dataset.

    `skipped`: samples by reason; `media`: files by kind; `text_tokens`: by the media that stand beside the text (`text` =
    none), empty without a tokenizer; `values`: quantity (with its unit) -> one number per sample or file that has it.
    """

    shards: int
    bytes: int
    samples: int
    skipped: Counter[str]
    media: Counter[str]
    text_tokens: Counter[str]
    values: Mapping[str, NDArray[Any]]

    @property
    def spreads(self) -> dict[str, Spread]:
        """Sum and spread of each quantity."""
        return {name: _spread(values) for name, values in self.values.items()}


def dataset_stats(
    folder: Path, on_row: Callable[[int, int, str], None] | None = None, tokenizer: TextTokenizer | None = None
) -> Stats:
    """Statistics of a dataset folder: media from the index, turns and text from the rows themselves; no medium is read.

    Args:
        folder: dataset folder with a manifest.
        on_row: called with (rows done, rows in all, what) now and then.
        tokenizer: counts tokens of the turns' texts, without chat template and media.
    """
    data = ShardSet.open(folder, folder.name)
    skipped, text_tokens = Counter(data.skipped), Counter[str]()
    turns: list[int] = []
    text_bytes: list[int] = []
    tokens: list[int] = []
    for lo in range(0, len(data), _BATCH_ROWS):
        found = read_texts(data, range(lo, min(lo + _BATCH_ROWS, len(data))))
        samples = [sample for sample in found if isinstance(sample, Sample)]
        skipped.update(fault.reason for fault in found if isinstance(fault, BadSampleError))
        turns += [len(sample.turns) for sample in samples]
        text_bytes += [sum(len(turn.text.encode()) for turn in sample.turns) for sample in samples]
        if tokenizer:
            counts = count_tokens(samples, tokenizer)
            tokens += counts
            for sample, n in zip(samples, counts, strict=True):
                text_tokens[_kind(sample)] += n
        if on_row:
            on_row(min(lo + _BATCH_ROWS, len(data)), len(data), "")
    values = {"turns per sample": turns, "text per sample, bytes": text_bytes, "text per sample, tokens": tokens}
    columns = data.columns
    arrays = {name: np.array(value) for name, value in values.items()} | _media_values(columns)
    return Stats(
        shards=len(data.shards),
        bytes=sum(shard.index.tar_size for shard in data.shards),
        samples=len(turns),
        skipped=skipped,
        media=_media_files(columns),
        text_tokens=text_tokens,
        values={name: value for name, value in arrays.items() if value.size},
    )


def count_tokens(samples: Sequence[Sample], tokenizer: TextTokenizer) -> list[int]:
    """Tokens of each sample's texts, without chat template and media placeholders."""
    texts = [(i, turn.text) for i, sample in enumerate(samples) for turn in sample.turns]
    for i, (owner, text) in enumerate(texts):
        for modality in {item.modality for item in samples[owner].media}:
            text = text.replace(MEDIA_TOKENS[modality], "")
        texts[i] = owner, text
    counts = [0] * len(samples)
    for (owner, _), ids in zip(texts, tokenizer.encode_batch([text for _, text in texts]), strict=True):
        counts[owner] += len(ids)
    return counts


def read_texts(data: ShardSet, rows: range) -> list[Sample | BadSampleError]:
    """The samples of some rows with empty media, of which nothing is read, or why one cannot be used."""
    found: list[Sample | BadSampleError] = []
    for row in rows:
        number, i = data.locate(row)
        media = [(ext, b"") for ext in data.shards[number].sizes(i) if modality_of(ext)]
        try:
            found.append(parse_sample(data.id(row), media + data.members(row, keep=TEXT_EXTENSIONS.__contains__)))
        except BadSampleError as error:
            found.append(error)
    return found


def _kind(sample: Sample) -> str:
    """`image`, `image audio`, ...: which media a sample has; `text` without any."""
    return " ".join(m for m in MODALITIES if any(item.modality == m for item in sample.media)) or "text"


def _media_files(columns: Columns) -> Counter[str]:
    codes = np.bincount(columns.modality[columns.modality >= 0], minlength=len(MODALITIES))
    return Counter(dict(zip(MODALITIES, codes.tolist(), strict=True)))


def _media_values(columns: Columns) -> dict[str, NDArray[Any]]:
    image, video = (columns.modality == MODALITIES.index(m) for m in ("image", "video"))
    clip, sound = video & (columns.fps_milli > 0), columns.rate_hz > 0
    return {
        "image width, pixels": columns.width[image & (columns.width > 0)],
        "image height, pixels": columns.height[image & (columns.height > 0)],
        "video, seconds": columns.frames[clip] * 1000.0 / columns.fps_milli[clip],
        "video, frames": columns.frames[clip],
        "audio, seconds": columns.audio_samples[sound] / columns.rate_hz[sound],
    }


def _spread(values: NDArray[Any]) -> Spread:
    middle, high = np.percentile(values, [50, 95])
    return Spread(
        values.size, float(values.sum()), float(values.min()), float(middle), float(high), float(values.max())
    )
