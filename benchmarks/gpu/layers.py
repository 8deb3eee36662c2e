"""Norms, rotary embeddings, gated products and the merge of partial attention: libraries and compilers against eager torch.

Shapes: T tokens, D width, H query heads, G key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench, Run
from mmscale.kernels.attention.merge import merge_
from mmscale.kernels.gated import gated_formula, gated_product
from mmscale.kernels.rms_norm import rms_norm, rms_norm_formula
from mmscale.kernels.rope import rotate, rotate_formula

TOKENS, WIDTH, INNER, HEADS, KV_HEADS, SIZE = 32_768, 4096, 14_336, 32, 8, 128
"""Of an 8B model and its packs."""


def run(bench: Bench) -> None:
    """Each operation at two lengths; the longer one is held against the targets."""
    for tokens in (12,) if bench.dry else (TOKENS, 8192):
        is_headline = tokens != 8192
        shrink = 256 if bench.dry else 1
        _norm(bench, tokens, WIDTH // shrink, is_headline)
        _gated(bench, tokens, INNER // shrink, is_headline)
        _rope(bench, tokens, max(HEADS // shrink, 2), is_headline)
        _merge(bench, max(tokens // 4, 5), max(HEADS // shrink, 2), is_headline)


def _both(function: Callable[..., object], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Run:
    return lambda: torch.autograd.grad(_as_tuple(function(*leaves)), leaves, upstream)


def _as_tuple(out: object) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)  # type: ignore[arg-type]


def _race(
    bench: Bench,
    name: str,
    functions: dict[str, Callable[..., object]],
    leaves: Sequence[Tensor],
    moved: float,
    is_headline: bool,
) -> None:
    """Forward and backward of each, checked against the first in float64."""

    with torch.no_grad():
        upstream = [torch.randn_like(x) for x in _as_tuple(functions["eager"](*leaves))]
    # operations may overwrite inputs and upstream gradients
    kept = [x.detach().clone() for x in (*leaves, *upstream)]

    def restore() -> None:
        for tensor, value in zip((*leaves, *upstream), kept, strict=True):
            tensor.data.copy_(value)

    doubles = [x.double() for x in kept]
    roots = [x.requires_grad_() for x in doubles[: len(leaves)]]
    outs = _as_tuple(functions["eager"](*roots))
    want = [*outs, *torch.autograd.grad(outs, roots, doubles[len(leaves) :])]
    outs = _as_tuple(functions["ours"](*leaves))
    values = [x.detach().clone() for x in outs]
    got = [*values, *torch.autograd.grad(outs, leaves, upstream)]
    bench.require_close(name, got, want, 1e-2 if bench.dtype == torch.bfloat16 else None)
    restore()
    runs = {key: _both(f, leaves, upstream) for key, f in functions.items()}
    times = bench.case(f"{name} fwd+bwd", runs, moved, prepare=restore)
    if is_headline:
        bench.claim_ratio(f"{name} fwd+bwd", times, "eager", ">= 4" if name.startswith("norm") else "")
        bench.claim_ratio(name.partition(" ")[0], times, "compile", ">= 0.9")


def _norm(bench: Bench, tokens: int, width: int, is_headline: bool) -> None:
    x_TD, weight_D = bench.randn(tokens, width, grad=True), bench.randn(width, grad=True)
    formula = partial(rms_norm_formula, eps=1e-5, offset=0.0, rounds_first=True)
    functions = {
        "eager": formula,
        "torch": lambda x, w: F.rms_norm(x, (width,), w, 1e-5),
        "compile": bench.compiled(formula),
        "ours": lambda x, w: rms_norm(x, w, 1e-5),
    }
    _race(bench, f"norm {tokens}x{width}", functions, (x_TD, weight_D), 5 * x_TD.nbytes, is_headline)


def _gated(bench: Bench, tokens: int, inner: int, is_headline: bool) -> None:
    gate, up = bench.randn(tokens, inner, grad=True), bench.randn(tokens, inner, grad=True)
    formula = partial(gated_formula, activation="silu")
    functions = {"eager": formula, "compile": bench.compiled(formula), "ours": gated_product}
    _race(bench, f"gated {tokens}x{inner}", functions, (gate, up), 8 * gate.nbytes, is_headline)


def _rope(bench: Bench, tokens: int, heads: int, is_headline: bool) -> None:
    size = 16 if bench.dry else SIZE
    q = bench.randn(1, tokens, heads, size, grad=True)
    k = bench.randn(1, tokens, max(heads // 4, 1), size, grad=True)
    angles = torch.outer(torch.arange(tokens), 10_000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
    cos, sin = (f(angles)[None].to(bench.device, bench.dtype) for f in (torch.cos, torch.sin))

    def with_angles(function: Callable[..., object]) -> Callable[..., object]:
        return lambda q, k: function(q, k, cos.to(q.dtype), sin.to(q.dtype))

    functions = {
        "eager": with_angles(rotate_formula),
        "compile": with_angles(bench.compiled(rotate_formula)),
        "ours": with_angles(rotate),
    }
    _race(bench, f"rope {tokens}x{heads}x{size}", functions, (q, k), 4 * (q.nbytes + k.nbytes), is_headline)


def _merge(bench: Bench, queries: int, heads: int, is_headline: bool) -> None:
    """Partial results of ring attention: one fp32 pair that grows, one part of the kernel's type."""
    size = 16 if bench.dry else SIZE
    out = torch.randn(queries, heads, size, device=bench.device)
    lse, part_lse = (torch.randn(heads, queries, device=bench.device) for _ in "ab")
    part = bench.randn(queries, heads, size)

    want = _merged(*(x.double() for x in (out, lse, part, part_lse)))
    got = (out.clone(), lse.clone())
    merge_(*got, part, part_lse)
    bench.require_close("merge of attention", got, want, 1e-6)
    bench.require_no_sync(lambda: merge_(*got, part, part_lse))
    functions = {
        "eager": partial(_merged, out, lse, part, part_lse),
        "jit.script": partial(torch.jit.script(_merged), out, lse, part, part_lse),
        "ours": lambda: merge_(*got, part, part_lse),
    }
    times = bench.case(f"lse merge {queries}x{heads}x{size}", functions, 2 * out.nbytes + part.nbytes)
    if is_headline:
        bench.claim_ratio(f"lse merge {queries}", times, "jit.script", ">= 3")
        bench.claim_ratio("lse merge", times, "eager")


def _merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp(lse, part_lse)
    old = torch.exp(lse - both).transpose(0, 1).unsqueeze(-1)
    new = torch.exp(part_lse - both).transpose(0, 1).unsqueeze(-1)
    return old * out + new * part, both
