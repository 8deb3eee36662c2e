"""The head's chunked loss against its formula in float64: value, every gradient, memory, and what frozen tensors save."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmscale.kernels.linear_cross_entropy import (
    _linear_cross_entropy,
    linear_cross_entropy_sum,
    reference,
    take_rows,
)

LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of the relative L2 error: rounding of sums; bf16 rounds logits and results to 8 bits. Measured: 3e-15, 4e-7, 3.4e-3."""

SIZES = [(1, 5, 2), (7, 16, 31), (130, 24, 97), (300, 33, 57), (257, 8, 1000)]


def inputs(seed, rows, width, vocab, dtype=torch.float32, device="cpu"):
    """Hidden states, weight, bias that ask for gradients, and labels; logits spread by about 1.5."""
    g = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(rows, width, generator=g),
        torch.randn(vocab, width, generator=g) * 1.5 / math.sqrt(width),
        torch.randn(vocab, generator=g) * 0.3,
    ]
    leaves = [x.to(dtype).to(device).requires_grad_() for x in tensors]
    return (*leaves, torch.randint(0, vocab, (rows,), generator=g).to(device))


def room_for(rows, width, vocab, dtype):
    """A budget in bytes that holds `rows` rows and not one more: this fixes the formula from outside."""
    exact = torch.promote_types(dtype, torch.float32)
    logit = exact.itemsize + (dtype.itemsize if dtype != exact else 0)
    return rows * (vocab * logit + 2 * width * dtype.itemsize + 128)


def relative(got, want, least=0.0):
    """`least`: beneath this norm of `want`, errors count absolutely."""
    norm = want.detach().double().norm().clamp_min(least)
    return float((got.detach().double() - want.detach().double()).norm() / norm)


def exact(hidden, weight, bias, labels, z_loss, upstream):
    """[loss, gradients of hidden states, weight and bias] in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    loss = reference(leaves[0], leaves[1], labels, leaves[2], z_loss)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


def errors(seed, rows, width, vocab, dtype, chunk, device="cpu", z_loss=0.0):
    hidden, weight, bias, labels = inputs(seed, rows, width, vocab, dtype, device)
    memory = room_for(chunk, width, vocab, dtype)
    loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, z_loss=z_loss, memory_bytes=memory)
    grads = torch.autograd.grad(loss * 0.37, (hidden, weight, bias))
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and [g.dtype for g in grads] == [dtype] * 3
    want = exact(hidden, weight, bias, labels, z_loss, 0.37)
    # what is left of 1 - softmax where one row's target is almost sure is made of rounding
    return [relative(a, b, least=0.3) for a, b in zip((loss, *grads), want, strict=True)]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_equal_float64(sizes, dtype, z_loss, seed):
    """In one chunk, in chunks of any length, in single rows. A few bf16 numbers may all be rounded badly."""
    limit = 3 * LIMITS[dtype] if dtype == torch.bfloat16 and sizes[0] < 100 else LIMITS[dtype]
    for chunk in (1000, 128, 31) if sizes[0] > 100 else (1000, 3, 1):
        found = errors(seed, *sizes, dtype, chunk, z_loss=z_loss)
        assert max(found) <= limit, (chunk, found)


def test_one_class_has_no_loss_and_no_gradient(seed):
    hidden, weight, bias, labels = inputs(seed, 5, 3, 1)
    loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss == 0 and all(not g.any() for g in grads)


def test_the_reference_is_the_cross_entropy_and_the_z_loss(seed):
    hidden, weight, bias, labels = inputs(seed, 40, 8, 13, torch.float64)
    logits = F.linear(hidden, weight, bias)
    want = F.cross_entropy(logits, labels, reduction="sum") + 0.1 * logits.exp().sum(1).log().square().sum()
    assert relative(reference(hidden, weight, labels, bias, 0.1), want) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_stay_finite_and_exact(dtype, seed):
    hidden, weight, bias, labels = inputs(seed, 60, 12, 40, dtype)
    with torch.no_grad():
        weight.mul_(400)
    loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, memory_bytes=room_for(7, 12, 40, dtype))
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    want = exact(hidden, weight, bias, labels, 0.0, 1.0)
    assert loss > 1e4
    found = [relative(a, b) for a, b in zip((loss, *grads), want, strict=True)]
    # softmax is as exact as its logits, which are hundreds with a relative error of 6e-8
    assert max(found) <= (1e-4 if dtype == torch.float32 else 1e-12), found


@pytest.mark.parametrize("chunk", [1000, 50])
def test_autocast_multiplies_in_bf16_and_gives_fp32_gradients(chunk, seed):
    hidden, weight, bias, labels = inputs(seed, 170, 24, 90)
    with torch.no_grad():
        for x in (hidden, weight):
            x.copy_(x.bfloat16())  # so that only the arithmetic differs
    memory = room_for(chunk, 24, 90, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, memory_bytes=memory)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert {x.dtype for x in (loss, *grads)} == {torch.float32}
    found = [relative(a, b) for a, b in zip((loss, *grads), exact(hidden, weight, bias, labels, 0, 1), strict=True)]
    assert 1e-5 < max(found[1:]) <= 4e-3, "not as exact as fp32: it did compute in bf16"


@pytest.mark.parametrize("is_autocast", [False, True])
def test_autocast_leaves_float64_alone(is_autocast, seed):
    hidden, weight, bias, labels = inputs(seed, 20, 6, 11, torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias)
    assert loss.dtype == torch.float64 and relative(loss, exact(hidden, weight, bias, labels, 0, 1)[0]) < 1e-14


@pytest.mark.parametrize("dtype", LIMITS)
def test_no_rows_give_exactly_zero_with_gradients(dtype):
    hidden, weight, bias, labels = inputs(0, 0, 6, 11, dtype)
    loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, z_loss=0.1)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.item() == 0.0 and [g.shape for g in grads] == [hidden.shape, weight.shape, bias.shape]
    assert all(not g.any() for g in grads)


@pytest.fixture(scope="module", autouse=True)
def _a_profiler_that_has_run():
    """The first profile of a process may miss what runs while it still sets itself up."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
        torch.ones(4, 4) @ torch.ones(4, 4)


