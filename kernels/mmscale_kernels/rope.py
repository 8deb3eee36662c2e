"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) of queries and keys, in Hugging Face's layout of half heads.

Shapes: B packs, L tokens, H query heads, G key heads, D head size, of which the first 2E are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.kernels import liger
from mmscale.kernels.compiled import compiled
from mmscale.kernels.dispatch import use_triton


def rotate(q_BLHD: Tensor, k_BLGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions, in the types that they came in.

    Element i and element i + E of a head are the two coordinates of one plane; elements from 2E on pass as they are. The
    computation has the common type of heads and angles.

    CUDA tensors go through Liger-Kernel when it is installed, which may overwrite q and k, else through torch.compile, both
    unless `MMSCALE_KERNELS=torch`; others through one autograd function of torch operators.

    Args:
        cos, sin: [B or 1, L, 2E], whose second half repeats the first; no gradient is computed for them.

    Raises:
        RuntimeError: a second derivative is asked for.

    Cost:
        keeps the angles only.
    """
    if torch.compiler.is_compiling():
        return rotate_formula(q_BLHD, k_BLGD, cos, sin)
    if q_BLHD.is_cuda and q_BLHD.numel() and q_BLHD.dtype != torch.float64 and use_triton(q_BLHD, k_BLGD, cos):
        if liger.is_installed():
            return liger.rotate(q_BLHD, k_BLGD, cos, sin)
        return compiled(rotate_formula)(q_BLHD, k_BLGD, cos, sin)
    out: tuple[Tensor, Tensor] = _Rotate.apply(q_BLHD, k_BLGD, cos, sin)  # type: ignore[no-untyped-call]
    return out


def rotate_formula(q_BLHD: Tensor, k_BLGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` from whole tensors, differentiated by autograd: what compilers are given."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def turned(x: Tensor) -> Tensor:
        size = cos.shape[-1]
        first, second = x[..., : size // 2], x[..., size // 2 : size]
        rotated = (x[..., :size] * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
        return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), dim=-1)

    return turned(q_BLHD), turned(k_BLGD)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BLHD: Tensor, k_BLGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2
        cos_BL1E, sin_BL1E = (angle[..., :half].unsqueeze(-2) for angle in (cos, sin))
        ctx.save_for_backward(cos_BL1E, sin_BL1E)
        return _turned(q_BLHD, cos_BL1E, sin_BL1E, 1), _turned(k_BLGD, cos_BL1E, sin_BL1E, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos_BL1E, sin_BL1E = ctx.saved_tensors
        back = (
            _turned(grad, cos_BL1E, sin_BL1E, -1) if needed else None
            for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)
        )
        return *back, None, None


def _turned(x: Tensor, cos_BL1E: Tensor, sin_BL1E: Tensor, sign: int) -> Tensor:
    """x [..., D] turned by the angles (`sign` 1) or back (-1), in the type of x."""
    half = cos_BL1E.shape[-1]
    dtype = torch.promote_types(x.dtype, cos_BL1E.dtype)
    x_acc = x.to(dtype)
    first, second = x_acc[..., :half], x_acc[..., half : 2 * half]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    torch.mul(first, cos_BL1E, out=out[..., :half]).addcmul_(second, sin_BL1E, value=-sign)
    torch.mul(second, cos_BL1E, out=out[..., half : 2 * half]).addcmul_(first, sin_BL1E, value=sign)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x_acc[..., 2 * half :]
    return out.to(x.dtype)
