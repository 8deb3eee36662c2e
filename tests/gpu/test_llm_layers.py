"""Norms, gated MLPs, rotations, the merge of the ring and whole decoders on a CUDA GPU, by every way that they can go there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from mmscale.kernels import liger
from mmscale.kernels.attention.merge import empty_result, merge_, merge_formula_
from mmscale.kernels.gated import gated_formula, gated_product
from mmscale.kernels.rms_norm import rms_norm, rms_norm_formula
from mmscale.kernels.rope import rotate, rotate_formula
from mmscale.model.llm.attention import WholePack
from mmscale.model.llm.layers import replace_layers
from mmscale.model.llm.load import load_llm

CUDA = torch.device("cuda")
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=["liger", "compile", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation the operators take."""
    if request.param == "liger" and not liger.is_installed():
        pytest.skip("needs Liger-Kernel (extra gpu)")
    monkeypatch.setenv("MMSCALE_KERNELS", "torch" if request.param == "torch" else "auto")
    if request.param == "compile":
        monkeypatch.setattr(liger, "is_installed", lambda: False)
        torch._dynamo.reset()  # behind its limit of variants a function would no longer be compiled
    return str(request.param)


def error(got: Tensor, ref: Tensor) -> float:
    return float((got.double() - ref).norm() / ref.norm().clamp_min(1e-300))


def value_and_grads(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*(leaf * 1 for leaf in leaves))  # an operator may overwrite what it is given, not a leaf
    return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


def check(
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    inputs = [torch.randn(shape, device=CUDA).to(dtype) for shape in shapes]
    dy = torch.randn_like(formula(*inputs))
    ref = value_and_grads(formula, [x.double() for x in inputs], dy.double())
    plain, got = value_and_grads(formula, inputs, dy), value_and_grads(function, inputs, dy)
    for ours, theirs, want in zip(got, plain, ref, strict=True):
        assert ours.dtype == dtype
        assert error(ours, want) < max(LIMITS[dtype], 1.5 * error(theirs, want))
        assert error(theirs, want) < 4 * LIMITS[dtype]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_grads(function, inputs, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("offset", "rounds_first"), [(0.0, True), (0.0, False), (1.0, False)])
def test_rms_norm(way: str, dtype: torch.dtype, offset: float, rounds_first: bool, seed: int) -> None:
    torch.manual_seed(seed)
    for shape in ((1, 1, 64), (1, 777, 96), (1, 300, 5, 40), (1, 2000, 4096)):
        check(
            lambda x, w: rms_norm(x, w, 1e-6, offset=offset, rounds_first=rounds_first),
            lambda x, w: rms_norm_formula(x, w, 1e-6, offset, rounds_first),
            [shape, shape[-1:]],
            dtype,
        )


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_product(way: str, dtype: torch.dtype, activation: str, seed: int) -> None:
    torch.manual_seed(seed)
    for shape in ((1, 1, 77), (1, 500, 333), (1, 1000, 4096)):
        check(
            lambda g, u: gated_product(g, u, activation),
            lambda g, u: gated_formula(g, u, activation),
            [shape] * 2,
            dtype,
        )
    both = torch.randn(1, 50, 2 * 96, device=CUDA)
    check(
        lambda x: gated_product(*x.chunk(2, -1), activation), lambda x: gated_formula(*x.chunk(2, -1), activation), [both.shape], dtype
    )  # fmt: skip


@pytest.mark.parametrize("dtype", LIMITS)
def test_rotation(way: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    for length, heads, groups, size in ((1, 1, 1, 64), (777, 6, 2, 64), (2048, 32, 8, 128)):
        half = torch.rand(1, length, size // 2, device=CUDA) * 7
        cos, sin = (f(torch.cat((half, half), -1)).to(dtype) for f in (torch.cos, torch.sin))

        def joined(function, q, k, cos=cos, sin=sin):
            return torch.cat(function(q, k, cos.to(q.dtype), sin.to(q.dtype)), -2)

        shapes = [(1, length, heads, size), (1, length, groups, size)]
        check(lambda q, k, f=joined: f(rotate, q, k), lambda q, k, f=joined: f(rotate_formula, q, k), shapes, dtype)


@pytest.mark.parametrize("name", ["norm", "gated"])
def test_no_rows(way: str, name: str) -> None:
    rows = torch.zeros(1, 0, 64, device=CUDA, requires_grad=True)
    out = rms_norm(rows, torch.ones(64, device=CUDA), 1e-6) if name == "norm" else gated_product(rows, rows)
    out.sum().backward()
    assert out.shape == rows.shape and rows.grad is not None


def test_merge(way: str, seed: int) -> None:
    torch.manual_seed(seed)
    for queries, heads, size in ((1, 1, 8), (333, 5, 64), (2048, 16, 128)):
        want = empty_result(torch.empty(queries, heads, size, dtype=torch.float64, device=CUDA))
        got = empty_result(torch.empty(queries, heads, size, dtype=torch.bfloat16, device=CUDA))
        for _ in range(4):
            part = torch.randn(queries, heads, size, device=CUDA).bfloat16()
            lse = torch.randn(heads, queries, device=CUDA) * 10
            lse[torch.rand_like(lse) < 0.3] = -torch.inf
            merge_formula_(*want, part, lse)
            merge_(*got, part, lse)
        seen = want[1] > -torch.inf
        assert torch.equal(got[1] > -torch.inf, seen) and error(got[1][seen], want[1][seen]) < 1e-6
        assert error(got[0], want[0]) < 1e-6


FAMILIES = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3", "stablelm")
SMALL = {
    **{
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
    **{"num_key_value_heads": 2, "head_dim": 32, "pad_token_id": None},
}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoders(way: str, family: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = load_llm(AutoConfig.for_model(family, **SMALL)).to(CUDA, dtype).train()
    ours, exact = replace_layers(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    lengths = (40, 1, 87)
    embeds = torch.randn(1, sum(lengths), 128, device=CUDA)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(CUDA)
    grads, found = [], []
    for model in (ours, theirs, exact):
        inputs = embeds.to(next(model.parameters()).dtype, copy=True).requires_grad_()
        out = model(inputs_embeds=inputs, position_ids=positions, use_cache=False, pack=WholePack(lengths)).logits[0]
        F.cross_entropy(out.float(), torch.arange(sum(lengths), device=CUDA) % 128).backward()
        found.append(out.detach())
        grads.append(
            torch.cat([inputs.grad.flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])
        )
    for values in (found, grads):
        got, stock, want = values
        assert error(got, want.double()) < 1.3 * error(stock, want.double()) + LIMITS[dtype]
