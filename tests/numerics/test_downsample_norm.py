"""Space-to-depth with LayerNorm: both implementations against the definition in float64, forward and every gradient.

Shapes: N images, P patches, C channels, R cells per image, D numbers of a cell.
"""

import importlib.util
import os

import pytest
import torch

from mmscale.kernels.downsample_norm import MAX_WIDTH, _backward, _forward, downsample_norm, space_to_depth

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Relative error: fp32 rounding of sums over a row; in bf16 that of the result itself. Rounding to nearest costs 1.7e-3 on average,
but Triton's interpreter cuts digits off instead: 3.3e-3, and with fewer than some hundred numbers it may be much more."""
TORCH_SUMS = 2e-2
"""Torch's own norm adds the gradients of bf16 parameters up in bf16 on a CPU."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES = [
    # images, grid, channels, stride
    (2, (5, 7), 24, 2),
    (1, (4, 5), 32, 3),
    (7, (1, 1), 40, 2),
    (3, (3, 2), 21, 1),
    (1, (2, 9), 17, 3),
    (2, (4, 4), 64, 4),
    (0, (4, 4), 16, 2),
    (2, (0, 3), 16, 2),
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("MMSCALE_KERNELS", request.param)
    return request.param


@pytest.fixture
def triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("MMSCALE_KERNELS", "triton")


def draw(n, grid, c, stride, norm_over, dtype, parameter_dtype=None):
    """Random (x, weight, bias, dy); x is far from zero in the mean, as the features of towers are."""
    d = c if norm_over == "token" else c * stride**2
    cells = -(-grid[0] // stride) * -(-grid[1] // stride)
    made = torch.randn(n, grid[0] * grid[1], c) + 0.5, torch.rand(d) + 0.5, torch.randn(d)
    x, weight, bias = (t.to(DEVICE, dtype if i == 0 else parameter_dtype or dtype) for i, t in enumerate(made))
    return x, weight, bias, torch.randn(n, cells, c * stride**2).to(DEVICE, dtype)


def cell_by_cell(x, weight, bias, grid, stride, eps, norm_over):
    """The definition, as loops over cells and their patches."""
    (n, _, c), (height, width), d = x.shape, grid, weight.shape[0]

    def norm(z):
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    rows = []
    for top in range(0, height, stride):
        for left in range(0, width, stride):
            spots = [(top + i, left + j) for i in range(stride) for j in range(stride)]
            if norm_over == "token":
                parts = [norm(x[:, i * width + j]) if i < height and j < width else x.new_zeros(n, d) for i, j in spots]
                rows.append(torch.cat(parts, -1))
            else:
                parts = [x[:, i * width + j] if i < height and j < width else x.new_zeros(n, c) for i, j in spots]
                rows.append(norm(torch.cat(parts, -1)))
    if not rows:  # an empty result that hangs on all inputs
        return x.new_zeros(n, 0, c * stride**2) * (x.sum() + weight.sum() + bias.sum())
    return torch.stack(rows, 1)


def derive(run, leaves, dy):
    """(y, gradients of the leaves)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = run(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def assert_close(got, want, tolerance, parameter_tolerance):
    bounds = {"y": tolerance, "dx": tolerance, "dweight": parameter_tolerance, "dbias": parameter_tolerance}
    for (name, bound), g, w in zip(bounds.items(), got, want, strict=True):
        assert g.shape == w.shape, name
        error = (g.double() - w).norm() / w.norm().clamp_min(1e-30)
        assert error <= bound, (name, error.item())


def check(case, norm_over, dtype, parameter_dtype=None, eps=1e-5, tolerance=None):
    n, grid, c, stride = case
    x, weight, bias, dy = draw(n, grid, c, stride, norm_over, dtype, parameter_dtype)
    got = derive(lambda *leaves: downsample_norm(*leaves, grid, stride, eps, norm_over), (x, weight, bias), dy)
    assert [t.dtype for t in got] == [dtype, dtype, weight.dtype, weight.dtype]
    exact = [t.double() for t in (x, weight, bias)]
    want = derive(lambda *leaves: cell_by_cell(*leaves, grid, stride, eps, norm_over), exact, dy.double())
    tolerance = tolerance or TOLERANCE[dtype]
    rounded_sums = os.environ.get("MMSCALE_KERNELS") == "torch" and weight.dtype == torch.bfloat16
    assert_close(got, want, tolerance, TORCH_SUMS if rounded_sums else max(tolerance, TOLERANCE.get(weight.dtype, 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm_over", ["patch", "token"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients(case, norm_over, dtype, backend, seed):
    torch.manual_seed(seed)
    check(case, norm_over, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("norm_over", ["patch", "token"])
def test_the_reference_is_exact_in_float64(case, norm_over, seed):
    torch.manual_seed(seed)
    check(case, norm_over, torch.float64, tolerance=1e-13)


def test_bf16_features_with_fp32_parameters(backend, seed):
    """What autocast gives: master weights beside features in bf16."""
    torch.manual_seed(seed)
    check((2, (3, 5), 24, 2), "patch", torch.bfloat16, torch.float32)
    check((2, (3, 5), 24, 2), "token", torch.bfloat16, torch.float32)


@pytest.mark.parametrize("norm_over", ["patch", "token"])
def test_width_of_siglip(norm_over, backend, seed):
    torch.manual_seed(seed)
    check((1, (3, 3), 1152, 2), norm_over, torch.bfloat16)


def test_rows_too_wide_for_sums_in_registers(triton, seed):
    """3 x 3 cells of 1,152 channels: weight and bias have a kernel of their own."""
    torch.manual_seed(seed)
    check((1, (4, 5), 1152, 3), "patch", torch.float32)


def test_rows_too_wide_for_the_kernels(triton, seed):
    torch.manual_seed(seed)
    check((1, (2, 3), MAX_WIDTH[torch.float32] // 4 + 8, 2), "patch", torch.float32)


def test_eps_counts(backend, seed):
    torch.manual_seed(seed)
    check((2, (3, 3), 8, 2), "patch", torch.float32, eps=0.5)


def test_constant_rows_give_the_bias(backend):
    """No variance: 1 / sqrt(eps) times zero."""
    weight, bias = torch.full((32,), 3.0, device=DEVICE), torch.arange(32.0, device=DEVICE)
    y = downsample_norm(torch.full((1, 4, 8), 7.0, device=DEVICE), weight, bias, (2, 2), 2)
    assert torch.equal(y[0, 0], bias)


def test_large_mean_keeps_its_digits(backend, seed):
    """The variance is that of centred values: E[x^2] - E[x]^2 in fp32 would be noise here."""
    torch.manual_seed(seed)
    x, weight, bias, _ = draw(2, (4, 4), 16, 2, "patch", torch.float32)
    x = x + 1000
    got = downsample_norm(x, weight, bias, (4, 4), 2)
    want = cell_by_cell(x.double(), weight.double(), bias.double(), (4, 4), 2, 1e-5, "patch")
    assert (got.double() - want).norm() / want.norm() <= 1e-4


# ---------------------------------------------------------------- what autograd, strides and compilers do to it


FROZEN = [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1) if x or w or b]


@pytest.mark.parametrize("wanted", FROZEN, ids=lambda w: "".join(n for n, on in zip("xwb", w, strict=True) if on))
@pytest.mark.parametrize("norm_over", ["patch", "token"])
def test_frozen_inputs_get_no_gradient(wanted, norm_over, backend, seed):
    torch.manual_seed(seed)
    check_wanted(wanted, draw(2, (3, 5), 12, 2, norm_over, torch.float32), (3, 5), norm_over)


def test_several_groups_of_rows_and_columns_in_a_sum(triton, seed):
    """48 rows and 300 columns: 2 programs, one of which takes two groups of 16 rows, for each of 3 groups of columns."""
    torch.manual_seed(seed)
    check_wanted((0, 1, 1), draw(1, (5, 8), 300, 2, "token", torch.float32), (5, 8), "token")


def check_wanted(wanted, drawn, grid, norm_over):
    leaves, dy = drawn[:3], drawn[3]
    exact = derive(lambda *t: cell_by_cell(*t, grid, 2, 1e-5, norm_over), [t.double() for t in leaves], dy.double())
    leaves = [leaf.requires_grad_(bool(on)) for leaf, on in zip(leaves, wanted, strict=True)]
    downsample_norm(*leaves, grid, 2, norm_over=norm_over).backward(dy)
    for leaf, on, want in zip(leaves, wanted, exact[1:], strict=True):
        assert (leaf.grad is not None) == bool(on)
        if on:
            assert (leaf.grad.double() - want).norm() / want.norm() <= 1e-6


def test_frozen_inputs_cost_no_memory(triton, seed):
    torch.manual_seed(seed)
    x, weight, bias, dy = draw(2, (3, 5), 12, 2, "patch", torch.float32)
    _, mean, rstd = _forward(x, weight, bias, 3, 5, 2, 1e-5, False)
    for want_x, want_parameters in ((True, False), (False, True)):
        dx, dweight, dbias = _backward(dy, x, weight, mean, rstd, 3, 5, 2, False, want_x, want_parameters)
        assert (dx.numel() > 0, dweight.numel() > 0, dbias.numel() > 0) == (want_x, want_parameters, want_parameters)


def strided(kind, x):
    """`x` in memory that is not its own alone."""
    n, p, c = x.shape
    if kind == "without class token":
        return torch.cat([x.new_full((n, 1, c), torch.nan), x], 1)[:, 1:]
    if kind == "columns":
        return torch.cat([x, x.new_full((n, p, 4), torch.nan)], 2)[..., :c]
    if kind == "every second image":
        return torch.stack([x, torch.full_like(x, torch.nan)], 1).flatten(0, 1)[::2]
    if kind == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return (
        x.new_empty(n, p * c + 3).copy_(torch.nn.functional.pad(x.flatten(1), (0, 3))).narrow(1, 0, p * c).view(x.shape)
    )


@pytest.mark.parametrize(
    "kind", ["without class token", "columns", "every second image", "transposed", "images not at whole rows"]
)
@pytest.mark.parametrize("norm_over", ["patch", "token"])
def test_strided_features(kind, norm_over, backend, seed):
    """Neighbouring memory is not read (it holds nan), and the gradient has the place of the input."""
    torch.manual_seed(seed)
    leaves, dy = (drawn := draw(2, (3, 5), 12, 2, norm_over, torch.float32))[:3], drawn[3]
    plain = derive(lambda *t: downsample_norm(*t, (3, 5), 2, norm_over=norm_over), leaves, dy)
    slices = [strided(kind, leaves[0]), *leaves[1:]]
    assert not slices[0].is_contiguous() and torch.equal(slices[0], leaves[0])
    got = derive(lambda *t: downsample_norm(*t, (3, 5), 2, norm_over=norm_over), slices, dy)
    for g, want in zip(got, plain, strict=True):
        torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-6)


def test_slices_are_not_copied(triton, monkeypatch):
    """Of features behind a class token, nothing but the results is allocated."""
    x = torch.randn(2, 17, 16, device=DEVICE)[:, 1:]
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("copied")
    )
    y = downsample_norm(x, torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE), (4, 4), 2)
    assert y.shape == (2, 4, 64)


def test_poisoned_memory_is_written_over(triton, seed, monkeypatch):
    """All results are complete, though they are made from memory that held nan."""
    torch.manual_seed(seed)
    empty = torch.Tensor.new_empty
    for case in CASES[:2] + CASES[-2:]:
        n, grid, c, stride = case
        for norm_over in ("patch", "token"):
            x, weight, bias, dy = draw(n, grid, c, stride, norm_over, torch.float32)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
                got = derive(lambda *t: downsample_norm(*t, grid, stride, norm_over=norm_over), (x, weight, bias), dy)  # noqa: B023
            assert all(g.isfinite().all() for g in got), case


def test_repeats_are_identical(triton, seed):
    torch.manual_seed(seed)
    for norm_over in ("patch", "token"):
        x, weight, bias, dy = draw(1, (5, 5), 24, 2, norm_over, torch.bfloat16)
        runs = [
            derive(lambda *t: downsample_norm(*t, (5, 5), 2, norm_over=norm_over), (x, weight, bias), dy)  # noqa: B023
            for _ in range(3)
        ]
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_operator_registration(per_token, triton, seed):
    torch.manual_seed(seed)
    x, weight, bias, _ = draw(1, (2, 3), 8, 2, "token" if per_token else "patch", torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(_forward, (*leaves, 2, 3, 2, 1e-5, per_token))
    with torch.no_grad():
        y, mean, rstd = _forward(*leaves, 2, 3, 2, 1e-5, per_token)
        arguments = (torch.randn_like(y), x.detach(), weight.detach(), mean, rstd, 2, 3, 2, per_token)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(_backward, (*arguments, *wanted))


@pytest.mark.parametrize("norm_over", ["patch", "token"])
def test_compiled_without_a_graph_break(norm_over, backend, seed):
    torch.manual_seed(seed)
    compiled = torch.compile(downsample_norm, fullgraph=True, backend="aot_eager")
    for grid, n in (((3, 3), 1), ((2, 4), 3)):  # the second time, sizes may be symbols
        x, weight, bias, dy = draw(n, grid, 8, 2, norm_over, torch.float32)
        x = torch.cat([x[:, :1], x], 1)[:, 1:]
        got = derive(lambda *t: compiled(*t, grid, 2, norm_over=norm_over), (x, weight, bias), dy)  # noqa: B023
        want = derive(lambda *t: downsample_norm(*t, grid, 2, norm_over=norm_over), (x, weight, bias), dy)  # noqa: B023
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


def test_under_activation_checkpointing_and_autocast(backend, seed):
    torch.manual_seed(seed)
    x, weight, bias, dy = draw(2, (3, 5), 8, 2, "patch", torch.bfloat16, torch.float32)

    def run(*leaves):
        with torch.autocast(DEVICE, torch.bfloat16):
            return downsample_norm(*leaves, (3, 5), 2)

    want = derive(run, (x, weight, bias), dy)
    got = derive(lambda *t: torch.utils.checkpoint.checkpoint(run, *t, use_reentrant=False), (x, weight, bias), dy)
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_second_derivatives_are_refused(triton, seed):
    torch.manual_seed(seed)
    x, weight, bias, dy = draw(1, (2, 2), 4, 2, "patch", torch.float32)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(downsample_norm(x, weight, bias, (2, 2), 2), x, dy, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative"):
        dx.sum().backward()


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 4)}, r"found \(2, 6, 4\)"),
        ({"stride": 0}, "stride of 1"),
        ({"norm_over": "row"}, "found 'row'"),
        ({"norm_over": "token"}, r"shape \(4,\)"),
        ({"bias": torch.zeros(15)}, r"found \(16,\) torch.float32 and \(15,\)"),
        ({"bias": torch.zeros(16, dtype=torch.bfloat16)}, "one dtype"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    arguments = {
        "x_NPC": torch.zeros(2, 6, 4),
        "weight": torch.ones(16),
        "bias": torch.zeros(16),
        "grid": (2, 3),
        "stride": 2,
    }
    with pytest.raises(ValueError, match=message):
        downsample_norm(**{**arguments, **change})


def test_folding_alone_moves_every_number_once(seed):
    torch.manual_seed(seed)
    x = torch.randn(2, 35, 3)
    y = space_to_depth(x, (5, 7), 3)
    assert y.shape == (2, 6, 27)
    assert torch.equal(y[y != 0].sort().values, x.flatten().sort().values)
