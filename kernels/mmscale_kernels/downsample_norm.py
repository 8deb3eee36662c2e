"""Cells of patches folded into rows and normalised: what connectors that downsample begin with.

Shapes: N images, P patches (height * width), C channels, R cells per image, S patches per side of a cell, D numbers of a cell.

Used by VILA's `mlp_downsample` (norm over a cell), InternVL's pixel shuffle (the same) and Qwen2-VL's patch merger (norm over each
patch, then folded); the order of patches in a cell is row by row in all three. LayerNorm: Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.kernels.dispatch import OnDeviceOf, use_triton

NormOver = Literal["patch", "token"]
"""What is normalised at once: a `patch` of the output, which is a cell of S x S, or each `token` of the tower."""

MAX_WIDTH = {torch.float32: 12288, torch.bfloat16: 16384, torch.float16: 16384}
"""Type -> the widest normalised row that the kernels hold in registers; wider ones and other types run as plain torch."""
SUM_WIDTH = 8192
"""The widest for which the backward kernel holds the sums for weight and bias, too: beyond it, it spills."""
SUM_ROWS, SUM_COLUMNS = 16, 128
"""The tile of the kernel that makes only those sums."""


def downsample_norm(
    x_NPC: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    stride: int,
    eps: float = 1e-5,
    norm_over: NormOver = "patch",
) -> Tensor:
    """Cells of `stride` x `stride` patches as rows [N, R, D], normalised; R = ceil(height / S) * ceil(width / S), D = S * S * C.

    Cell (I, J) has in its numbers `(i * S + j) * C + c` channel c of patch (I * S + i, J * S + j). Cells at the end of a grid that S
    does not divide are filled with zeros, which enter mean and variance of `patch` (VILA's checkpoints expect that) and stay
    zeros with `token`.

    Args:
        x_NPC: [N, P, C], floating point; N may be 0. Slices such as `features[:, 1:]` are read where they are.
        weight, bias: [D], or [C] with `token`; one dtype, which need not be that of `x_NPC`.
        grid: patches (height, width), height * width = P.
        stride: S, 1 or more.
        eps: added to the variance.
        norm_over: see `NormOver`.

    Returns:
        [N, R, D] in the dtype of `x_NPC`. Sums are fp32 or better and their order is fixed, but for gradients of bf16 parameters
        in plain torch, which adds them up in bf16 on a CPU.

    Raises:
        ValueError: sizes that do not fit, or parameters of two dtypes.
        NotImplementedError: a second derivative of the Triton kernels.

    Cost:
        Kernel: reads x and writes y once; backward reads both once more and writes dx once, without an intermediate beyond
        8 bytes per normalised row. Plain torch: a folded copy of x, kept for backward.
    """
    _check(x_NPC, weight, bias, grid, stride, norm_over)
    per_token = norm_over == "token"
    fits = weight.dtype in MAX_WIDTH and weight.shape[0] <= MAX_WIDTH.get(x_NPC.dtype, 0)
    if fits and use_triton(x_NPC, weight, bias):
        return _forward(x_NPC, weight, bias, grid[0], grid[1], stride, eps, per_token)[0]  # type: ignore[no-any-return]
    if per_token:
        return space_to_depth(_layer_norm(x_NPC, weight, bias, eps), grid, stride)
    return _layer_norm(space_to_depth(x_NPC, grid, stride), weight, bias, eps)


def space_to_depth(x_NPC: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """The cells [N, R, D] of `downsample_norm` without the norm, zeros beyond the grid; plain torch, any dtype.

    Example:
        >>> space_to_depth(torch.arange(4.0).view(1, 4, 1), (2, 2), 2)
        tensor([[[0., 1., 2., 3.]]])
    """
    (n, _, c), (height, width) = x_NPC.shape, grid
    x = x_NPC.view(n, height, width, c)
    if height % stride or width % stride:
        x = F.pad(x, (0, 0, 0, -width % stride, 0, -height % stride))
    lines, columns = x.shape[1] // stride, x.shape[2] // stride
    x = x.view(n, lines, stride, columns, stride, c).transpose(2, 3)
    return x.reshape(n, lines * columns, stride * stride * c)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """In the wider of both dtypes, the result in that of `x`: CUDA's norm refuses two dtypes."""
    wide = torch.promote_types(x.dtype, weight.dtype)
    return F.layer_norm(x.to(wide), (weight.shape[0],), weight.to(wide), bias.to(wide), eps).to(x.dtype)


def _check(
    x_NPC: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], stride: int, norm_over: NormOver
) -> None:
    if norm_over not in ("patch", "token"):
        raise ValueError(f"downsample_norm: norm_over is patch or token, found {norm_over!r}")
    if stride < 1:
        raise ValueError(f"downsample_norm: a stride of 1 or more is expected, found {stride}")
    if x_NPC.dim() != 3 or x_NPC.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"downsample_norm: x of shape [N, {grid[0]} * {grid[1]}, C] is expected by the grid, found {tuple(x_NPC.shape)}"
        )
    width = x_NPC.shape[2] * (1 if norm_over == "token" else stride * stride)
    if weight.shape != (width,) or bias.shape != (width,) or weight.dtype != bias.dtype:
        raise ValueError(
            f"downsample_norm: weight and bias of shape ({width},) and one dtype are expected, found {tuple(weight.shape)} "
            f"{weight.dtype} and {tuple(bias.shape)} {bias.dtype}"
        )


