"""Space-to-depth with LayerNorm against the same in torch, eager and compiled.

Shapes: N images, H x W patches of C channels, S patches per side in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench, backward
from mmscale.kernels.downsample_norm import downsample_norm

SIZES = ((64, 27, 1152, 2), (64, 32, 1024, 2), (64, 27, 1152, 3), (8, 27, 1152, 2))
TINY = ((2, 5, 16, 2),)


def plain(x_NPC: Tensor, weight: Tensor, bias: Tensor, side: int, stride: int) -> Tensor:
    """The definition: pad the grid with zeros, fold S x S patches into one row, normalise the row."""
    num, _, channels = x_NPC.shape
    short = -side % stride
    grid = F.pad(x_NPC.view(num, side, side, channels), (0, 0, 0, short, 0, short))
    folded = (side + short) // stride
    grid = grid.view(num, folded, stride, folded, stride, channels).transpose(2, 3)
    rows = grid.reshape(num, folded * folded, stride * stride * channels)
    return F.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-5)


def run(bench: Bench) -> None:
    """Checks and times each size; the first one is held against the targets."""
    for number, (num, side, channels, stride) in enumerate(TINY if bench.dry else SIZES):
        width = stride * stride * channels
        x_NPC = bench.randn(num, side * side, channels, grad=True)
        weight, bias = bench.randn(width, grad=True), bench.randn(width, grad=True)
        leaves = (x_NPC, weight, bias)
        ours = partial(downsample_norm, grid=(side, side), stride=stride)
        eager = partial(plain, side=side, stride=stride)
        upstream = torch.randn_like(ours(*leaves))
        _check(bench, ours, eager, leaves, upstream)
        forwards = {
            "eager": partial(eager, *leaves),
            "compile": partial(bench.compiled(eager), *leaves),
            "ours": partial(ours, *leaves),
        }
        size = f"{num}x{side * side}x{channels}/{stride}"
        moved = (x_NPC.numel() + upstream.numel()) * x_NPC.element_size()
        fwd = bench.case(f"fold+norm {size} fwd", forwards, moved)
        both = {name: backward(f, leaves, upstream) for name, f in forwards.items()}
        # backward reads the input and the upstream gradient and writes one gradient: half as much again as forward
        whole = bench.case(f"fold+norm {size} fwd+bwd", both, 2.5 * moved)
        if number == 0:
            _claims(bench, size, fwd, whole, moved)


def _claims(bench: Bench, size: str, fwd: dict, whole: dict, moved: float) -> None:
    if "ours" in fwd and "ours" in whole:
        bench.report.claim(f"fold+norm {size} fwd", fwd["ours"].ms * 1e3, " us", "<= 75")
        bench.report.claim("of copy bandwidth", fwd["ours"].floor_share, "", ">= 0.7")
        bwd_s = (whole["ours"].ms - fwd["ours"].ms) / 1e3
        bench.report.claim("bwd", 1.5 * moved / bench.copy_bytes_per_s / bwd_s, "", ">= 0.6")
    bench.claim_ratio("fwd", fwd, "eager", ">= 3")
    bench.claim_ratio("fwd", fwd, "compile", ">= 1")
    bench.claim_ratio("fwd+bwd", whole, "eager")
    bench.claim_ratio("fwd+bwd", whole, "compile")


def _check(
    bench: Bench,
    ours: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    upstream: Tensor,
) -> None:
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = exact(*doubles)
    want_grads = torch.autograd.grad(want, doubles, upstream.double())
    got = ours(*leaves)
    got_grads = torch.autograd.grad(got, leaves, upstream)
    bench.require_close("downsample_norm", (got, *got_grads), (want, *want_grads))
    bench.require_no_sync(backward(partial(ours, *leaves), leaves, upstream))
