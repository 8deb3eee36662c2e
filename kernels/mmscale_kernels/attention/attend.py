"""Attention over segments as one differentiable function, on any backend.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.kernels.attention.base import AttentionBackend, Segments
from mmscale.kernels.attention.merge import add_sinks, sinks_grad
from mmscale.kernels.dtypes import cast


def attend(
    q_QHD: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    segments: Segments,
    scale: float,
    backend: AttentionBackend,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[Q, H, D]: each query over the keys of its segment, differentiable in q, k, v and the sinks."""
    out: Tensor = _Attend.apply(q_QHD, k_KGD, v_KGD, sinks_H, segments, scale, backend)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, segments: Segments, scale: float,
        backend: AttentionBackend,
    ) -> Tensor:  # fmt: skip
        out, lse = backend.forward(q, k, v, segments, scale)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.rest = (segments, scale, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        segments, scale, backend = ctx.rest
        dq, dk, dv = backend.backward(grads[0], q, k, v, out, lse, segments, scale)
        d_sinks = None if sinks is None else sinks_grad(grads[0], out, lse, sinks)
        return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype), d_sinks, None, None, None
