"""RMSNorm, gated products and rotations against float64, forward and backward, and the formulas that compilers are given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.kernels import liger
from mmscale.kernels.dispatch import is_interpreted
from mmscale.kernels.gated import Activation, gated_formula, gated_product
from mmscale.kernels.rms_norm import rms_norm, rms_norm_formula
from mmscale.kernels.rope import rotate, rotate_formula

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
ROUNDED_TWICE = 6e-3
"""bf16 where the result is the product of two rounded numbers, as Hugging Face's modules define it."""


def error(got: Tensor, ref: Tensor) -> float:
    assert got.shape == ref.shape
    return float((got.double() - ref).norm() / ref.norm().clamp_min(1e-300))


def value_and_grads(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(out.dtype))]


def true_norm(x: Tensor, w: Tensor, eps: float, offset: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (w + offset)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("offset", "rounds_first"), [(0.0, True), (0.0, False), (1.0, False)])
def test_rms_norm(dtype: torch.dtype, offset: float, rounds_first: bool, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    limit = ROUNDED_TWICE if rounds_first and dtype is torch.bfloat16 else TOLERANCE[dtype]
    # the gradient along a row cancels against its own length: in rows of a few elements little is left of it
    for shape in (
        (127, 33),
        (1, 1, 64),
        (1, 128, 16),
        (2, 129, 8, 24),
        (1, 5000, 64),
        (rng.randint(1, 999), rng.randint(16, 99)),
    ):
        x = (torch.randn(shape) * rng.choice([1e-3, 1.0, 50.0])).to(dtype)
        w, dy = (torch.rand(shape[-1]) + 0.5).to(dtype), torch.randn(shape).to(dtype)
        eps = rng.choice([1e-6, 1e-5])
        kind = {"eps": eps, "offset": offset, "rounds_first": rounds_first}
        ref = value_and_grads(partial(true_norm, eps=eps, offset=offset), [x.double(), w.double()], dy.double())
        ours = value_and_grads(partial(rms_norm, **kind), [x, w], dy)
        plain = value_and_grads(partial(rms_norm_formula, **kind), [x, w], dy)
        assert [t.dtype for t in ours] == [t.dtype for t in plain] == [dtype] * 3
        for got, formula, want in zip(ours, plain, ref, strict=True):
            assert error(got, want) < max(limit, 1.1 * error(formula, want)), shape
            assert error(formula, want) < 2 * limit


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_product(dtype: torch.dtype, activation: Activation, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def truth(gate: Tensor, up: Tensor) -> Tensor:
        if activation == "silu":
            return gate * torch.sigmoid(gate) * up
        return F.gelu(gate, approximate="none" if activation == "gelu" else "tanh") * up

    for shape in ((1, 1, 77), (1, 130, 33), (rng.randint(1, 300), rng.randint(64, 300))):
        gate, up, dy = ((torch.randn(shape) * 2).to(dtype) for _ in range(3))
        ref = value_and_grads(truth, [gate.double(), up.double()], dy.double())
        ours = value_and_grads(lambda a, b: gated_product(a, b, activation), [gate, up], dy)
        plain = value_and_grads(lambda a, b: gated_formula(a, b, activation), [gate, up], dy)
        for got, formula, want in zip(ours, plain, ref, strict=True):
            assert got.dtype == dtype
            assert error(got, want) < max(TOLERANCE[dtype], 1.1 * error(formula, want))
            assert error(formula, want) < 2 * TOLERANCE[dtype]


def angles(length: int, size: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor]:
    half = torch.rand(batch, length, size // 2) * 7
    full = torch.cat((half, half), dim=-1)
    return full.cos().to(dtype), full.sin().to(dtype)


def true_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By complex numbers."""
    half = cos.shape[-1] // 2
    plane = torch.complex(x[..., :half], x[..., half : 2 * half])
    turned = plane * torch.complex(cos[..., None, :half].double(), sin[..., None, :half].double())
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def queries(function: Callable[..., tuple[Tensor, Tensor]], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, x[:, :, :1], cos, sin)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16])
def test_rotation(dtype: torch.dtype, angle_dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    limit = ROUNDED_TWICE if dtype is angle_dtype is torch.bfloat16 else TOLERANCE[dtype]
    for batch, length, heads, groups, size, rotated in (
        (1, 1, 64, 32, 2, 2),  # heads enough that the rounding of single numbers evens out
        (1, 131, 6, 2, 16, 16),
        (2, 17, 3, 3, 20, 12),
    ):
        cos, sin = angles(length, rotated, angle_dtype, batch)
        for count in (heads, groups):
            x, dy = torch.randn(2, batch, length, count, size).to(dtype)
            ref = value_and_grads(partial(true_rotation, cos=cos, sin=sin), [x.double()], dy.double())
            for function in (rotate, rotate_formula):
                got = value_and_grads(partial(queries, function, cos=cos, sin=sin), [x], dy)
                assert all(t.dtype == dtype and error(t, r) < limit for t, r in zip(got, ref, strict=True))
        q, k = torch.randn(batch, length, heads, size), torch.randn(batch, length, groups, size)
        _, key = rotate(q, k, cos, sin)
        assert error(key, true_rotation(k.double(), cos, sin)) < TOLERANCE[torch.float32]
        own = rotate(q[0], k[0], cos[0], sin[0])  # a pack without its first dimension
        assert all(torch.equal(a, b[0]) for a, b in zip(own, rotate(q[:1], k[:1], cos[:1], sin[:1]), strict=True))


def test_ligers_rotation_in_the_interpreter(seed: int) -> None:
    """Its other operators call device functions that the interpreter lacks; `tests/gpu` has them all."""
    if not (liger.is_installed() and is_interpreted()):
        pytest.skip("needs Liger-Kernel, and Triton's interpreter from the start of the process")
    torch.manual_seed(seed)
    for length, heads, groups, size, rotated in ((1, 1, 1, 16, 16), (13, 6, 2, 16, 16), (5, 3, 3, 24, 16)):
        cos, sin = angles(length, rotated, torch.float32)
        both = torch.randn(1, length, heads + groups, size)
        dy = torch.randn_like(both)
        cut = [heads, groups]

        def turned(x: Tensor, function: Callable[..., tuple[Tensor, Tensor]], cut: list[int] = cut) -> Tensor:
            return torch.cat(function(*(part * 1 for part in x.split(cut, -2))), -2)

        ref = value_and_grads(partial(true_rotation, cos=cos, sin=sin), [both.double()], dy.double())
        got = value_and_grads(partial(turned, function=partial(liger.rotate, cos=cos, sin=sin)), [both], dy)
        assert all(error(t, r) < 1e-6 for t, r in zip(got, ref, strict=True))


CASES: dict[str, Callable[..., Tensor]] = {
    "norm": lambda x, y: rms_norm(x, y[0, 0], 1e-6),
    "norm_gemma": lambda x, y: rms_norm(x, y[0, 0], 1e-6, offset=1.0, rounds_first=False),
    "silu": lambda x, y: gated_product(x, y),
    "gelu": lambda x, y: gated_product(x, y, "gelu_tanh"),
    "rope": lambda x, y: torch.cat(rotate(x[:, :, None], y[:, :, None], *_ANGLES), -2).flatten(-2),
}
torch.manual_seed(0)
_ANGLES = angles(37, 24, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_compiled_frozen_and_strided_inputs(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    function = CASES[name]
    x, y = torch.randn(2, 1, 37, 24)
    dy = torch.randn(function(x, y).shape)
    want = value_and_grads(function, [x, y], dy)
    graph = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, ref in zip(value_and_grads(graph, [x, y], dy), want, strict=True):
        assert error(got, ref.double()) < 1e-6

    wide = torch.randn(2, 1, 37, 48)
    wide[..., ::2] = torch.stack((x, y))
    strided = [wide[0, ..., ::2], wide[1, ..., ::2]]
    leaves = [w.detach().requires_grad_() for w in strided]
    out = function(*leaves)
    dy_strided = torch.stack((dy, dy), dim=-1)[..., 0]
    for got, ref in zip([out.detach(), *torch.autograd.grad(out, leaves, dy_strided)], want, strict=True):
        assert error(got, ref.double()) < 1e-6

    for frozen in (0, 1):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, y))]
        out = function(*leaves)
        (grad,) = torch.autograd.grad(out, [leaves[1 - frozen]], dy)
        assert error(grad, want[2 - frozen].double()) < 1e-6
    assert not function(x, y).requires_grad


@pytest.mark.parametrize("name", [name for name in CASES if name != "rope"])
def test_no_rows(name: str) -> None:
    weight = torch.ones(1, 1, 24, requires_grad=True)
    rows = torch.zeros(1, 0, 24, requires_grad=True)
    out = CASES[name](rows, weight if name.startswith("norm") else rows)
    assert out.shape == rows.shape
    out.sum().backward()
    assert rows.grad is not None and rows.grad.shape == rows.shape
    assert not name.startswith("norm") or (weight.grad is not None and not weight.grad.any())


def test_second_derivatives_are_refused(seed: int) -> None:
    torch.manual_seed(seed)
    for function in CASES.values():
        x = torch.randn(1, 37, 24, requires_grad=True)
        (grad,) = torch.autograd.grad(function(x, x.detach()).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_autocast_around_the_backward_pass_does_not_round(seed: int) -> None:
    torch.manual_seed(seed)
    x, w, dy = torch.randn(300, 40), torch.rand(40) + 0.5, torch.randn(300, 40)
    ref = value_and_grads(lambda a, b: true_norm(a, b, 1e-6, 0.0), [x.double(), w.double()], dy.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_grads(lambda a, b: rms_norm(a, b, 1e-6), [x, w], dy)
    assert all(t.dtype == torch.float32 and error(t, r) < 1e-6 for t, r in zip(got, ref, strict=True))


def test_memory_that_is_not_zero_is_not_read(seed: int) -> None:
    """Every element of a rotation is written, also those that only pass."""
    torch.manual_seed(seed)
    cos, sin = angles(5, 4, torch.float32)
    for _ in range(20):
        torch.full((1, 5, 3, 10), torch.nan)  # freed: the allocator may give it to the next
        q, k = rotate(torch.ones(1, 5, 3, 10), torch.ones(1, 5, 1, 10), cos, sin)
        assert q.isfinite().all() and k.isfinite().all()