def products(function):
    """Matrix products that `function` runs, and what it gives."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = function()
    counts = {e.key: e.count for e in profile.key_averages()}
    return counts.get("aten::mm", 0) + counts.get("aten::addmm_", 0), out


@pytest.mark.parametrize("wanted", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_only_wanted_gradients_are_computed(wanted, seed):
    hidden, weight, _, labels = inputs(seed, 50, 12, 40)
    full = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels), (hidden, weight))
    hidden.requires_grad_(bool(wanted[0]))
    weight.requires_grad_(bool(wanted[1]))
    memory = room_for(20, 12, 40, torch.float32)  # 3 chunks
    count, loss = products(lambda: linear_cross_entropy_sum(hidden, weight, labels, memory_bytes=memory))
    assert count == 3 * (1 + sum(wanted)), "logits and one product for each wanted gradient, per chunk"
    assert loss.requires_grad == any(wanted)
    if loss.requires_grad:
        loss.backward()
    for x, grad, need in zip((hidden, weight), full, wanted, strict=True):
        assert (x.grad is not None) == bool(need)
        assert x.grad is None or relative(x.grad, grad) < 1e-6
    hidden.requires_grad_(True)
    with torch.no_grad():
        count, alone = products(lambda: linear_cross_entropy_sum(hidden, weight, labels, memory_bytes=memory))
    assert count == 3 and torch.equal(alone, loss.detach())


def peak_bytes(function):
    """The most memory in use at a time while `function` runs, beyond what was in use before: events of torch's allocator."""
    torch.empty(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = function()
    used = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    del out
    return peak


def test_the_peak_is_seen():
    assert peak_bytes(lambda: [torch.empty(1000, dtype=torch.float64), torch.empty(500)]) == 10_000
    assert 8_000 <= peak_bytes(lambda: [torch.empty(1000, dtype=torch.float64).sum() for _ in range(9)]) < 9_000


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast", "frozen head", "no_grad"])
@pytest.mark.parametrize("width", [16, 512])
def test_memory_stays_within_the_budget_at_any_length(width, mode, seed):
    """Beside weights and gradients: the allocator is watched through forward and backward."""
    vocab, budget = 2000, 2_000_000
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    for rows in (100, 1000, 4000):
        hidden, weight, bias, labels = inputs(seed, rows, width, vocab, dtype)
        weight.requires_grad_(mode != "frozen head")
        bias.requires_grad_(mode != "frozen head")

        def run(hidden=hidden, weight=weight, bias=bias, labels=labels):
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, memory_bytes=budget)
            if loss.requires_grad:
                loss.backward()

        with torch.set_grad_enabled(mode != "no_grad"):
            peak = peak_bytes(run)
        gradients = sum(x.nbytes for x in (hidden, weight, bias) if x.requires_grad) if mode != "no_grad" else 0
        if mode == "bf16":
            gradients += (weight.numel() + bias.numel()) * 4  # added up in fp32
        copy = weight.numel() * 2 if mode == "autocast" else 0
        print(f"{mode} {rows} rows: peak {peak}, gradients {gradients}, copy of the weight {copy}")
        assert peak - gradients - copy <= budget
        # wide gradients added up in fp32 have their peak after the last chunk, when they are cast
        assert peak - gradients - copy > budget / 3 or rows == 100 or width > 16, "the budget is used"
    assert rows * vocab * 4 > 10 * budget, "all logits at once would not fit"


