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
from mmscale.kernels.dtypes import cast


def rotate(q_BLHD: Tensor, k_BLGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions, in the types that they came in.

    Element i and element i + E of a head are the two coordinates of one plane; elements from 2E on pass as they are. The
    computation has the common type of heads and angles.

    CUDA tensors go through Liger-Kernel when it is installed, which may overwrite q and k, else through torch.compile, both
    unless `MMSCALE_KERNELS=torch`; others through one autograd function of torch operators.

    Args:
        q_BLHD, k_BLGD: or [L, H, D] and [L, G, D], with angles [L, 2E].
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
        cos, sin = cos.unsqueeze(-2), sin[..., : sin.shape[-1] // 2].unsqueeze(-2)
        ctx.save_for_backward(cos, sin)
        return _turned(q_BLHD, cos, sin, 1), _turned(k_BLGD, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors  # once: recomputed activations are given away at the first look
        needed = zip(grads, ctx.needs_input_grad, strict=False)
        return *(_turned(grad, cos, sin, -1) if wanted else None for grad, wanted in needed), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x [..., D] turned by the angles (`sign` 1) or back (-1), in the type of x; cos [..., 1, 2E], sin [..., 1, E]."""
    half = sin.shape[-1]
    x_acc = x if x.dtype == cos.dtype else x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second, rest = x_acc.split((half, half, x.shape[-1] - 2 * half), -1)
    out = x_acc[..., : 2 * half] * cos
    out_first, out_second = out.split(half, -1)
    out_first.addcmul_(second, sin, value=-sign)
    out_second.addcmul_(first, sin, value=sign)
    return cast(torch.cat((out, rest), -1) if rest.shape[-1] else out, x.dtype)
