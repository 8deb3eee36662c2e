"""Attention after the key rows of other ranks were collected: only those that a query here needs, or all of them.

Each query then meets all its keys in one kernel call, so sliding windows and sinks are those of one process and nothing is
merged over ranks. The gradients of the collected rows go back in fp32 and are summed where the rows came from.

Shapes: R outer ranks, L rows (tokens) of one rank, K key rows that its queries need, H query heads, G key/value heads,
D head size; a dimension of 2 holds keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.kernels.attention.base import AttentionBackend, Segments
from mmscale.kernels.attention.merge import add_sinks, sinks_grad
from mmscale.kernels.dtypes import accumulate_dtype
from mmscale.parallel.mesh import Axis
from mmscale.parallel.meter import CommMeter
from mmscale.parallel.sp.routes import Ints, KeyRoute

# torch 2.13 renames both and warns about the old names, which are the only ones of 2.11 and 2.12
_all_gather: Callable[..., Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
_reduce_scatter: Callable[..., Any] = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)


class KeyRows(Protocol):
    """Brings the key rows of a pack to the rank that needs them, and their gradients back."""

    @property
    def segments(self) -> Segments:
        """Which queries of this rank see which of the K key rows."""
        ...

    def collect(self, k_LGD: Tensor, v_LGD: Tensor) -> Tensor:
        """[K, 2, G, D] sorted by document and position, from each rank's own rows."""
        ...

    def give_back(self, dk_KGD: Tensor, dv_KGD: Tensor) -> Tensor:
        """[L, 2, G, D] in the accumulation type: the gradients that all ranks have for this rank's rows, summed."""
        ...


def collected_attend(
    q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, keys: KeyRows, scale: float, backend: AttentionBackend,
    sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """[L, H, D]: attention of the own queries over all keys they need, differentiable in every tensor.

    The K collected rows are held until the backward pass: with activation checkpointing one layer at a time does so.

    Distributed: every rank of the axis calls it; the forward and the backward pass have one collective each.
    """
    out: Tensor = _CollectedAttend.apply(q_LHD, k_LGD, v_LGD, sinks_H, keys, scale, backend)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class NeededRows:
    """See `KeyRows`: a sparse exchange, each row goes to the ranks with a query that sees it."""

    axis: Axis
    meter: CommMeter
    segments: Segments
    order: Tensor
    send_rows: Tensor
    send_sizes: tuple[int, ...]
    recv_sizes: tuple[int, ...]

    @classmethod
    def of(cls, route: KeyRoute, axis: Axis, meter: CommMeter, device: torch.device) -> NeededRows:
        """The exchange of `exchange_route`, its indices on `device`."""
        order, send_rows = (_on_device(rows, device) for rows in (route.order, route.send_rows))
        return cls(axis, meter, route.segments, order, send_rows, route.send_sizes, route.recv_sizes)

    def collect(self, k_LGD: Tensor, v_LGD: Tensor) -> Tensor:
        """See `KeyRows.collect`."""
        num_own, _, _ = k_LGD.shape
        rows = k_LGD.new_empty((num_own + sum(self.recv_sizes), 2, *k_LGD.shape[1:]))
        torch.stack((k_LGD, v_LGD), 1, out=rows[:num_own])
        sent = rows.index_select(0, self.send_rows)
        self._exchange(rows[num_own:], sent, self.recv_sizes, self.send_sizes)
        return rows.index_select(0, self.order)

    def give_back(self, dk_KGD: Tensor, dv_KGD: Tensor) -> Tensor:
        """See `KeyRows.give_back`."""
        rows = _unsorted(dk_KGD, dv_KGD, self.order, len(self.order))
        own, received = rows.split([len(rows) - sum(self.recv_sizes), sum(self.recv_sizes)])
        returned = own.new_empty((sum(self.send_sizes), *own.shape[1:]))
        self._exchange(returned, received, self.send_sizes, self.recv_sizes)
        sizes = list(self.send_sizes)
        for where, part in zip(self.send_rows.split(sizes), returned.split(sizes), strict=True):
            own.index_add_(0, where, part)  # one rank at a time: no row twice, so the order of the sum is fixed
        return own

    def _exchange(self, got: Tensor, sent: Tensor, got_sizes: tuple[int, ...], sent_sizes: tuple[int, ...]) -> None:
        with self.meter.waiting(sent.device):
            dist.all_to_all_single(got, sent, list(got_sizes), list(sent_sizes), group=self.axis.group)
        self.meter.add("exchange", sent.nbytes)


@dataclass(frozen=True, slots=True)
class AllRows:
    """See `KeyRows`: every rank gathers all `num_rows` rows; gradients are summed by a reduce-scatter."""

    axis: Axis
    meter: CommMeter
    segments: Segments
    order: Tensor
    num_rows: int

    @classmethod
    def of(cls, route: KeyRoute, axis: Axis, meter: CommMeter, device: torch.device) -> AllRows:
        """The gather of `gather_route`, its indices on `device`."""
        return cls(axis, meter, route.segments, _on_device(route.order, device), sum(route.recv_sizes))

    def collect(self, k_LGD: Tensor, v_LGD: Tensor) -> Tensor:
        """See `KeyRows.collect`."""
        own = torch.stack((k_LGD, v_LGD), 1)
        rows = own.new_empty((self.num_rows, *own.shape[1:]))
        with self.meter.waiting(own.device):
            _all_gather(rows, own, group=self.axis.group)
        self.meter.add("gather", own.nbytes * (self.axis.size - 1))
        return rows.index_select(0, self.order)

    def give_back(self, dk_KGD: Tensor, dv_KGD: Tensor) -> Tensor:
        """See `KeyRows.give_back`."""
        rows = _unsorted(dk_KGD, dv_KGD, self.order, self.num_rows)
        own = rows.new_empty((self.num_rows // self.axis.size, *rows.shape[1:]))
        with self.meter.waiting(own.device):
            _reduce_scatter(own, rows, group=self.axis.group)
        self.meter.add("gather", own.nbytes * (self.axis.size - 1))
        return own


class _CollectedAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, keys: KeyRows, scale: float,
        backend: AttentionBackend,
    ) -> Tensor:  # fmt: skip
        held = keys.collect(k, v)
        out, lse = backend.forward(q, held[:, 0], held[:, 1], keys.segments, scale)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, out, lse, sinks, held)
        ctx.rest = (keys, scale, backend, k.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, out, lse, sinks, held = ctx.saved_tensors
        keys, scale, backend, dtype = ctx.rest
        dq, dk, dv = backend.backward(grads[0], q, held[:, 0], held[:, 1], out, lse, keys.segments, scale)
        own = keys.give_back(dk, dv).to(dtype)
        d_sinks = None if sinks is None else sinks_grad(grads[0], out, lse, sinks)
        return dq.to(q.dtype), own[:, 0], own[:, 1], d_sinks, None, None, None


def _unsorted(dk_KGD: Tensor, dv_KGD: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """Gradients [num_rows, 2, G, D] in the order in which the rows were collected; zero for those that no query needed."""
    dtype = accumulate_dtype(dk_KGD.dtype)
    rows = torch.zeros((num_rows, 2, *dk_KGD.shape[1:]), dtype=dtype, device=dk_KGD.device)
    for side, grad in enumerate((dk_KGD, dv_KGD)):
        rows[:, side].index_copy_(0, order, grad.to(dtype))
    return rows


def _on_device(rows: Ints, device: torch.device) -> Tensor:
    """The indices on `device`, without waiting for it."""
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