def test_a_full_budget_is_no_chunk_too_many(seed):
    """129 rows with room for 128 are two chunks, and 128 one."""
    hidden, weight, _, labels = inputs(seed, 129, 8, 30)
    memory = room_for(128, 8, 30, torch.float32)
    with torch.no_grad():
        for rows in (129, 128):
            count, _ = products(
                lambda n=rows: linear_cross_entropy_sum(hidden[:n], weight, labels[:n], memory_bytes=memory)
            )
            assert count == rows - 127


def test_op_is_registered_right(seed):
    hidden, weight, bias, labels = inputs(seed, 20, 6, 11)
    memory = room_for(7, 6, 11, torch.float32)
    for some, wants in ((bias, True), (None, False)):
        args = (hidden, weight, some, labels, 1e-3, memory, torch.float32, True, True, wants)
        torch.library.opcheck(_linear_cross_entropy, args)
    args = (hidden.detach(), weight.detach(), None, labels, 0.0, memory, torch.float32, False, False, False)
    torch.library.opcheck(_linear_cross_entropy, args)


def test_compiled_whole_it_is_the_same(seed):
    hidden, weight, bias, labels = inputs(seed, 90, 12, 31)
    rows = torch.arange(0, 90, 3)

    def loss(hidden, weight, bias):
        memory = room_for(11, 12, 31, torch.float32)
        return 2 * linear_cross_entropy_sum(
            take_rows(hidden, rows), weight, labels[rows], bias_V=bias, z_loss=1e-3, memory_bytes=memory
        )

    want = loss(hidden, weight, bias)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, bias)
    assert torch.equal(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight, bias)),
        torch.autograd.grad(want, (hidden, weight, bias)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_activation_checkpointing_gives_equal_gradients(seed):
    hidden, weight, _, labels = inputs(seed, 30, 12, 31)
    plain = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels), (hidden, weight))
    loss = checkpoint(linear_cross_entropy_sum, hidden, weight, labels, use_reentrant=False)
    again = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_strides_and_views_do_not_matter(seed):
    hidden, weight, bias, labels = inputs(seed, 30, 12, 31)
    want = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias), (hidden, weight, bias))
    leaves = [x.detach().t().contiguous().t().requires_grad_() for x in (hidden, weight)]
    wide = torch.stack([bias.detach(), bias.detach()], 1).requires_grad_()
    loss = linear_cross_entropy_sum(leaves[0], leaves[1], labels.repeat_interleave(2)[::2], bias_V=wide[:, 0])
    got = torch.autograd.grad(loss, (*leaves, wide))
    assert not leaves[0].is_contiguous()
    assert all(relative(a, b) < 1e-6 for a, b in zip((*got[:2], got[2][:, 0]), want, strict=True))


def test_every_number_is_written(seed):
    """New memory is filled with NaN here."""
    hidden, weight, bias, labels = inputs(seed, 30, 12, 31)
    memory = room_for(7, 12, 31, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        loss = linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias, memory_bytes=memory)
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in (loss, *grads))


def test_first_derivative_only_and_once(seed):
    hidden, weight, _, labels = inputs(seed, 30, 12, 31)
    loss = linear_cross_entropy_sum(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


def test_misfits_are_refused(seed):
    hidden, weight, bias, labels = inputs(seed, 30, 12, 31)
    with pytest.raises(ValueError, match=r"weight \[V, D\]"):
        linear_cross_entropy_sum(hidden[:, 1:], weight, labels)
    with pytest.raises(ValueError, match=r"int64 labels \[N\]"):
        linear_cross_entropy_sum(hidden, weight, labels.int())
    with pytest.raises(ValueError, match=r"bias \[V\]"):
        linear_cross_entropy_sum(hidden, weight, labels, bias_V=bias[1:])
    with pytest.raises(ValueError, match="one type is expected without autocast"):
        linear_cross_entropy_sum(hidden, weight.bfloat16(), labels)
    need = room_for(1, 12, 31, torch.float32)
    with pytest.raises(ValueError, match=f"one row of 31 logits is expected, {need} bytes, found {need - 1}"):
        linear_cross_entropy_sum(hidden, weight, labels, memory_bytes=need - 1)
    for wrong in (-100, 31):
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy_sum(hidden, weight, labels.clone().fill_(wrong))


@pytest.mark.parametrize("rows", [[], [0], [3, 1], [2, 4, 0, 1, 3]])
def test_taken_rows_and_their_gradient(rows, seed):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    index = torch.tensor(rows, dtype=torch.int64)
    out = take_rows(x, index)
    assert torch.equal(out, x[index])
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    want = torch.zeros(5, 3)
    want[index] = 2 * x[index]
    assert torch.equal(grad, want)


class OneOfTwo:
    """The second of two ranks, without the first."""

    rank, size = 1, 2

    def largest(self, x):
        return x

    def total(self, x):
        return x


@pytest.mark.parametrize("label", [-100, 10])
def test_a_label_that_no_rank_holds_is_refused(label):
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="labels of the vocabulary are expected"):
        linear_cross_entropy_sum(hidden, weight, torch.tensor([7, label, 9]), ranks=OneOfTwo())
