"""Root mean square norm (Zhang and Sennrich 2019, arXiv:1910.07467) with few passes over memory, forward and backward.

Shapes: `...` any leading sizes with R rows in all, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.kernels import liger
from mmscale.kernels.compiled import compiled
from mmscale.kernels.dispatch import use_triton
from mmscale.kernels.dtypes import accumulate_dtype, cast

_BLOCK = 128
"""Rows that a weight gradient adds up at a time: one sum over thousands of rows in fp32 is off by more than 1e-6."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True) -> Tensor:
    """x / sqrt(mean(x ** 2) + eps) * (offset + weight) along the last dimension, computed in fp32 (fp64 for fp64).

    CUDA tensors go through Liger-Kernel when it is installed, else through torch.compile, both unless `MMSCALE_KERNELS=torch`;
    others through one autograd function of torch operators.

    Args:
        x: [..., D], any float type.
        weight_D: [D]; `offset` is added to it in the type of the computation (Gemma: 1).
        rounds_first: the normalised row is rounded to the type of `x` before the weight scales it (Llama and its
            descendants; the result has the common type of both), instead of after (Gemma, GPT-OSS; the type of `x`).

    Raises:
        RuntimeError: a second derivative is asked for.

    Cost:
        keeps `x` and one number per row for the backward pass.
    """
    if torch.compiler.is_compiling():  # Inductor fuses the plain formula
        return rms_norm_formula(x, weight_D, eps, offset, rounds_first)
    if x.is_cuda and x.numel() and x.dtype != torch.float64 and use_triton(x, weight_D):
        if liger.is_installed() and x.dtype == weight_D.dtype and (rounds_first or offset == 1.0):
            return liger.rms_norm(x, weight_D, eps, offset, rounds_first)
        # as rows: hidden states and heads, [B, L, D] and [B, L, H, D], are one compilation
        rows = compiled(rms_norm_formula)(x.reshape(-1, x.shape[-1]), weight_D, eps, offset, rounds_first)
        return rows.view(x.shape)
    out: Tensor = _RmsNorm.apply(x, weight_D, eps, offset, rounds_first)  # type: ignore[no-untyped-call]
    return out


def rms_norm_formula(x: Tensor, weight_D: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    """`rms_norm` in one line of mathematics, differentiated by autograd: what compilers are given."""
    dtype = accumulate_dtype(x.dtype)
    x_acc = x.to(dtype)
    unit = x_acc * torch.rsqrt(x_acc.square().mean(-1, keepdim=True) + eps)
    if rounds_first:
        return unit.to(x.dtype) * (weight_D if offset == 0.0 else weight_D + offset)
    return (unit * (weight_D.to(dtype) + offset)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
        dtype = accumulate_dtype(x.dtype)
        x_RD = x.reshape(-1, x.shape[-1])
        norm_R1 = torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True, dtype=dtype)
        rstd_R1 = norm_R1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_RD, weight_D, rstd_R1)
        ctx.offset = offset
        unit_RD = x_RD * rstd_R1
        if not rounds_first:
            return unit_RD.mul_(weight_D.to(dtype) + offset).to(x.dtype).view(x.shape)
        scale_D = weight_D + offset if offset else weight_D
        if x.dtype == scale_D.dtype == dtype:
            return unit_RD.mul_(scale_D).view(x.shape)
        return (unit_RD.to(x.dtype) * scale_D).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_RD, weight_D, rstd_R1 = ctx.saved_tensors
        dtype = rstd_R1.dtype
        dy_RD = cast(grads[0].reshape(x_RD.shape), dtype)
        scale_D = cast(weight_D, dtype)
        scale_D = scale_D + ctx.offset if ctx.offset else scale_D
        dx = dw = None
        with torch.autocast(x_RD.device.type, enabled=False):
            product_RD = dy_RD * x_RD
            if ctx.needs_input_grad[1]:
                dw = cast(_weighted_sum(rstd_R1, product_RD), weight_D.dtype)
            if ctx.needs_input_grad[0]:
                # with s = rstd: dx = s * (dy * w - x * s ** 2 * mean(dy * w * x)); the product's memory holds dx
                pull_R = torch.mv(product_RD, scale_D).div_(-x_RD.shape[-1])
                dx_RD = torch.mul(dy_RD, scale_D, out=product_RD)
                dx_RD.addcmul_(cast(x_RD, dtype), pull_R[:, None] * rstd_R1.square()).mul_(rstd_R1)
                dx = cast(dx_RD, x_RD.dtype).view(grads[0].shape)
        return dx, dw, None, None, None


def _weighted_sum(weights_R1: Tensor, rows_RD: Tensor) -> Tensor:
    """[D], the sum of the rows times their weights, in blocks for accuracy."""
    width = rows_RD.shape[-1]
    whole = rows_RD.shape[0] // _BLOCK * _BLOCK
    blocks = torch.bmm(weights_R1[:whole].view(-1, 1, _BLOCK), rows_RD[:whole].view(-1, _BLOCK, width))
    total = blocks.sum((0, 1))
    return total if whole == len(rows_RD) else total + torch.mv(rows_RD[whole:].t(), weights_R1[whole:, 0])
