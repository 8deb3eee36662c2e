"""The one module that imports Liger-Kernel (extra `gpu`), whose Triton operators serve CUDA tensors.

Its autograd functions are called as they are; nothing of transformers is patched. They launch kernels inside autograd
functions, which torch.compile cannot look into: callers give a plain formula to a compiler instead.

Shapes: `...` any leading sizes, D width; B packs, L tokens, H query heads, G key heads.
"""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def is_installed() -> bool:
    """Whether Liger-Kernel can be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    """See `mmscale.kernels.rms_norm`; CUDA tensors of one type, at least one row.

    The gradient gets memory of its own: Liger's way in place would change one that others may hold.
    """
    from liger_kernel.ops import LigerRMSNormFunction

    out: Tensor = LigerRMSNormFunction.apply(x, weight_D, eps, offset, "llama" if rounds_first else "gemma", False)
    return out


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `mmscale.kernels.gated`; CUDA tensors, contiguous, `silu` or `gelu_tanh`. The gradients overwrite gate and up."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    function = LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction
    out: Tensor = function.apply(gate, up)
    return out


def rotate(q_BLHD: Tensor, k_BLGD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `mmscale.kernels.rope`; CUDA tensors. Contiguous q and k are overwritten, and so are their gradients."""
    from liger_kernel.ops import LigerRopeFunction

    if q_BLHD.dim() == 3:
        q, k = rotate(*(x.unsqueeze(0) for x in (q_BLHD, k_BLGD, cos, sin)))
        return q.squeeze(0), k.squeeze(0)
    q_BHLD, k_BGLD = LigerRopeFunction.apply(q_BLHD.transpose(1, 2), k_BLGD.transpose(1, 2), cos, sin)
    return q_BHLD.transpose(1, 2), k_BGLD.transpose(1, 2)
