"""Small collectives on host memory for the trainer. On one process each gives its own input back.

Distributed: every rank of `mesh.host_group` must call them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from mmscale.errors import MmscaleError
from mmscale.parallel.mesh import Mesh

T = TypeVar("T")


def sum_ints(mesh: Mesh, values: Sequence[int]) -> list[int]:
    """Element by element the sum over all ranks (64 bit), identical everywhere."""
    return _reduce_ints(mesh, values, dist.ReduceOp.SUM)


def max_ints(mesh: Mesh, values: Sequence[int]) -> list[int]:
    """Element by element the largest value of all ranks (64 bit), identical everywhere."""
    return _reduce_ints(mesh, values, dist.ReduceOp.MAX)


def sum_floats(mesh: Mesh, values: Sequence[float]) -> list[float]:
    """Element by element the sum over all ranks, identical everywhere: added in rank order in 64 bit."""
    if mesh.host_group is None:
        return list(values)
    own = torch.tensor(list(values), dtype=torch.float64)
    parts = [torch.empty_like(own) for _ in range(mesh.world_size)]
    dist.all_gather(parts, own, group=mesh.host_group)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.tolist()


def gather_objects(mesh: Mesh, item: T) -> list[T] | None:
    """The items of all ranks in rank order on rank 0, None elsewhere."""
    if mesh.host_group is None:
        return [item]
    items: list[T] | None = [item] * mesh.world_size if mesh.is_main else None
    dist.gather_object(item, items, dst=0, group=mesh.host_group)
    return items


def all_gather_objects(mesh: Mesh, item: T) -> list[T]:
    """The items of all ranks in rank order, on every rank."""
    if mesh.host_group is None:
        return [item]
    items: list[T] = [item] * mesh.world_size
    dist.all_gather_object(items, item, group=mesh.host_group)
    return items


def broadcast_object(mesh: Mesh, item: T) -> T:
    """Rank 0's item, on every rank; what the other ranks pass is ignored."""
    if mesh.host_group is None:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=0, group=mesh.host_group)
    return box[0]


def on_main(mesh: Mesh, work: Callable[[], T]) -> T:
    """The result of `work`, run on rank 0, on every rank; an error of mmscale's own is raised on every rank too."""
    outcome: tuple[T | None, MmscaleError | None] = (None, None)
    if mesh.is_main:
        try:
            outcome = (work(), None)
        except MmscaleError as error:
            outcome = (None, error)
    value, problem = broadcast_object(mesh, outcome)
    if problem is not None:
        raise problem
    return value  # type: ignore[return-value]


def barrier(mesh: Mesh) -> None:
    """Returns when every rank has called it."""
    if mesh.host_group is not None:
        dist.barrier(group=mesh.host_group)


def _reduce_ints(mesh: Mesh, values: Sequence[int], op: dist.ReduceOp.RedOpType) -> list[int]:
    if mesh.host_group is None:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64)
    dist.all_reduce(tensor, op=op, group=mesh.host_group)
    return tensor.tolist()
