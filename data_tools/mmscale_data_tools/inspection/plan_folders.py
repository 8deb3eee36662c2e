"""A plan of dataset folders for which there is no run yet: lengths as measured or assumed, said openly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.config.schema import CostConfig
from mmscale.data_tools.inspection.plan_report import PlanInput, TokensByKind
from mmscale.data_tools.inspection.stats import count_tokens, read_texts
from mmscale.errors import BadSampleError
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.lengths import ALONE
from mmscale.streaming.plan import TOO_LONG, Plan, PlanRules
from mmscale.streaming.shards import Columns, ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MODALITIES, Sample

BYTES_PER_TOKEN = 4
_AUDIO_WINDOW_S = 30.0
_BATCH_ROWS = 1024
_7B_TOKEN, _7B_MEDIA_ROW = 53_406.0, 3_052.0
"""Per token and per media row, in units of the attention of one token pair: a 7B LLM with a 0.4B tower."""


@dataclass(frozen=True)
class Assumed:
    """What a run's config would say. `image_tokens`: per image and per frame; `frames`: of a clip, at most."""

    seq_len: int
    plan_group: int
    image_tokens: int
    frames: int
    audio_tokens_per_s: float

    @property
    def rules(self) -> PlanRules:
        """The rules of the plan; the cost is that of a 7B LLM with a 0.4B tower."""
        cost = CostConfig(token=_7B_TOKEN, pair=1.0, vision_input=_7B_MEDIA_ROW * self.image_tokens)
        return PlanRules(
            seq_len=self.seq_len, plan_group=self.plan_group, window=None, seed=0, shuffle_block=64,
            max_images_per_pack=None, cost=cost,
        )  # fmt: skip


def folder_plan(
    folders: Sequence[Path],
    assumed: Assumed,
    tokenizer: TextTokenizer | None,
    global_batch: int,
    on_batch: Callable[[], None] = ALONE.on_progress,
) -> PlanInput:
    """One epoch over all samples of some folders, by size.

    Args:
        folders: dataset folders.
        assumed: lengths of packs and media.
        tokenizer: counts the texts (without a chat template); None = `BYTES_PER_TOKEN` bytes of a row's files are a token.
        global_batch: packs of a step.
        on_batch: called after every 1024 samples or fewer while their tokens are counted.
    """
    own = [folder.resolve().name for folder in folders]
    names = own if len(set(own)) == len(own) else [str(folder) for folder in folders]
    sets = [ShardSet.open(folder, name) for folder, name in zip(folders, names, strict=True)]
    found = [_source(data, assumed, tokenizer, on_batch) for data in sets]
    sources = [source for source, _ in found]
    plan = Plan(sources, assumed.rules)
    packs = sum(int(source.tokens.sum(dtype=np.uint64)) for source in sources) / assumed.seq_len
    return PlanInput(
        plan=plan,
        tokens=[tokens for _, tokens in found],
        id_of=lambda source_idx, row: sets[source_idx].id(row),
        skipped=[data.skipped for data in sets],
        steps=max(1, round(packs / global_batch)),
        global_batch=global_batch,
    )


def _source(
    data: ShardSet, assumed: Assumed, tokenizer: TextTokenizer | None, on_batch: Callable[[], None]
) -> tuple[PlanSource, TokensByKind]:
    columns = data.columns
    reasons: dict[int, str] = {}
    text = _counted_text(data, tokenizer, reasons, on_batch) if tokenizer else _estimated_text(columns)
    seconds = columns.audio_samples / np.maximum(columns.rate_hz, 1)
    frames = np.minimum(columns.frames, assumed.frames)
    image, video, audio = (columns.modality == MODALITIES.index(m) for m in MODALITIES)
    tokens: TokensByKind = {
        "text": text,
        "image": _per_row(columns, image * assumed.image_tokens),
        "video": _per_row(columns, video * frames * assumed.image_tokens),
        "audio": _per_row(columns, audio * np.ceil(seconds * assumed.audio_tokens_per_s)),
    }
    total = sum(tokens.values(), np.zeros(1, np.int64))
    reasons |= dict.fromkeys(np.flatnonzero(total > assumed.seq_len).tolist(), TOO_LONG)
    reasons |= {row: "empty_text" for row in np.flatnonzero(total == 0).tolist() if row not in reasons}
    total[list(reasons)] = 0
    source = PlanSource(
        name=data.name,
        tokens=total.astype(np.uint32),
        vision=_per_row(columns, image + video * frames).astype(np.uint16),
        audio=_per_row(columns, audio * np.ceil(seconds / _AUDIO_WINDOW_S)).astype(np.uint16),
        reasons=reasons,
        share=Fraction(len(data)),
    )
    return source, tokens


def _counted_text(
    data: ShardSet, tokenizer: TextTokenizer, reasons: dict[int, str], on_batch: Callable[[], None]
) -> NDArray[np.int64]:
    """Text tokens of every row; rows that cannot be used go into `reasons`."""
    counts = np.zeros(len(data), np.int64)
    for lo in range(0, len(data), _BATCH_ROWS):
        rows = range(lo, min(lo + _BATCH_ROWS, len(data)))
        found = dict(zip(rows, read_texts(data, rows), strict=True))
        usable = {row: sample for row, sample in found.items() if isinstance(sample, Sample)}
        counts[list(usable)] = count_tokens(list(usable.values()), tokenizer)
        reasons |= {row: fault.reason for row, fault in found.items() if isinstance(fault, BadSampleError)}
        on_batch()
    return counts


def _estimated_text(columns: Columns) -> NDArray[np.int64]:
    return -(-_per_row(columns, columns.text_bytes) // BYTES_PER_TOKEN)


def _per_row(columns: Columns, values: NDArray[Any]) -> NDArray[np.int64]:
    """The sum of a number per member over the members of each row; a row has at least one."""
    return np.add.reduceat(values.astype(np.int64), columns.first[:-1])
