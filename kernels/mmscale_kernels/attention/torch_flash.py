"""torch's own flash attention on CUDA: bf16 and fp16, any lengths, windows, fewer key/value heads without copies.

`torch.nn.attention.varlen` calls the same two operators, but its gradient takes no log-sum-exp from outside. They are called
by keyword: torch 2.13 has more of them than 2.11.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.kernels.attention.varlen import Launch, VarlenBackend

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


class TorchFlash(VarlenBackend):
    """See `AttentionBackend`; one kernel launch unless keys of segments overlap."""

    name = "torch_flash"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""
        return refuses_like_flash(device, dtype, head_dim)

    def launch_forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, launch: Launch, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `VarlenBackend.launch_forward`."""
        out, lse, *_ = _forward(
            query=q_QHD,
            key=k_KGD,
            value=v_KGD,
            cum_seq_q=launch.cu_q,
            cum_seq_k=launch.cu_k,
            max_q=launch.max_q,
            max_k=launch.max_k,
            dropout_p=0.0,
            is_causal=launch.causal,
            return_debug_mask=False,
            scale=scale,
            window_size_left=launch.window_left,
            window_size_right=launch.window_right,
        )
        return out, lse

    def launch_backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        launch: Launch, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `VarlenBackend.launch_backward`."""
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q_QHD.device)
        dq, dk, dv = _backward(
            grad_out=dout_QHD,
            query=q_QHD,
            key=k_KGD,
            value=v_KGD,
            out=out_QHD,
            logsumexp=lse_HQ,
            cum_seq_q=launch.cu_q,
            cum_seq_k=launch.cu_k,
            max_q=launch.max_q,
            max_k=launch.max_k,
            dropout_p=0.0,
            is_causal=launch.causal,
            rng_state=no_dropout,
            unused=no_dropout,
            scale=scale,
            window_size_left=launch.window_left,
            window_size_right=launch.window_right,
        )
        return dq, dk, dv


def refuses_like_flash(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why no FlashAttention-2 kernel can compute on such tensors; None = they can."""
    if device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, the tensors are {dtype}"
    if head_dim is not None and (head_dim % 8 or head_dim > 256):
        return f"it takes head sizes up to 256 that are multiples of 8, the model has {head_dim}"
    if torch.version.cuda is not None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs an Ampere GPU or a newer one, {torch.cuda.get_device_name(device)} is older"
    return None
