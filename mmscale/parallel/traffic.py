"""Bytes that one rank sends in an optimizer step, by link and from formulas; the counted ones are in `metrics.jsonl`.

Formulas per layer and forward pass, with P = U x R, T tokens of a pack, b bytes per number, H and G the query and key/value heads of one
tensor-parallel rank, C = max(G, U), D channels per head:

    ulysses             (U - 1) / U x T / P x D b (2 H + 2 C)
    gather              (R - 1) x T / R x 2 C / U x D b
    exchange            at most that, for a pack of one document; 0.02 to 0.5 of it for packs of many (docs/parallelism.md)
    ring                as gather
    tensor              2 all-reduces of T / P x width

and backward: ulysses the same; gather and exchange the gradients in fp32; ring keys and values and fp32 gradients. An all-reduce of n bytes over k ranks sends 2 (k - 1) / k x n, a reduce-scatter or an all-gather half of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mmscale.parallel.estimate import local_parameters
from mmscale.parallel.sp.volume import HeadShape, outer_bytes, ulysses_bytes
from mmscale.parallel.workload import Workload

_FP32 = 4
_TOKEN_BYTES = 40
"""Ids, positions, labels, targets and sources of one token on the way from the rank that made the pack: 5 x int64."""


@dataclass(frozen=True, slots=True)
class Link:
    """What one rank sends in a step over one kind of link.

    kind    the name in `comm_bytes` of the metrics; `weights`, `gradients` are the engine's
    ranks   the world ranks of rank 0's group
    sent    bytes
    calls   collectives; 0 where an engine decides by its buckets
    """

    kind: str
    ranks: range
    sent: float
    calls: int

    def nodes(self, ranks_per_node: int) -> int:
        """Nodes that the group of rank 0 spans."""
        return len({rank // ranks_per_node for rank in self.ranks})


def groups(work: Workload) -> dict[str, range]:
    """The world ranks that rank 0 talks to, itself included, by axis: in the order tensor, Ulysses, ring, data."""
    tensor, inner, outer = work.tensor, work.ulysses, work.ring
    replica = tensor * inner * outer
    return {
        "tensor": range(tensor),
        "ulysses": range(0, tensor * inner, tensor),
        "ring": range(0, replica, tensor * inner),
        "replica": range(replica),
        "data": range(0, work.world_size, replica),
        "gradients": range(0, work.world_size, tensor),
    }


def links(work: Workload) -> tuple[Link, ...]:
    """Everything that one rank sends in a step, the largest first; links without bytes are left out."""
    found = [*_layer_links(work), *_pack_links(work), *_engine_links(work)]
    return tuple(sorted((link for link in found if link.sent), key=lambda link: -link.sent))


def _layer_links(work: Workload) -> Iterator[Link]:
    llm, ranks = work.llm, groups(work)
    times = work.packs * llm.layers
    passes = 2 if work.checkpoint_activations else 1  # the forward pass is run again
    shape = HeadShape(llm.heads // work.tensor, work.kv_heads, llm.head_size, work.bytes_each)
    if work.ulysses > 1:
        forward, backward = ulysses_bytes(work.tokens, work.ulysses, shape)
        yield Link("ulysses", ranks["ulysses"], times * (passes * forward + backward), times * 2 * (passes + 1))
    if work.ring > 1:
        rows = (work.ring - 1) * work.tokens * work.ulysses
        forward, backward = outer_bytes(rows, rows, work.sp, work.ulysses, shape)
        again = 1 if work.sp == "ring" else 0
        hops = work.ring - 1 if work.sp == "ring" else 1
        yield Link(work.sp, ranks["ring"], times * (passes * forward + backward), times * hops * (passes + again + 1))
    if work.tensor > 1:
        yield _tensor_link(work, ranks["tensor"], passes)


def _tensor_link(work: Workload, ranks: range, passes: int) -> Link:
    """All-reduces: two in each pass of a layer, of the embedding, of the head's input gradient, of maximum and sums of the loss."""
    times = work.packs * (work.llm.layers * 2 * (passes + 1) + 2)
    wide = work.tokens * work.llm.width * work.bytes_each
    loss = work.packs * work.tokens * 3 * _FP32
    return Link("tensor", ranks, _all_reduce(work.tensor) * (times * wide + loss), times + work.packs * 2)


def _pack_links(work: Workload) -> Iterator[Link]:
    """Once per pack: its parts to the ranks of the replica, media rows to those that hold their tokens."""
    ranks, others = groups(work), work.tensor * work.sequence - 1
    if others:
        inputs = sum(work.media_inputs[name] * tower.input_bytes for name, tower in work.towers.items())
        part = work.tokens * _TOKEN_BYTES + inputs / max(1, len(work.towers)) / work.sequence
        yield Link("share", ranks["replica"], work.packs * part * others / (others + 1), work.packs)
    if work.sequence > 1 and work.towers:
        rows = max(work.media_inputs[name] * tower.rows for name, tower in work.towers.items()) / work.sequence
        once = rows * (work.sequence - 1) / work.sequence * work.llm.width * work.bytes_each
        sequence = range(0, work.tensor * work.sequence, work.tensor)
        yield Link("media", sequence, 2 * work.packs * once, 2 * work.packs)


def _engine_links(work: Workload) -> Iterator[Link]:
    """Gradients, and weights after the update (ZeRO-1 and 2) or in every pass (ZeRO-3 and FSDP)."""
    if work.shards == 1 or work.engine == "single":
        return
    half, ranks = _all_reduce(work.shards) / 2, groups(work)["gradients"]
    held = sum(local_parameters(work, name) for name in work.parts)
    trained = sum(local_parameters(work, name) for name, part in work.parts.items() if part.is_trained)
    every_pass = work.engine == "fsdp" or work.stage == 3
    # all but ZeRO-1 reduce after every pack, since no rank has room for the sum of whole gradients
    reductions = 1 if _reduces_whole(work) else work.packs
    yield Link("gradients", ranks, half * trained * _FP32 * reductions * (2 if _reduces_whole(work) else 1), 0)
    gathers = work.packs * 2 if every_pass else 1
    yield Link("weights", ranks, half * (held if every_pass else trained) * work.bytes_each * gathers, 0)


def _reduces_whole(work: Workload) -> bool:
    """Whether gradients are all-reduced although each rank updates a share only."""
    return work.engine == "deepspeed" and work.stage == 1


def _all_reduce(size: int) -> float:
    return 2 * (size - 1) / size
