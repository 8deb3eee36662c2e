"""The product in a gated MLP, activation(gate) * up (Shazeer 2020, arXiv:2002.05202: SwiGLU and GEGLU), and its gradients.

Shapes: `...` any sizes, the same for gate and up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmscale.kernels import liger
from mmscale.kernels.compiled import compiled
from mmscale.kernels.dispatch import use_triton

Activation = Literal["silu", "gelu", "gelu_tanh"]
"""`gelu` is the exact one, `gelu_tanh` the approximation by tanh (Gemma)."""


def gated_product(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) * up, each rounded to the type of the inputs.

    CUDA tensors go through Liger-Kernel when it is installed, else through torch.compile, both unless `MMSCALE_KERNELS=torch`;
    others through one autograd function of torch operators. `gate` and `up` may be overwritten in the backward pass: nothing
    else may need them there.

    Args:
        gate, up: [...], the same shape and float type, any strides.

    Raises:
        RuntimeError: a second derivative is asked for.

    Cost:
        keeps gate and up for the backward pass; on the CPU also the activation, whose second computation costs more there than
        its memory.
    """
    if torch.compiler.is_compiling():
        return gated_formula(gate, up, activation)
    if gate.is_cuda and gate.numel() and gate.dtype != torch.float64 and use_triton(gate, up):
        is_plain = gate.is_contiguous() and up.is_contiguous()
        if is_plain and gate.dtype == up.dtype and activation != "gelu" and liger.is_installed():
            return liger.gated_product(gate, up, activation)
        return compiled(gated_formula)(gate, up, activation)
    out: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return out


def gated_formula(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`gated_product` in two operators, differentiated by autograd: what compilers are given."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate=_APPROXIMATE[activation]) * up


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=_APPROXIMATE[activation])
        ctx.save_for_backward(gate, up, None if gate.is_cuda else active)
        return active.mul_(up) if gate.is_cuda and active.dtype == up.dtype else active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up, active = ctx.saved_tensors
        dgate = dup = None
        if ctx.needs_input_grad[1]:
            if active is None:
                active = gated_formula(gate, torch.ones_like(up[..., :1]), ctx.activation)
            dup = grads[0] * active
        if ctx.needs_input_grad[0]:
            dgate = grads[0] * up
            if ctx.activation == "silu":
                torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
            else:
                kind = _APPROXIMATE[ctx.activation]
                torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate=kind, grad_input=dgate)
        return dgate, dup, None
