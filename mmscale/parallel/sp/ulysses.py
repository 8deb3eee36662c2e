"""Ulysses: all tokens of a few heads instead of a few tokens of all heads (Jacobs et al. 2023, arXiv:2309.14509).

One all-to-all takes queries, keys and values there, one takes the outputs back; the backward pass mirrors both.

Shapes: U ranks, N tokens of one rank, L = U * N tokens of all of them, H query heads, G key/value heads, C = max(G, U)
key/value heads after replication, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.errors import ParallelError
from mmscale.kernels.dtypes import accumulate_dtype
from mmscale.parallel.mesh import Axis
from mmscale.parallel.meter import CommMeter

KIND = "ulysses"
"""The name of these bytes in `CommMeter`."""


def check_heads(num_heads: int, num_kv_heads: int, ulysses: int) -> None:
    """Refuses head counts that `ulysses` ranks cannot share.

    Raises:
        ParallelError: H is no multiple of U, or neither of G and U is a multiple of the other.
    """
    fits = num_heads % ulysses == 0 and (num_kv_heads % ulysses == 0 or ulysses % num_kv_heads == 0)
    if fits:
        return
    good = [
        str(u)
        for u in range(1, num_heads + 1)
        if num_heads % u == 0 and (num_kv_heads % u == 0 or u % num_kv_heads == 0)
    ]
    raise ParallelError(
        f"parallel.ulysses={ulysses}: expected a divisor of the {num_heads} query heads that divides the {num_kv_heads} "
        f"key/value heads or is a multiple of them (heads of one tensor-parallel rank); use one of {', '.join(good)} and put "
        "the rest into parallel.ring"
    )


def to_heads(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, axis: Axis, meter: CommMeter
) -> tuple[Tensor, Tensor, Tensor]:
    """([L, H / U, D], [L, C / U, D], [L, C / U, D]): all rows of this rank's share of the heads, differentiable.

    With more ranks than key/value heads each head goes to U / G ranks and its gradient is their sum, taken in fp32.

    Distributed: one all-to-all over `axis`, one more in the backward pass.
    """
    check_heads(q_NHD.shape[1], k_NGD.shape[1], axis.size)
    parts: tuple[Tensor, Tensor, Tensor] = _ToHeads.apply(q_NHD, k_NGD, v_NGD, axis, meter)  # type: ignore[no-untyped-call]
    return parts


def to_rows(out_LhD: Tensor, axis: Axis, meter: CommMeter) -> Tensor:
    """[N, H, D]: all heads of this rank's rows, from all rows [L, H / U, D] of its heads; differentiable.

    Distributed: one all-to-all over `axis`, one more in the backward pass.
    """
    rows: Tensor = _ToRows.apply(out_LhD, axis, meter)  # type: ignore[no-untyped-call]
    return rows


def own_heads(values_H: Tensor, axis: Axis) -> Tensor:
    """[H / U]: the entries of this rank's heads; the gradient of the others is zero here, their ranks have it."""
    share = values_H.shape[0] // axis.size
    return values_H.narrow(0, axis.rank * share, share)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis, meter: CommMeter) -> tuple[Tensor, ...]:
        ctx.rest = (axis, meter, k.shape[1])
        parts = [_by_rank(x, axis.size) for x in (q, k, v)]
        got_LhD = _swap(torch.cat(parts, 2), axis, meter).flatten(0, 1)
        return got_LhD.split([part.shape[2] for part in parts], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        axis, meter, num_kv_heads = ctx.rest
        sent_UNhD = torch.cat([grad.unflatten(0, (axis.size, -1)) for grad in grads], 2)
        parts = _swap(sent_UNhD, axis, meter).split([grad.shape[1] for grad in grads], 2)
        dq, dk, dv = (_join_heads(part) for part in parts)
        return dq, _sum_replicas(dk, num_kv_heads), _sum_replicas(dv, num_kv_heads), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, axis: Axis, meter: CommMeter) -> Tensor:
        ctx.rest = (axis, meter)
        return _join_heads(_swap(out.unflatten(0, (axis.size, -1)).contiguous(), axis, meter))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        axis, meter = ctx.rest
        return _swap(_by_rank(grads[0], axis.size).contiguous(), axis, meter).flatten(0, 1), None, None


def _by_rank(x_NHD: Tensor, size: int) -> Tensor:
    """[U, N, heads of one rank, D]; fewer heads than ranks are repeated first."""
    num_heads = x_NHD.shape[1]
    if num_heads < size:
        x_NHD = x_NHD.unsqueeze(2).expand(-1, -1, size // num_heads, -1).flatten(1, 2)
    return x_NHD.unflatten(1, (size, -1)).transpose(0, 1)


def _join_heads(x_UNhD: Tensor) -> Tensor:
    """[N, all heads, D] from the heads of each rank."""
    return x_UNhD.transpose(0, 1).flatten(1, 2)


def _sum_replicas(grad_NCD: Tensor, num_heads: int) -> Tensor:
    """[N, G, D]: each head's gradient from all ranks that had it."""
    if grad_NCD.shape[1] == num_heads:
        return grad_NCD
    total = grad_NCD.unflatten(1, (num_heads, -1)).sum(2, dtype=accumulate_dtype(grad_NCD.dtype))
    return total.to(grad_NCD.dtype)


def _swap(sent_UNhD: Tensor, axis: Axis, meter: CommMeter) -> Tensor:
    """Part u of every rank's tensor, by rank, on rank u."""
    got = torch.empty_like(sent_UNhD)
    with meter.waiting(sent_UNhD.device):
        dist.all_to_all_single(got, sent_UNhD, group=axis.group)
    meter.add(KIND, sent_UNhD.nbytes // axis.size * (axis.size - 1))
    return got
