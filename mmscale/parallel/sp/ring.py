"""Ring attention: keys and values travel around the outer ranks, each rank holds two blocks of them at a time.

Partial results are merged in fp32, and the backward pass uses the final log-sum-exp, so gradients of blocks add up exactly
(Liu et al. 2023, arXiv:2310.01889). What travels is on its way while the block at hand is computed.

Shapes: R outer ranks, L rows (tokens) of one rank, H query heads, G key/value heads, D head size; a leading dimension of 2
holds keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.kernels.attention.base import AttentionBackend, Segments
from mmscale.kernels.attention.merge import add_sinks, empty_result, merge_, sinks_grad
from mmscale.kernels.dtypes import accumulate_dtype
from mmscale.parallel.mesh import Axis
from mmscale.parallel.meter import CommMeter


def ring_attend(
    q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, ring: Ring, scale: float, backend: AttentionBackend,
    sinks_H: Tensor | None,
) -> Tensor:  # fmt: skip
    """[L, H, D]: attention of the own queries over the keys of all outer ranks, differentiable in every tensor.

    Distributed: every rank of the axis calls it; R - 1 hops forward with keys and values, and backward R - 1 with them again
    and R - 1 with their gradients in the accumulation type.
    """
    out: Tensor = _RingAttend.apply(q_LHD, k_LGD, v_LGD, sinks_H, ring, scale, backend)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True, slots=True)
class Ring:
    """The outer ranks in a circle. `blocks`: see `routes.ring_blocks`; `following`, `preceding`: the neighbours' global ranks."""

    axis: Axis
    meter: CommMeter
    blocks: tuple[Segments, ...]
    following: int
    preceding: int

    @classmethod
    def of(cls, blocks: tuple[Segments, ...], axis: Axis, meter: CommMeter) -> Ring:
        """The ring over the ranks of `axis`."""
        assert axis.group is not None, "a ring has a group"
        ranks = dist.get_process_group_ranks(axis.group)
        return cls(axis, meter, blocks, ranks[(axis.rank + 1) % axis.size], ranks[axis.rank - 1])

    def pass_on(self, block: Tensor) -> Arriving:
        """Starts to send a contiguous `block` to the next rank; what arrives is that of the rank before, of the same shape."""
        block = block.contiguous()
        got = torch.empty_like(block)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, self.following, group=self.axis.group),
                dist.P2POp(dist.irecv, got, self.preceding, group=self.axis.group),
            ]
        )
        self.meter.add("ring", block.nbytes)
        return Arriving(block, got, works, self.meter)


@dataclass(frozen=True, slots=True)
class Arriving:
    """A block on its way; the one that was sent is kept until then."""

    sent: Tensor
    got: Tensor
    works: Sequence[dist.Work]
    meter: CommMeter

    def wait(self) -> Tensor:
        """The block that has arrived."""
        with self.meter.waiting(self.got.device):
            for work in self.works:
                work.wait()
        return self.got


class _RingAttend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, ring: Ring, scale: float,
        backend: AttentionBackend,
    ) -> Tensor:  # fmt: skip
        total, lse = empty_result(q)
        kv = torch.stack((k, v))
        for hop, segments in enumerate(ring.blocks):
            arriving = ring.pass_on(kv) if hop + 1 < len(ring.blocks) else None
            if segments.rows:
                merge_(total, lse, *backend.forward(q, kv[0], kv[1], segments, scale))
            kv = arriving.wait() if arriving else kv
        if sinks is not None:
            total, lse = add_sinks(total, lse, sinks)
        out = total.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.rest = (ring, scale, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        ring, scale, backend = ctx.rest
        dtype = accumulate_dtype(q.dtype)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        own, returning = torch.empty(0), None
        kv = torch.stack((k, v))
        for hop, segments in enumerate(ring.blocks):
            arriving = ring.pass_on(kv) if hop + 1 < len(ring.blocks) else None
            part = torch.zeros(kv.shape, dtype=dtype, device=q.device)
            if segments.rows:
                grads_of_block = backend.backward(grads[0], q, kv[0], kv[1], out, lse, segments, scale)
                for total, grad in zip((dq, part[0], part[1]), grads_of_block, strict=True):
                    total += grad
            if hop == 0:
                own = part  # stays; the sum of the other ranks begins at the next one and comes home after R - 1 hops
            else:
                returning = ring.pass_on(part.add_(returning.wait()) if returning else part)
            kv = arriving.wait() if arriving else kv
        if returning:
            own += returning.wait()
        d_sinks = None if sinks is None else sinks_grad(grads[0], out, lse, sinks)
        dk, dv = own.to(k.dtype)
        return dq.to(q.dtype), dk, dv, d_sinks, None, None, None
