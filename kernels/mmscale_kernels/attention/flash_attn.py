"""The flash-attn package (FlashAttention-2) on CUDA, when it is installed; the only module that imports it.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mmscale.kernels.attention import varlen
from mmscale.kernels.attention.base import Segments
from mmscale.kernels.attention.torch_flash import refuses_like_flash
from mmscale.kernels.attention.varlen import Launch

_RESULTS = ("out", "log-sum-exp", "dropout mask", "random state")


class FlashAttn:
    """See `AttentionBackend`; one kernel launch unless keys of segments overlap."""

    name = "flash_attn"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""
        if find_spec("flash_attn") is None:
            return "the package flash-attn is not installed; pip install flash-attn --no-build-isolation"
        return refuses_like_flash(device, dtype, head_dim)

    def forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.forward`."""
        return varlen.forward(_PackageVarlen(), q_QHD, k_KGD, v_KGD, segments, scale)

    def backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        segments: Segments, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `AttentionBackend.backward`."""
        return varlen.backward(_PackageVarlen(), dout_QHD, q_QHD, k_KGD, v_KGD, out_QHD, lse_HQ, segments, scale)


@lru_cache(maxsize=1)
def _package() -> ModuleType:
    from flash_attn import flash_attn_interface

    interface: ModuleType = flash_attn_interface
    return interface


class _PackageVarlen:
    """See `VarlenKernel`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, launch: Launch, scale: float) -> tuple[Tensor, Tensor]:
        results = _package()._flash_attn_varlen_forward(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=launch.cu_q,
            cu_seqlens_k=launch.cu_k,
            max_seqlen_q=launch.max_q,
            max_seqlen_k=launch.max_k,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=launch.causal,
            window_size_left=launch.window_left,
            window_size_right=launch.window_right,
        )
        if len(results) != len(_RESULTS):
            raise RuntimeError(
                f"expected {len(_RESULTS)} results ({', '.join(_RESULTS)}) from flash-attn's varlen forward, found "
                f"{len(results)} from version {version('flash-attn')}; install flash-attn 2.7 or 2.8, or set "
                "parallel.attention=torch_flash"
            )
        out, lse = results[:2]
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, launch: Launch, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _package()._flash_attn_varlen_backward(
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=launch.cu_q,
            cu_seqlens_k=launch.cu_k,
            max_seqlen_q=launch.max_q,
            max_seqlen_k=launch.max_k,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=launch.causal,
            window_size_left=launch.window_left,
            window_size_right=launch.window_right,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv
