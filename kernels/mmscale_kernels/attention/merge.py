"""Merging partial attention results over disjoint keys, and attention sinks on top of any kernel.

Shapes: Q query rows, H query heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.kernels.compiled import compiled
from mmscale.kernels.dispatch import use_triton
from mmscale.kernels.dtypes import accumulate_dtype


def empty_result(q_QHD: Tensor) -> tuple[Tensor, Tensor]:
    """(out of zeros [Q, H, D], log-sum-exp of -inf [H, Q]) of queries that have seen no key, in `accumulate_dtype`."""
    dtype = accumulate_dtype(q_QHD.dtype)
    out = torch.zeros(q_QHD.shape, dtype=dtype, device=q_QHD.device)
    lse = torch.full((q_QHD.shape[1], q_QHD.shape[0]), -torch.inf, dtype=dtype, device=q_QHD.device)
    return out, lse


def merge_(out_QHD: Tensor, lse_HQ: Tensor, part_QHD: Tensor, part_lse_HQ: Tensor) -> None:
    """Adds a partial result over other keys, in place, as softmax over all keys would have it (arXiv:2310.01889, section 3).

    Rows without a key (-inf) on either side change nothing, as long as `part_QHD` is finite there. On GPUs it is one function
    for torch.compile, which reads and writes everything once, unless `MMSCALE_KERNELS=torch`. Nothing waits for the device.

    Args:
        out_QHD, lse_HQ: as `empty_result` begins them, fp32 (fp64 for fp64 queries).
        part_QHD, part_lse_HQ: of the other keys, any float types.
    """
    compiles = out_QHD.is_cuda and out_QHD.numel() and use_triton(out_QHD) and not torch.compiler.is_compiling()
    merge = compiled(merge_formula_) if compiles else merge_formula_
    merge(out_QHD, lse_HQ, part_QHD, part_lse_HQ)


def merge_formula_(out_QHD: Tensor, lse_HQ: Tensor, part_QHD: Tensor, part_lse_HQ: Tensor) -> None:
    """`merge_` as torch operators.

    The weight of the part is sigmoid(part_lse - lse), which cannot overflow, unlike exp of the difference; where both are
    -inf the difference is no number, and 0 is meant.
    """
    part_lse_HQ = part_lse_HQ.to(lse_HQ.dtype)
    weight_HQ = torch.sigmoid(part_lse_HQ - lse_HQ).nan_to_num_(0.0)
    out_QHD.lerp_(part_QHD.to(out_QHD.dtype), weight_HQ.transpose(0, 1).unsqueeze(-1))
    torch.logaddexp(lse_HQ, part_lse_HQ, out=lse_HQ)


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
