"""Merging partial attention results: equal to one softmax over all keys, whatever the order and however many keys a part has."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mmscale.kernels.attention.merge import empty_result, merge_, merge_formula_

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""By the type of the parts; what they are merged into is fp32 at least."""


class Part(NamedTuple):
    """out [Q, H, D] and log-sum-exp [H, Q] of some keys."""

    out: Tensor
    lse: Tensor


def attention(scores_HQK: Tensor, v_KHD: Tensor) -> Part:
    """In float64; rows without a key are (0, -inf)."""
    lse = scores_HQK.logsumexp(-1)
    weights = torch.exp(scores_HQK - lse.unsqueeze(-1)).nan_to_num(0.0)
    return Part(torch.einsum("hqk,khd->qhd", weights, v_KHD), lse)


def parts_and_whole(rng: random.Random, num_parts: int, dtype: torch.dtype) -> tuple[list[Part], Part]:
    """Random parts, some without any key for some or all rows, and the attention over the keys of all of them."""
    queries, heads, size = rng.randint(1, 40), rng.randint(1, 5), rng.choice([1, 7, 16, 33])
    scale = rng.choice([1.0, 30.0, 400.0])
    parts, all_scores, all_values = [], [], []
    for _ in range(num_parts):
        keys = rng.choice([0, 1, 5, 20])
        scores = torch.randn(heads, queries, keys, dtype=torch.float64) * scale
        sees = torch.rand(queries, 1) < rng.choice([0.0, 0.5, 1.0])
        scores = scores.masked_fill(~sees, -torch.inf)
        values = torch.randn(keys, heads, size, dtype=torch.float64)
        out, lse = attention(scores, values)
        garbage = torch.isinf(lse).transpose(0, 1).unsqueeze(-1) * torch.randn(queries, heads, size)
        parts.append(Part((out + garbage).to(dtype), lse.to(torch.promote_types(dtype, torch.float32))))
        all_scores.append(scores)
        all_values.append(values)
    return parts, attention(torch.cat(all_scores, -1), torch.cat(all_values))


def merged(parts: list[Part], dtype: torch.dtype, function=merge_) -> Part:
    queries, heads, size = parts[0].out.shape
    total = Part(*empty_result(torch.empty(queries, heads, size, dtype=dtype)))
    for part in parts:
        function(*total, *part)
    return total


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parts_give_the_softmax_over_all_keys(dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        parts, whole = parts_and_whole(rng, rng.randint(1, 6), dtype)
        got = merged(parts, dtype)
        assert got.out.dtype == got.lse.dtype == torch.promote_types(dtype, torch.float32)
        empty = torch.isinf(whole.lse)
        assert torch.equal(torch.isinf(got.lse), empty)
        assert not got.out[empty.transpose(0, 1)].any(), "a row that has seen no key stays zero"
        # the log-sum-exp itself is stored in fp32: scores of 400 move a weight by 400 times its rounding
        limit = TOLERANCE[dtype] + 2 * torch.finfo(got.lse.dtype).eps * float(
            whole.lse[~empty].abs().max() if (~empty).any() else 0
        )
        assert float((got.out - whole.out).norm()) <= limit * float(whole.out.norm())
        assert torch.allclose(got.lse[~empty].double(), whole.lse[~empty], rtol=1e-6, atol=1e-6)


def test_nothing_on_both_sides_stays_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    nothing = torch.full((2, 3), -torch.inf)
    got = merged([Part(torch.randn(3, 2, 4), nothing)] * 2, torch.float32)
    assert not got.out.any() and torch.equal(got.lse, nothing)
    some = Part(torch.randn(3, 2, 4), torch.randn(2, 3))
    for order in ([some, Part(torch.randn(3, 2, 4), nothing)], [Part(torch.randn(3, 2, 4), nothing), some]):
        got = merged(order, torch.float32)
        assert torch.equal(got.out, some.out) and torch.equal(got.lse, some.lse)
    none = Part(torch.zeros(0, 2, 4), torch.zeros(2, 0))
    assert merged([none, none], torch.float32).out.shape == (0, 2, 4)


def test_far_apart_scores_do_not_overflow() -> None:
    low, high = torch.full((1, 1), -3e38), torch.full((1, 1), 3e38)
    a, b = torch.full((1, 1, 2), 1.0), torch.full((1, 1, 2), 2.0)
    for order in ([Part(a, low), Part(b, high)], [Part(b, high), Part(a, low)]):
        got = merged(order, torch.float32)
        assert torch.equal(got.out, b) and torch.equal(got.lse, high)


def test_compiled_is_the_same(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = torch.compile(merge_formula_, dynamic=True, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        parts, _ = parts_and_whole(rng, 4, torch.float32)
        want, got = merged(parts, torch.float32), merged(parts, torch.float32, graph)
        assert torch.allclose(got.out, want.out, rtol=1e-6, atol=1e-6)
        assert torch.allclose(got.lse, want.lse, rtol=1e-6, atol=1e-6)
