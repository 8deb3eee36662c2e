"""Media under sequence parallelism: who encodes which tower input, and how encoded rows come to the ranks that use them.

Both are worked out where a pack is split, so that at run time there is one exchange of rows and nothing to agree on.

Shapes: N tower inputs of a pack, M rows encoded on this rank, S rows sent, R rows received, W width.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from mmscale.config.schema import CostConfig
from mmscale.parallel.mesh import Axis
from mmscale.parallel.meter import CommMeter
from mmscale.types import MediaSpecs, Modality

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TowerInput:
    """One input of a modality: the connector rows it gives, and what it costs to encode, in any unit."""

    rows: int
    cost: float


@dataclass(frozen=True, slots=True)
class Routing:
    """Which encoded rows of a rank go where.

    send_rows   int64 [S], rows among those encoded here, by destination, then in their order
    num_sent    rows per destination, by sequence rank
    num_received  rows per origin; they arrive in the order of their origins
    """

    send_rows: Tensor
    num_sent: tuple[int, ...]
    num_received: tuple[int, ...]


def tower_inputs(specs: MediaSpecs, cost: CostConfig) -> dict[Modality, TowerInput]:
    """What one input of each modality of the model gives and costs. Inputs that cost nothing are balanced by their number."""
    inputs: dict[Modality, TowerInput] = {}
    if specs.image is not None:
        inputs["image"] = inputs["video"] = TowerInput(specs.image.tokens, cost.vision_input or 1.0)
    if specs.audio is not None:
        inputs["audio"] = TowerInput(specs.audio.tokens, cost.audio_input or 1.0)
    return inputs


def plan_media(costs: Sequence[float], num_ranks: int, used: Ints | None = None) -> Ints:
    """The rank that encodes each tower input, int64 [N].

    The dearest input goes to the least loaded rank, then the next (longest processing time first: Graham 1969, at most 4/3 of
    the best). How many inputs of one cost a rank gets is thereby fixed; which ones, follows from where their rows are used.

    Args:
        costs: per input, above 0.
        used: int64 [N, num_ranks], rows of the input that each rank uses; None = it does not matter.

    Example:
        >>> plan_media([5.0, 1.0, 1.0, 4.0], 2).tolist()
        [0, 0, 1, 1]
    """
    owner = np.zeros(len(costs), np.int64)
    demand = [0] * num_ranks if used is None else used.sum(0).tolist()
    heap = sorted((0.0, -demand[rank], rank) for rank in range(num_ranks))  # among equals, the one that uses most
    by_cost = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    for cost, group in groupby(by_cost, key=lambda i: costs[i]):
        inputs, room = list(group), [0] * num_ranks
        for _ in inputs:
            load, wish, rank = heap[0]
            heapq.heapreplace(heap, (load + cost, wish, rank))
            room[rank] += 1
        _place(inputs, room, owner, used)
    return owner


def _place(inputs: Sequence[int], room: list[int], owner: Ints, used: Ints | None) -> None:
    """Gives inputs of one cost to ranks with room for them: first to those that use most of their rows."""
    left = []
    for i in inputs:
        best = -1 if used is None else int(used[i].argmax())
        if best >= 0 and room[best]:
            owner[i], room[best] = best, room[best] - 1
        else:
            left.append(i)
    ranks = [rank for rank, count in enumerate(room) for _ in range(count)]
    owner[left] = ranks


def route_rows(rows_MW: Tensor, routing: Routing, axis: Axis, meter: CommMeter) -> Tensor:
    """The media rows [R, W] that this rank's positions use, from the ranks that encoded them; differentiable.

    The gradient of a row is the sum over the ranks that it went to, added in fp32 or wider.

    Args:
        rows_MW: encoded here, M may be 0; of one type on all ranks.

    Distributed: every rank of `axis` calls it for every pack that has media, and its backward runs on all of them or on none.

    Cost:
        sends the S rows of other ranks forward, as much as was received from others backward.
    """
    return _RouteRows.apply(rows_MW, routing, axis, meter)  # type: ignore[no-any-return, no-untyped-call]


def row_route(routing: Routing, axis: Axis, meter: CommMeter) -> partial[Tensor]:
    """`route_rows` of one pack, as `ModelBatch.route` wants it."""
    return partial(route_rows, routing=routing, axis=axis, meter=meter)


class _RouteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MW: Tensor, routing: Routing, axis: Axis, meter: CommMeter) -> Tensor:
        index_S = routing.send_rows.to(rows_MW.device, non_blocking=True)
        ctx.save_for_backward(index_S)
        ctx.plan = (routing, axis, meter, rows_MW.shape[0])
        return _exchange(rows_MW.index_select(0, index_S), routing.num_sent, routing.num_received, axis, meter)

    @staticmethod
    def backward(ctx: Any, grad_RW: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (index_S,) = ctx.saved_tensors
        routing, axis, meter, num_rows = ctx.plan
        grad_SW = _exchange(grad_RW.contiguous(), routing.num_received, routing.num_sent, axis, meter)
        wide = torch.promote_types(grad_RW.dtype, torch.float32)
        total_MW = torch.zeros(num_rows, grad_RW.shape[1], dtype=wide, device=grad_RW.device)
        total_MW.index_add_(0, index_S, grad_SW.to(wide))
        return total_MW.to(grad_RW.dtype), None, None, None


def _exchange(
    rows: Tensor, num_sent: Sequence[int], num_received: Sequence[int], axis: Axis, meter: CommMeter
) -> Tensor:
    """The rows that the ranks of `axis` send to this one, by rank."""
    received = rows.new_empty(sum(num_received), rows.shape[1])
    others = sum(num_sent) - num_sent[axis.rank]
    meter.add("media", others * rows.shape[1] * rows.element_size())
    with meter.waiting(rows.device):
        dist.all_to_all_single(received, rows, list(num_received), list(num_sent), group=axis.group)
    return received


def route_media(
    source_index: Ints,
    holders: Sequence[Ints],
    num_inputs: Mapping[Modality, int],
    towers: Mapping[Modality, TowerInput],
) -> tuple[list[dict[Modality, Ints]], list[Routing], list[Ints]]:
    """Who encodes what of one pack, what they send each other, and the source of each position after that.

    Args:
        source_index: int64 [T], rows of `cat([text embeddings [T], media rows])`; a text row is its own position's.
        holders: per sequence rank, the positions that it holds (int64 [L]); those from T on are padding.
        num_inputs: modality -> N, in the order of the rows.
        towers: what an input gives and costs.

    Returns:
        Per rank: modality -> the inputs it encodes; its routing; its own `source_index` [L], which counts the received rows.
    """
    num_ranks, num_tokens = len(holders), len(source_index)
    kinds = [(modality, i) for modality, count in num_inputs.items() for i in range(count)]
    rows_of = np.array([towers[modality].rows for modality, _ in kinds], np.int64)
    input_of_row = np.repeat(np.arange(len(kinds)), rows_of)
    needed = [_media_rows(source_index, held, num_tokens) for held in holders]
    used = np.stack([np.bincount(input_of_row[rows], minlength=len(kinds)) for rows in needed], axis=1)
    owner = plan_media([towers[modality].cost for modality, _ in kinds], num_ranks, used)

    encoded = [np.flatnonzero(owner == rank) for rank in range(num_ranks)]
    first_row = np.cumsum(rows_of) - rows_of
    place = np.zeros(int(rows_of.sum()), np.int64)  # of each row among those that its rank encodes
    for inputs in encoded:
        whole = [np.arange(first_row[i], first_row[i] + rows_of[i]) for i in inputs]
        own_rows = np.concatenate([np.zeros(0, np.int64), *whole])
        place[own_rows] = np.arange(len(own_rows))

    origin = owner[input_of_row]
    arriving = [rows[np.argsort(origin[rows], kind="stable")] for rows in needed]  # by origin, then in row order
    counts = np.stack([np.bincount(origin[rows], minlength=num_ranks) for rows in arriving])  # [destination, origin]
    routings = []
    for rank in range(num_ranks):
        sent = [place[rows[origin[rows] == rank]] for rows in arriving]
        send_rows = torch.from_numpy(np.concatenate(sent))
        routings.append(Routing(send_rows, tuple(counts[:, rank].tolist()), tuple(counts[rank].tolist())))
    sources = [
        _local_source(source_index, held, rows, num_tokens) for held, rows in zip(holders, arriving, strict=True)
    ]
    return [_by_modality(kinds, inputs) for inputs in encoded], routings, sources


def _media_rows(source_index: Ints, held: Ints, num_tokens: int) -> Ints:
    """The media rows that some positions use, each once, ascending."""
    sources = source_index[held[held < num_tokens]]
    return np.unique(sources[sources >= num_tokens] - num_tokens)


def _local_source(source_index: Ints, held: Ints, arriving: Ints, num_tokens: int) -> Ints:
    """`source_index` of a rank: its own text rows, then the rows that arrive."""
    local = np.arange(len(held))
    if not len(arriving):
        return local
    is_real = held < num_tokens
    sources = source_index[held[is_real]]
    is_media = sources >= num_tokens
    order = np.argsort(arriving)
    found = order[np.searchsorted(arriving, sources[is_media] - num_tokens, sorter=order)]
    local[np.flatnonzero(is_real)[is_media]] = len(held) + found
    return local


def _by_modality(kinds: Sequence[tuple[Modality, int]], inputs: Ints) -> dict[Modality, Ints]:
    chosen: dict[Modality, list[int]] = {}
    for i in inputs.tolist():
        modality, number = kinds[i]
        chosen.setdefault(modality, []).append(number)
    return {modality: np.array(numbers, np.int64) for modality, numbers in chosen.items()}
