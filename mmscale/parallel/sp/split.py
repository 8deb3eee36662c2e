"""A pack into the parts of its sequence-parallel ranks: the one place where a batch is cut.

A part is plain data on the host, complete for its rank: what it holds, which media it encodes and where the rows go. It is
made by the rank that made the pack, sent (`mmscale.parallel.share`), and bound to the groups of the rank that trains on it.

Shapes: T tokens of the pack, P sequence ranks, L = (T + padding) / P tokens of a part, K position axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmscale.errors import ParallelError
from mmscale.kernels.placement import media_positions
from mmscale.model.batch import ModelBatch
from mmscale.model.llm.attention import WholePack
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.sp.attention import SequenceAttention
from mmscale.parallel.sp.media import Ints, Routing, TowerInput, route_media, row_route
from mmscale.parallel.sp.plan import Kind, Layout, local_index, make_plan, padded_lengths
from mmscale.types import IGNORE, Modality, PackedBatch, Spans

PAD_TOKEN = 0
"""Stands on padding. Its embedding is read and, as nothing depends on it, gets no gradient."""


@dataclass(frozen=True, slots=True)
class LocalPart:
    """What one sequence rank trains on, of one pack. All tensors are on the CPU.

    input_ids, position_ids, labels, target_idx, source_index, media_positions   as in `ModelBatch`, with padding where the plan puts it
    inputs    modality -> the tower inputs that this rank encodes, in the order of the pack
    routing   where the encoded rows go; None = the pack is not divided, or no rank has media
    spans     the plan of the pack, over `lengths`, the document lengths with padding
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    target_idx: Tensor
    source_index: Tensor
    media_positions: Tensor
    inputs: Mapping[Modality, Tensor]
    routing: Routing | None
    spans: Spans
    lengths: tuple[int, ...]


def divide(lengths: tuple[int, ...], ulysses: int, ring: int, layout: Layout) -> Spans:
    """The plan of a pack with these document lengths, without padding; the loader makes it where it makes the pack."""
    return make_plan(padded_lengths(lengths, ulysses * ring), ring, layout, ulysses)


def split(pack: PackedBatch, ulysses: int, ring: int, towers: Mapping[Modality, TowerInput]) -> tuple[LocalPart, ...]:
    """The parts of a pack in the order of the sequence ranks (`ulysses rank + ulysses * ring rank`).

    Nothing is lost and nothing comes twice: a position with its label belongs to one part, and each tower input is encoded by
    one rank, from which its rows go to every rank that uses them.

    Args:
        pack: with `spans` when there is more than one rank; `position_ids` [T] or [K, T].
        ulysses, ring: the sequence-parallel degrees.
        towers: what an input of each modality gives and costs.

    Raises:
        ParallelError: the pack was not planned for these degrees.
    """
    num_ranks = ulysses * ring
    lengths = padded_lengths(pack.lengths, num_ranks)
    # without outer ranks every plan is the same, and the loader need not make it
    spans = pack.spans if pack.spans is not None else divide(pack.lengths, ulysses, 1, "contiguous")
    _check(spans, lengths, ulysses, ring)
    holders = [local_index(spans, lengths, r, u, ulysses) for r in range(ring) for u in range(ulysses)]
    source = pack.source_index.numpy()
    if num_ranks == 1:
        every = {modality: np.arange(len(media.data)) for modality, media in pack.media.items()}
        return (_part(pack, holders[0], source, pack.media_positions, every, None, spans, lengths),)
    num_inputs = {modality: len(media.data) for modality, media in pack.media.items()}
    encoded, routings, sources = route_media(source, holders, num_inputs, towers)
    return tuple(
        _part(pack, held, own, _positions(own, routing), inputs, routing if pack.media else None, spans, lengths)
        for held, own, inputs, routing in zip(holders, sources, encoded, routings, strict=True)
    )


def bind(part: LocalPart, mesh: Mesh, kind: Kind, kernel: str) -> ModelBatch:
    """The part as input of the model on this rank.

    Args:
        kind: how the outer sequence ranks exchange keys and values.
        kernel: the attention kernel, see `mmscale.kernels.attention.select`.
    """
    alone = mesh.sequence.size == 1
    attention = (
        WholePack(part.lengths, kernel) if alone else SequenceAttention(part.spans, part.lengths, mesh, kind, kernel)
    )
    route = None if part.routing is None else row_route(part.routing, mesh.sequence, mesh.meter)
    return ModelBatch(
        part.input_ids, part.position_ids, part.labels, part.target_idx, part.source_index, part.media_positions, part.inputs,
        attention, route,
    )  # fmt: skip


def _check(spans: Spans, lengths: tuple[int, ...], ulysses: int, ring: int) -> None:
    total, held = sum(lengths), [sum(end - start for _, start, end in own) for own in spans]
    if len(spans) != ring or held != [total // ring] * len(spans) or total % (ulysses * ring):
        raise ParallelError(
            f"expected a pack planned for parallel.ring={ring} ranks of {total / ring:g} tokens, found a plan for "
            f"{len(spans)} ranks of {held} tokens; open the stream with the degrees of the mesh"
        )


def _positions(source_index: Ints, routing: Routing) -> Tensor:
    """Where each media row stands that comes to a rank."""
    return media_positions(torch.from_numpy(source_index), sum(routing.num_received))


def _part(
    pack: PackedBatch,
    held: Ints,
    source_index: Ints,
    positions_M: Tensor,
    encoded: Mapping[Modality, Ints],
    routing: Routing | None,
    spans: Spans,
    lengths: tuple[int, ...],
) -> LocalPart:
    """The part of the rank that holds the positions `held`, of which those from T on are padding."""
    total = pack.num_tokens
    pad = torch.arange(sum(lengths) - total)
    index = torch.from_numpy(held)
    labels = torch.cat([pack.labels, torch.full_like(pad, IGNORE)])[index]
    axes = pack.position_ids.shape[:-1]
    return LocalPart(
        input_ids=torch.cat([pack.input_ids, torch.full_like(pad, PAD_TOKEN)])[index],
        position_ids=torch.cat([pack.position_ids, pad.expand(*axes, -1)], dim=-1)[..., index],
        labels=labels,
        target_idx=torch.nonzero(labels != IGNORE).flatten(),
        source_index=torch.from_numpy(source_index),
        media_positions=positions_M,
        inputs={modality: _chosen(pack.media[modality].data, own) for modality, own in encoded.items()},
        routing=routing,
        spans=spans,
        lengths=lengths,
    )


def _chosen(data: Tensor, inputs: Ints) -> Tensor:
    """The tower inputs of these numbers, ascending; all of them are not copied."""
    return data if len(inputs) == len(data) else data[torch.from_numpy(inputs)]
