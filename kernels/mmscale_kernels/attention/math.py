"""Attention written out in float64, segment by segment, on any device: what every other kernel is compared with.

It holds all scores of a segment at once, so it is for tests and for small inputs.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, R = H / G, D head size; n and m rows of one segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.kernels.attention.base import Segment, Segments
from mmscale.kernels.attention.merge import empty_result
from mmscale.kernels.dtypes import accumulate_dtype


class Math:
    """See `AttentionBackend`."""

    name = "math"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""
        return f"{device.type} has no float64" if device.type == "mps" else None

    def forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.forward`."""
        out, lse = empty_result(q_QHD)
        for row in segments.rows:
            scores_GRnm = _scores(q_QHD, k_KGD, row, segments, scale)
            lse_GRn = scores_GRnm.logsumexp(-1)
            v_G1mD = _keys_by_head(v_KGD[row.k_start : row.k_end])
            result_GRnD = (scores_GRnm - lse_GRn[..., None]).exp() @ v_G1mD
            out[row.q_start : row.q_end] = _by_row(result_GRnD)
            lse[:, row.q_start : row.q_end] = lse_GRn.flatten(0, 1)
        return out.to(q_QHD.dtype), lse

    def backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        segments: Segments, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `AttentionBackend.backward`."""
        dtype, groups = accumulate_dtype(q_QHD.dtype), k_KGD.shape[1]
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q_QHD, k_KGD, v_KGD))
        for row in segments.rows:
            queries, keys = slice(row.q_start, row.q_end), slice(row.k_start, row.k_end)
            q_GRnD, dout_GRnD, out_GRnD = (_by_head(x[queries], groups) for x in (q_QHD, dout_QHD, out_QHD))
            k_G1mD, v_G1mD = _keys_by_head(k_KGD[keys]), _keys_by_head(v_KGD[keys])
            lse_GRn1 = lse_HQ[:, queries].double().unflatten(0, (groups, -1))[..., None]
            weight_GRnm = (_scores(q_QHD, k_KGD, row, segments, scale) - lse_GRn1).exp()
            by_score = dout_GRnD @ v_G1mD.transpose(-1, -2) - (dout_GRnD * out_GRnD).sum(-1, keepdim=True)
            d_score_GRnm = weight_GRnm * by_score * scale
            dq[queries] += _by_row(d_score_GRnm @ k_G1mD)
            dk[keys] += (d_score_GRnm.transpose(-1, -2) @ q_GRnD).sum(1).transpose(0, 1)
            dv[keys] += (weight_GRnm.transpose(-1, -2) @ dout_GRnD).sum(1).transpose(0, 1)
        return dq, dk, dv


def seen(num_q: int, num_k: int, segments: Segments, device: torch.device) -> Tensor:
    """Which of its keys each query of a segment sees, bool [n, m]."""
    key_m = torch.arange(num_k, device=device)
    at_n1 = torch.arange(num_k - num_q, num_k, device=device)[:, None]
    if not segments.causal:
        return torch.ones(num_q, num_k, dtype=torch.bool, device=device)
    causal = key_m <= at_n1
    return causal if segments.window is None else causal & (key_m > at_n1 - segments.window)


def _scores(q_QHD: Tensor, k_KGD: Tensor, row: Segment, segments: Segments, scale: float) -> Tensor:
    """[G, R, n, m] in float64, -inf where nothing is seen."""
    q_GRnD = _by_head(q_QHD[row.q_start : row.q_end], k_KGD.shape[1])
    k_G1mD = _keys_by_head(k_KGD[row.k_start : row.k_end])
    mask = seen(q_GRnD.shape[2], k_G1mD.shape[2], segments, q_QHD.device)
    return (q_GRnD @ k_G1mD.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)


def _by_head(x_nHD: Tensor, groups: int) -> Tensor:
    """[G, R, n, D] in float64."""
    return x_nHD.double().transpose(0, 1).unflatten(0, (groups, -1))


def _keys_by_head(x_mGD: Tensor) -> Tensor:
    """[G, 1, m, D] in float64."""
    return x_mGD.double().transpose(0, 1)[:, None]


def _by_row(x_GRnD: Tensor) -> Tensor:
    """[n, H, D]."""
    return x_GRnD.flatten(0, 1).transpose(0, 1)