def num_warps(width: int) -> int:
    """Warps of a program that holds a row of `width` numbers: 8 to 32 of them per thread, so that accesses are 128 bits wide."""
    return min(16, max(1, _power_of_2(width) // (256 if width <= 1024 else 512)))


def _power_of_2(width: int) -> int:
    return 1 << max(width - 1, 0).bit_length()


def _cells(height: int, width: int, stride: int) -> tuple[int, int]:
    return -(-height // stride), -(-width // stride)


def _in_place(x_NPC: Tensor) -> tuple[Tensor, int, int]:
    """(x, rows from image to image, row stride): `x_NPC` where its strides can be said so, else a copy."""
    n, p, c = x_NPC.shape
    image, row, channel = x_NPC.stride()
    if channel == 1 and row >= c and (n == 1 or image % row == 0):
        return x_NPC, 0 if n == 1 else image // row, row
    return x_NPC.contiguous(), p, c


def _num_processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


@torch.library.custom_op("mmscale::downsample_norm", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, stride: int, eps: float, per_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, R, D], mean, 1 / standard deviation of every normalised row)."""
    from mmscale.kernels.triton_kernels import downsample_norm as kernels

    y, mean, rstd = _outputs(x, height, width, stride, per_token)
    if mean.numel():
        (x, x_rows, x_stride), d = _in_place(x), weight.shape[0]
        OnDeviceOf(x, kernels.forward)[(mean.numel(),)](
            x, weight.contiguous(), bias.contiguous(), y, mean, rstd, height, width, *_cells(height, width, stride), x_rows, eps,
            C=x.shape[2], S=stride, D=d, X_STRIDE=x_stride, PER_TOKEN=per_token, BLOCK=_power_of_2(d), num_warps=num_warps(d),
        )  # fmt: skip
    return y, mean, rstd


def _outputs(x: Tensor, height: int, width: int, stride: int, per_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, _, c = x.shape
    lines, columns = _cells(height, width, stride)
    y = x.new_empty(n, lines * columns, stride * stride * c)
    mean = x.new_empty(n * lines * columns * (stride * stride if per_token else 1), dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


@_forward.register_fake
def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, stride: int, eps: float, per_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, height, width, stride, per_token)


@torch.library.custom_op("mmscale::downsample_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    height: int,
    width: int,
    stride: int,
    per_token: bool,
    want_x: bool,
    want_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [N, P, C], dweight, dbias), empty where not wanted."""
    from mmscale.kernels.triton_kernels import downsample_norm as kernels

    dx, dweight, dbias = _gradients(x, weight, want_x, want_parameters)
    rows, d = mean.numel(), weight.shape[0]
    if not rows:
        return dx, dweight.zero_(), dbias.zero_()
    dy, (x, x_rows, x_stride) = dy.contiguous(), _in_place(x)
    sizes = (height, width, *_cells(height, width, stride), x_rows)
    constants = {"C": x.shape[2], "S": stride, "D": d, "X_STRIDE": x_stride, "PER_TOKEN": per_token}
    whole = {**constants, "BLOCK": _power_of_2(d), "num_warps": num_warps(d)}
    if want_x and want_parameters and d <= SUM_WIDTH:
        # 16 warps hold all registers of a processor with what they keep
        partial = mean.new_empty(2, min(rows, _num_processors(x) * (16 // num_warps(d))), d)
        OnDeviceOf(x, kernels.backward_with_sums)[(partial.shape[1],)](
            dy, x, weight.contiguous(), mean, rstd, dx, *partial.unbind(), rows, *sizes, **whole
        )
        return dx, *_sums(partial, weight)
    if want_x:
        OnDeviceOf(x, kernels.backward)[(rows,)](dy, x, weight.contiguous(), mean, rstd, dx, *sizes, **whole)
    if want_parameters:
        columns = -(-d // SUM_COLUMNS)
        groups = min(-(-rows // SUM_ROWS), max(1, 8 * _num_processors(x) // columns))
        partial = mean.new_empty(2, groups, d)
        OnDeviceOf(x, kernels.parameter_gradients)[(groups, columns)](
            dy, x, mean, rstd, *partial.unbind(), rows, *sizes, **constants, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4
        )  # fmt: skip
        dweight, dbias = _sums(partial, weight)
    return dx, dweight, dbias


def _sums(partial: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dweight, dbias) of what programs have added up, [2, programs, D]."""
    return partial[0].sum(0).to(weight.dtype), partial[1].sum(0).to(weight.dtype)


def _gradients(x: Tensor, weight: Tensor, want_x: bool, want_parameters: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if want_x else (0,))
    dweight = weight.new_empty(weight.shape if want_parameters else (0,))
    return dx, dweight, torch.empty_like(dweight)


@_backward.register_fake
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    height: int,
    width: int,
    stride: int,
    per_token: bool,
    want_x: bool,
    want_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, want_x, want_parameters)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, ctx.height, ctx.width, ctx.stride, _, ctx.per_token = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = _backward(
        dy, x, weight, mean, rstd, ctx.height, ctx.width, ctx.stride, ctx.per_token, want_x, want_weight or want_bias
    )
    gradients = (dx if want_x else None, dweight if want_weight else None, dbias if want_bias else None)
    return (*gradients, None, None, None, None, None)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "downsample_norm: its Triton kernels have a first derivative only; set MMSCALE_KERNELS=torch for a second one"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
