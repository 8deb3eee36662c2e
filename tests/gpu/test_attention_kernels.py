"""Every attention kernel of this GPU against one softmax in float64, without waiting for the device, in linear memory."""

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from attention_cases import EXACT, HEADS, WINDOWS, errors, inputs, random_segments, relative

from mmscale.kernels.attention.attend import attend
from mmscale.kernels.attention.base import Segment, Segments
from mmscale.kernels.attention.math import Math
from mmscale.kernels.attention.merge import empty_result, merge_
from mmscale.kernels.attention.select import KERNELS, backend, explain, usable

CUDA = torch.device("cuda")
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALL = [(name, dtype) for dtype in TYPES for name in usable(CUDA, dtype)]
LIMITS = EXACT | {torch.float32: 1e-5}
"""Tensor cores multiply fp32 in three rounded parts."""


def test_auto_takes_a_real_kernel():
    print("\n" + "\n".join(explain("auto", CUDA, dtype) for dtype in TYPES))
    assert [backend("auto", CUDA, dtype).name for dtype in TYPES[1:3]] == ["efficient", "torch_flash"]


@pytest.mark.parametrize(("name", "dtype"), ALL)
def test_conformance(name, dtype, seed):
    cases = [{"heads": h, "window": w} for h in HEADS for w in WINDOWS]
    cases += [{"heads": h, "causal": False} for h in HEADS] + [{"sinks": True, "window": w} for w in (None, 7)]
    for number, case in enumerate(cases):
        found = errors(KERNELS[name](), dtype, CUDA, seed + number, **case)
        assert max(found.values()) <= LIMITS[dtype], (case, found)


@pytest.mark.parametrize("size", [8, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("name", usable(CUDA, torch.bfloat16))
def test_head_sizes_and_long_segments(name, size, seed):
    """Several tiles of every kernel, with keys in front of the square and rows that are skipped."""
    kernel, rng = KERNELS[name](), random.Random(seed)
    q, k, v, dout = inputs(rng, torch.bfloat16, CUDA, 4, 2, num_q=1500, num_k=2100, size=size)
    rows = (Segment(5, 700, 0, 1300), Segment(700, 701, 0, 900), Segment(990, 1490, 1400, 2050))
    for window in (None, 200):
        segments = Segments(rows, True, window)
        out, lse = kernel.forward(q, k, v, segments, size**-0.5)
        want, want_lse = Math().forward(*(x.double() for x in (q, k, v)), segments, size**-0.5)
        seen = want_lse > -torch.inf
        assert torch.equal(lse > -torch.inf, seen) and relative(lse[seen], want_lse[seen]) <= 1e-3
        assert relative(out, want) <= EXACT[torch.bfloat16]
        grads = kernel.backward(dout, q, k, v, out, lse, segments, size**-0.5)
        exact = Math().backward(*(x.double() for x in (dout, q, k, v, want, want_lse)), segments, size**-0.5)
        assert all(relative(a, b) <= EXACT[torch.bfloat16] for a, b in zip(grads, exact, strict=True))


@pytest.mark.parametrize("name", usable(CUDA, torch.bfloat16))
def test_single_queries_with_gaps(name, seed):
    """One query per segment with several heads per key head: flash attention's path for decoding cannot skip rows."""
    kernel, rng = KERNELS[name](), random.Random(seed)
    q, k, v, _ = inputs(rng, torch.bfloat16, CUDA, 8, 2, num_q=6, num_k=90)
    for causal in (True, False):
        segments = Segments((Segment(1, 2, 0, 50), Segment(4, 5, 60, 90)), causal)
        out, _ = kernel.forward(q, k, v, segments, 0.3)
        assert (
            relative(out, Math().forward(q.double(), k.double(), v.double(), segments, 0.3)[0]) <= EXACT[torch.bfloat16]
        )


@pytest.mark.parametrize("name", usable(CUDA, torch.bfloat16))
def test_blocks_of_keys_merge_to_one_pass(name, seed):
    kernel, rng = KERNELS[name](), random.Random(seed)
    q, k, v, dout = inputs(rng, torch.bfloat16, CUDA, 8, 2, num_q=300, num_k=900)
    whole = Segments((Segment(0, 300, 0, 900),), causal=False)
    blocks = [Segments((Segment(0, 300, a, b),), causal=False) for a, b in ((0, 1), (1, 333), (333, 900))]
    out, lse = empty_result(q)
    for block in blocks:
        merge_(out, lse, *kernel.forward(q, k, v, block, 0.3))
    want, want_lse = Math().forward(q.double(), k.double(), v.double(), whole, 0.3)
    assert relative(out, want) <= EXACT[torch.bfloat16] and relative(lse, want_lse) <= 1e-3
    final = (out.to(q.dtype), lse)
    parts = [kernel.backward(dout, q, k, v, *final, block, 0.3) for block in blocks]
    exact = Math().backward(*(x.double() for x in (dout, q, k, v, want, want_lse)), whole, 0.3)
    for got, true in zip((sum(x.float() for x in g) for g in zip(*parts, strict=True)), exact, strict=True):
        assert relative(got, true) <= EXACT[torch.bfloat16]


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, d in ALL if n != "math"])
def test_nothing_waits_for_the_device(name, dtype, seed):
    kernel, rng = KERNELS[name](), random.Random(seed)
    q, k, v, dout = inputs(rng, dtype, CUDA, 8, 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend(*leaves, random_segments(rng, len(q), len(k), True), 0.3, kernel).backward(dout)  # libraries load at first
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*leaves, random_segments(rng, len(q), len(k), True), 0.3, kernel).backward(dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_grows_with_the_tokens_and_not_their_square():
    peaks = []
    for num_tokens in (16_384, 32_768):
        q, k, v = (
            torch.randn(num_tokens, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2)
        )
        segments = Segments((Segment(0, num_tokens, 0, num_tokens),), True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(q, k, v, segments, 0.125, backend("auto", CUDA, q.dtype)).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.15 * peaks[0], peaks
