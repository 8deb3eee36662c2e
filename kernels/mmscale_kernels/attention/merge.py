"""Merging partial attention results over disjoint keys, and attention sinks on top of any kernel.

Shapes: Q query rows, H query heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.kernels.attention.base import accumulate_dtype


def empty_result(q_QHD: Tensor) -> tuple[Tensor, Tensor]:
    """(out of zeros [Q, H, D], log-sum-exp of -inf [H, Q]) of queries that have seen no key, in `accumulate_dtype`."""
    dtype = accumulate_dtype(q_QHD.dtype)
    out = torch.zeros(q_QHD.shape, dtype=dtype, device=q_QHD.device)
    lse = torch.full((q_QHD.shape[1], q_QHD.shape[0]), -torch.inf, dtype=dtype, device=q_QHD.device)
    return out, lse


def merge_(out_QHD: Tensor, lse_HQ: Tensor, part_QHD: Tensor, part_lse_HQ: Tensor) -> None:
    """Adds a partial result over other keys, in place. Rows without a key (-inf) on either side change nothing.

    The weight of the part is sigmoid(part_lse - lse), which cannot overflow, unlike exp of the difference.
    """
    part_lse_HQ = part_lse_HQ.to(lse_HQ.dtype)
    weight_HQ = torch.sigmoid(part_lse_HQ - lse_HQ).nan_to_num_(0.0)
    out_QHD.lerp_(part_QHD.to(out_QHD.dtype), weight_HQ.transpose(0, 1).unsqueeze(-1))
    lse_HQ.copy_(torch.logaddexp(lse_HQ, part_lse_HQ))


def add_sinks(out_QHD: Tensor, lse_HQ: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) with one more logit per head in the softmax that has no value (GPT-OSS)."""
    sinks_H1 = sinks_H[:, None].to(lse_HQ.dtype)
    weight_QH1 = torch.sigmoid(lse_HQ - sinks_H1).transpose(0, 1).unsqueeze(-1)
    return (out_QHD * weight_QH1).to(out_QHD.dtype), torch.logaddexp(lse_HQ, sinks_H1.expand_as(lse_HQ))


def sinks_grad(dout_QHD: Tensor, out_QHD: Tensor, lse_HQ: Tensor, sinks_H: Tensor) -> Tensor:
    """Gradient [H] of the sinks from the out and log-sum-exp that hold them; those of q, k, v come from the kernel's backward."""
    share_HQ = torch.exp(sinks_H[:, None].to(lse_HQ.dtype) - lse_HQ)
    dot_HQ = (dout_QHD.to(lse_HQ.dtype) * out_QHD.to(lse_HQ.dtype)).sum(-1).transpose(0, 1)
    return -(share_HQ * dot_HQ).sum(1).to(sinks_H.dtype)
