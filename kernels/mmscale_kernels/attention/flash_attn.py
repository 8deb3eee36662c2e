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

from mmscale.kernels.attention.torch_flash import refuses_like_flash
from mmscale.kernels.attention.varlen import Launch, VarlenBackend

_RESULTS = ("out", "log-sum-exp", "dropout mask", "random state")


class FlashAttn(VarlenBackend):
    """See `AttentionBackend`; one kernel launch unless keys of segments overlap."""

    name = "flash_attn"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""
        if find_spec("flash_attn") is None:
            return "the package flash-attn is not installed; pip install flash-attn --no-build-isolation"
        return refuses_like_flash(device, dtype, head_dim)

    def launch_forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, launch: Launch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenBackend.launch_forward`."""
        results = _package()._flash_attn_varlen_forward(
            q=q_QHD,
            k=k_KGD,
            v=v_KGD,
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

    def launch_backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        launch: Launch, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `VarlenBackend.launch_backward`."""
        dq, dk, dv = (torch.empty_like(x) for x in (q_QHD, k_KGD, v_KGD))
        _package()._flash_attn_varlen_backward(
            dout=dout_QHD,
            q=q_QHD,
            k=k_KGD,
            v=v_KGD,
            out=out_QHD,
            softmax_lse=lse_HQ,
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


@lru_cache(maxsize=1)
def _package() -> ModuleType:
    from flash_attn import flash_attn_interface

    interface: ModuleType = flash_attn_interface
    return interface
