"""Encoded documents into one pack. Labels, positions, borders and media places are final here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.errors import DataError
from mmscale.types import (
    IGNORE,
    MODALITIES,
    EncodedMedia,
    EncodedSample,
    MediaBatch,
    MediaSpecs,
    Modality,
    PackedBatch,
    Skip,
)

Ints = NDArray[np.int64]


def collate(documents: Sequence[EncodedSample], specs: MediaSpecs, skipped: Sequence[Skip] = ()) -> PackedBatch:
    """The pack of `documents`, in their order; its fields are described at `PackedBatch`.

    Args:
        documents: at least one; each has at least one token.
        specs: gives the connector rows per tower input, on which `source_index` depends.
        skipped: the documents, by id, that are filler for a sample that could not be used; they are not counted.
    """
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    input_ids = torch.cat([d.input_ids for d in documents])
    is_target = torch.cat([d.is_target for d in documents])
    labels = _shifted_labels(input_ids, is_target, starts)
    media, source_index, media_positions = _place_media(documents, starts, specs, total=len(input_ids))
    cu_seqlens = torch.zeros(len(documents) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.from_numpy(np.cumsum(lengths))
    position_ids = np.arange(len(input_ids)) - np.repeat(starts, lengths)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=cu_seqlens,
        labels=labels,
        target_idx=torch.nonzero(labels != IGNORE).flatten(),
        source_index=torch.from_numpy(source_index),
        media_positions=torch.from_numpy(media_positions),
        media=media,
        lengths=tuple(lengths.tolist()),
        ids=tuple(d.id for d in documents),
        tokens=_count_tokens(documents, media, skipped),
        skipped=tuple(skipped),
    )


def _shifted_labels(input_ids: torch.Tensor, is_target: torch.Tensor, starts: Ints) -> torch.Tensor:
    """What each position predicts. The first token of a document is nobody's target, so no document sees the next one."""
    predicted = is_target.clone()
    predicted[torch.from_numpy(starts)] = False
    labels = torch.full_like(input_ids, IGNORE)
    labels[:-1] = torch.where(predicted[1:], input_ids[1:], IGNORE)
    return labels


def _place_media(
    documents: Sequence[EncodedSample], starts: Ints, specs: MediaSpecs, total: int
) -> tuple[dict[Modality, MediaBatch], Ints, NDArray[np.int32]]:
    """The media of the pack, the row that stands at each position, and the position of each media row (-1 = none)."""
    source_index = np.arange(total, dtype=np.int64)
    positions = [np.zeros(0, np.int32)]
    media: dict[Modality, MediaBatch] = {}
    first_row = total
    for modality in MODALITIES:
        items = [(i, m) for i, d in enumerate(documents) for m in d.media if m.modality == modality]
        if not items:
            continue
        batch = _gather(items, starts)
        num_rows = batch.num_inputs.numpy() * specs.rows_per_input(modality)
        _check_rows(items, documents, num_rows)
        for (_, item), slot, count in zip(items, batch.slot.tolist(), num_rows.tolist(), strict=True):
            # An item without a map takes its first rows: all of them, but for the last, part-filled audio window.
            row = np.arange(item.num_tokens) if item.rows is None else item.rows
            is_media = row >= 0
            source_index[slot : slot + item.num_tokens][is_media] = first_row + row[is_media]
            own = np.full(count, -1, np.int32)
            own[row[is_media]] = slot + np.flatnonzero(is_media)
            positions.append(own)
            first_row += count
        media[modality] = batch
    return media, source_index, np.concatenate(positions)


def _gather(items: list[tuple[int, EncodedMedia]], starts: Ints) -> MediaBatch:
    document = np.array([i for i, _ in items], dtype=np.int64)
    slot = starts[document] + np.array([m.slot for _, m in items], dtype=np.int64)
    return MediaBatch(
        data=torch.cat([m.data for _, m in items]),
        document=torch.from_numpy(document),
        slot=torch.from_numpy(slot),
        num_tokens=torch.tensor([m.num_tokens for _, m in items], dtype=torch.int64),
        num_inputs=torch.tensor([len(m.data) for _, m in items], dtype=torch.int64),
    )


def _check_rows(items: list[tuple[int, EncodedMedia]], documents: Sequence[EncodedSample], num_rows: Ints) -> None:
    for (i, item), rows in zip(items, num_rows.tolist(), strict=True):
        if item.rows is None:
            fits = item.num_tokens <= rows
        else:
            fits = len(item.rows) == item.num_tokens and item.rows.max(initial=-1) < rows
        if not fits or item.slot + item.num_tokens > len(documents[i]):
            text = f"expected at most {rows} {item.modality} tokens inside {len(documents[i])} tokens of the document"
            where = f"found {item.num_tokens} at {item.slot} in {documents[i].id}"
            raise DataError(f"{text}, {where}; the encoder and the model's media specs disagree")
        taken = [] if item.rows is None else item.rows[item.rows >= 0].tolist()
        if len({*taken}) != len(taken):
            raise DataError(
                f"expected each of the {rows} {item.modality} rows at one token at most, found {len(taken)} tokens for "
                f"{len({*taken})} rows at {item.slot} in {documents[i].id}; repair the encoder's map of rows"
            )


def _count_tokens(
    documents: Sequence[EncodedSample], media: dict[Modality, MediaBatch], skipped: Sequence[Skip]
) -> dict[str, int]:
    lengths = {d.id: len(d) for d in documents}  # of a small source one sample may come twice, of which one is filler
    counts = {"text": sum(map(len, documents)) - sum(lengths[s.id] for s in skipped)}
    for modality, batch in media.items():
        counts[modality] = int(batch.num_tokens.sum())
        counts["text"] -= counts[modality]
    return counts
