"""Packs inside a replica: each is made by one of its ranks, and every rank gets its part of it.

The ranks of a replica (tensor x sequence) train on the same packs. Decoding them on each would multiply the work of the
loaders by their number, so they take turns, and the owner of a pack splits it and sends the parts round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.errors import ParallelError
from mmscale.model.batch import ModelBatch
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.sp.media import TowerInput
from mmscale.parallel.sp.plan import Kind
from mmscale.parallel.sp.split import LocalPart, bind, split
from mmscale.streaming import transport
from mmscale.types import Modality, PackedBatch, Spans

_ALIGN = 64

Placed = tuple[int, LocalPart]
"""A part, and the micro-batch that it is of."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the packs of a run come to the ranks of a replica.

    towers  what one input of each modality gives and costs, for balance
    kind    how the outer sequence ranks exchange keys and values
    kernel  the attention kernel, see `mmscale.kernels.attention.select`
    """

    mesh: Mesh
    towers: Mapping[Modality, TowerInput] = field(default_factory=dict)
    kind: Kind = "exchange"
    kernel: str = "auto"

    @property
    def member(self) -> tuple[int, int]:
        """This rank among those that make the packs of its data rank, for `Stream.open`."""
        return self.mesh.replica.rank, self.mesh.replica.size


@dataclass(frozen=True, slots=True)
class Shared:
    """The micro-batches of this rank in order, and the plan of each: None on a replica of one rank.

    `sent_bytes`: what this rank has sent for them. Not counted by the mesh's meter, which belongs to the main thread.
    """

    batches: tuple[ModelBatch, ...]
    spans: tuple[Spans, ...] | None
    sent_bytes: int = 0


def share_packs(sharing: Sharing, packs: Sequence[PackedBatch], places: Sequence[int], num_packs: int) -> Shared:
    """This rank's part of every pack that its replica trains on in a step.

    Args:
        packs: those that this rank has made, with `spans` where the sequence is divided.
        places: the micro-batch that each of them is of.
        num_packs: micro-batches of the step; the packs of all ranks of the replica fill them, each once.

    Raises:
        ParallelError: a pack was planned for other degrees, or the packs of the ranks do not fill the micro-batches.

    Distributed: every rank of the replica calls it. Tensor-parallel ranks get equal parts.

    Cost:
        two collectives on host memory; every byte of a pack is sent once to each tensor-parallel rank.
    """
    mesh = sharing.mesh
    if mesh.replica.size == 1:
        return Shared(tuple(ModelBatch.of(pack, sharing.kernel) for pack in packs), None)
    split_packs = [split(pack, mesh.ulysses.size, mesh.ring.size, sharing.towers) for pack in packs]
    outgoing = [
        [(place, parts[rank]) for place, parts in zip(places, split_packs, strict=True)]
        for rank in range(mesh.sequence.size)
    ]
    arrived, sent_bytes = _exchange(mesh, outgoing)
    arrived.sort(key=lambda placed: placed[0])
    if [place for place, _ in arrived] != list(range(num_packs)):
        raise ParallelError(
            f"expected the micro-batches 0 to {num_packs - 1} of a step, found {[place for place, _ in arrived]} on rank "
            f"{mesh.rank}; every rank of a replica must open its stream with its own `member`"
        )
    batches = tuple(bind(part, mesh, sharing.kind, sharing.kernel) for _, part in arrived)
    return Shared(batches, tuple(part.spans for _, part in arrived), sent_bytes)


def _exchange(mesh: Mesh, outgoing: Sequence[list[Placed]]) -> tuple[list[Placed], int]:
    """What the ranks of the replica send to this one, and the bytes that it has sent.

    Args:
        outgoing: what this rank has for each sequence rank.
    """
    blocks = [transport.Block.of(parts) for parts in outgoing]
    to_each = [blocks[rank // mesh.tensor.size] for rank in range(mesh.replica.size)]
    is_for = [rank != mesh.replica.rank and any(outgoing) for rank in range(mesh.replica.size)]
    sent = [block.num_bytes if wanted else 0 for block, wanted in zip(to_each, is_for, strict=True)]
    sizes = torch.empty(len(sent), dtype=torch.int64)
    dist.all_to_all_single(sizes, torch.tensor(sent), group=mesh.replica.group)
    out_sizes, in_sizes = [_aligned(n) for n in sent], [_aligned(n) for n in sizes.tolist()]
    outbox, inbox = (torch.empty(sum(n), dtype=torch.uint8) for n in (out_sizes, in_sizes))
    for box, block in zip(outbox.split(out_sizes), to_each, strict=True):
        if box.numel():
            block.write(box.numpy().data)
    dist.all_to_all_single(inbox, outbox, in_sizes, out_sizes, group=mesh.replica.group)
    parts = [placed for box in inbox.split(in_sizes) for placed in _unpack(box)]
    return [*parts, *outgoing[mesh.sequence.rank]], sum(sent)


def _unpack(box: Tensor) -> list[Placed]:
    return transport.read_block(box.numpy().data) if box.numel() else []


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN
