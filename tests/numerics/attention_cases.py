"""Random segments, attention over them written out as one softmax in float64, and the check that every kernel passes.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size.
"""

import random

import torch

from mmscale.kernels.attention.attend import attend
from mmscale.kernels.attention.base import Segment, Segments

HEADS = [(4, 4), (8, 2), (6, 1)]
WINDOWS = [None, 1, 7, 1000]

EXACT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error of outputs and gradients against float64 on the same (rounded) inputs: rounding of the type, sums over a
hundred keys, and in the 16-bit types the weights that the kernels round between the two products."""


def random_segments(rng, num_q, num_k, causal, window=None):
    """Segments with gaps before, between and after them, single tokens, keys in front of the square, overlapping keys."""
    rows, at = [], 0
    while True:
        at += rng.choice([0, 0, 0, 1, 9])
        size = rng.choice([1, 1, 2, 17, 33])
        if at + size > num_q - 2:  # the last rows see nothing
            return Segments(tuple(rows), causal, window)
        keys = min(num_k, size + rng.choice([0, 0, 1, 20, 50])) if causal else rng.randint(1, 60)
        start = rng.randint(0, num_k - keys)
        rows.append(Segment(at, at + size, start, start + keys))
        at += size


def visible(segments, num_q, num_k):
    """bool [Q, K], pair by pair, as the definition says it."""
    mask = torch.zeros(num_q, num_k, dtype=torch.bool)
    for row in segments.rows:
        for query in range(row.q_start, row.q_end):
            last = row.k_end - (row.q_end - query) if segments.causal else row.k_end - 1
            first = row.k_start if segments.window is None else max(row.k_start, last - segments.window + 1)
            mask[query, first : last + 1] = True
    return mask


def reference(q, k, v, segments, scale, sinks=None):
    """(out [Q, H, D], log-sum-exp [H, Q]) in float64, differentiable; one masked softmax over all keys."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    seen = visible(segments, len(q), len(k)).to(q.device)
    some = seen.any(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = torch.where(seen | ~some[:, None], scores, -torch.inf)
    columns = scores if sinks is None else torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(q), 1)], 2)
    weights = columns.softmax(2)[..., : len(k)] * some[:, None]
    alone = (
        torch.full_like(columns[..., 0], -torch.inf) if sinks is None else sinks.double()[:, None].expand(-1, len(q))
    )
    return torch.einsum("hqk,khd->qhd", weights, v), torch.where(some, columns.logsumexp(2), alone)


def relative(got, want):
    """Relative L2 error. Norms here are 30 to 90, but for the few sinks, and where a window of 1 makes a gradient 0."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(30.0)).item()


def inputs(rng, dtype, device, heads, kv_heads, num_q=150, num_k=170, size=16):
    """q, k, v and the gradient of the output."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    shapes = ((num_q, heads), (num_k, kv_heads), (num_k, kv_heads), (num_q, heads))
    return [torch.randn(*s, size, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes]


def errors(kernel, dtype, device, seed, *, heads=(8, 2), causal=True, window=None, sinks=False):
    """Relative errors of one random case by name, after checks that hold exactly."""
    rng = random.Random(seed)
    q, k, v, dout = inputs(rng, dtype, device, *heads)
    segments = random_segments(rng, len(q), len(k), causal, window)
    sink = torch.tensor([rng.gauss(0, 2) for _ in range(heads[0])], dtype=dtype, device=device) if sinks else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *([] if sink is None else [sink]))]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out = attend(*leaves[:3], segments, 0.3, kernel, *leaves[3:])
    _, lse = kernel.forward(q, k, v, segments, 0.3)
    want, _ = reference(*exact[:3], segments, 0.3, *exact[3:])
    _, want_lse = reference(q, k, v, segments, 0.3)
    assert out.dtype == dtype and out.shape == q.shape
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and lse.shape == (heads[0], len(q))
    blind = want_lse == -torch.inf
    assert blind.any() and torch.equal(lse == -torch.inf, blind), "log-sum-exp is -inf exactly where nothing is seen"
    assert not out[blind[0]].any(), "rows that see nothing are exactly 0"
    grads = torch.autograd.grad(out, leaves, dout)
    exact_grads = torch.autograd.grad(want, exact, dout.double())
    found = {"out": relative(out, want), "lse": relative(lse[~blind], want_lse[~blind])}
    names = ("dq", "dk", "dv", "dsinks")
    return found | {n: relative(a, b) for n, a, b in zip(names, grads, exact_grads, strict=False)}
