"""torch's memory-efficient attention on CUDA, segment by segment: the kernel for fp32 there.

Its causal mask is aligned bottom-right and knows windows, so a segment is one call. It wants as many key/value heads as query
heads, and log-sum-exps in rows of a multiple of 32.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size; n rows of one segment.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmscale.kernels.attention.base import Segment, Segments
from mmscale.kernels.dtypes import accumulate_dtype

_forward = torch.ops.aten._efficient_attention_forward.default
_backward = torch.ops.aten._efficient_attention_backward.default

_ALIGNMENT = 32
_NO_MASK, _BOTTOM_RIGHT = 0, 2
"""Of torch's `CustomMaskType`."""


class _Mask(TypedDict):
    custom_mask_type: int
    window_size: int | None


class Efficient:
    """See `AttentionBackend`."""

    name = "efficient"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""
        if device.type != "cuda" or torch.version.hip is not None:
            return f"it runs on CUDA, the tensors are on {'ROCm' if torch.version.hip else device.type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it computes in fp32, bf16 and fp16, the tensors are {dtype}"
        step = 4 if dtype == torch.float32 else 8
        if head_dim is not None and head_dim % step:
            return f"it takes head sizes that are multiples of {step} in {dtype}, the model has {head_dim}"
        return None

    def forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.forward`."""
        out, q = torch.zeros_like(q_QHD), _packed(q_QHD)
        lse = torch.full((q.shape[1], len(q)), -torch.inf, dtype=accumulate_dtype(q.dtype), device=q.device)
        k, v = (_all_heads(x, q.shape[1]) for x in (k_KGD, v_KGD))
        for row in segments.rows:
            queries, keys = slice(row.q_start, row.q_end), slice(row.k_start, row.k_end)
            part, part_lse, *_ = _forward(
                query=q[None, queries],
                key=k[None, keys],
                value=v[None, keys],
                bias=None,
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                max_seqlen_q=None,
                max_seqlen_k=None,
                dropout_p=0.0,
                compute_log_sumexp=True,
                scale=scale,
                **_mask(row, segments),
            )
            out[queries] = part[0]
            lse[:, queries] = part_lse[0, :, : row.q_end - row.q_start]
        return out, lse

    def backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        segments: Segments, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `AttentionBackend.backward`."""
        dq = torch.zeros_like(q_QHD)
        dk, dv = (torch.zeros_like(x, dtype=accumulate_dtype(x.dtype)) for x in (k_KGD, v_KGD))
        dout, q, out = (_packed(x) for x in (dout_QHD, q_QHD, out_QHD))
        k, v = (_all_heads(x, q.shape[1]) for x in (k_KGD, v_KGD))
        no_dropout = torch.zeros((), dtype=torch.int64)
        for row in segments.rows:
            queries, keys = slice(row.q_start, row.q_end), slice(row.k_start, row.k_end)
            part_q, part_k, part_v, _ = _backward(
                grad_out_=dout[None, queries],
                query=q[None, queries],
                key=k[None, keys],
                value=v[None, keys],
                bias=None,
                out=out[None, queries],
                cu_seqlens_q=None,
                cu_seqlens_k=None,
                max_seqlen_q=row.q_end - row.q_start,
                max_seqlen_k=row.k_end - row.k_start,
                logsumexp=_aligned(lse_HQ[:, queries])[None],
                dropout_p=0.0,
                philox_seed=no_dropout,
                philox_offset=no_dropout,
                bias_requires_grad=False,
                scale=scale,
                **_mask(row, segments),
            )
            dq[queries] = part_q[0]
            for total, part in ((dk, part_k), (dv, part_v)):
                total[keys] += part[0].unflatten(1, (total.shape[1], -1)).sum(2, dtype=total.dtype)
        return dq, dk, dv


def _mask(row: Segment, segments: Segments) -> _Mask:
    window = segments.window
    narrow = window is not None and window < row.k_end - row.k_start
    return {
        "custom_mask_type": _BOTTOM_RIGHT if segments.causal else _NO_MASK,
        "window_size": window if narrow else None,
    }


def _packed(x_nHD: Tensor) -> Tensor:
    return x_nHD if x_nHD.stride(-1) == 1 else x_nHD.contiguous()


def _all_heads(x_KGD: Tensor, num_heads: int) -> Tensor:
    """[K, H, D]."""
    return _packed(x_KGD.repeat_interleave(num_heads // x_KGD.shape[1], dim=1))


def _aligned(lse_Hn: Tensor) -> Tensor:
    """Rows of a multiple of 32; what is added is +inf, of which the weight is 0."""
    return pad(lse_Hn, (0, -lse_Hn.shape[1] % _ALIGNMENT), value=torch.inf).contiguous()
