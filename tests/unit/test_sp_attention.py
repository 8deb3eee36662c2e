"""Routes and refusals of divided attention, and how its error grows with the hops: no processes."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmscale.errors import ConfigError, ParallelError
from mmscale.kernels.attention.cpu_aten import CpuAten
from mmscale.kernels.attention.merge import empty_result, merge_
from mmscale.parallel.mesh import Axis, Mesh
from mmscale.parallel.sp.attention import SequenceAttention
from mmscale.parallel.sp.plan import make_plan, padded_lengths, rank_index
from mmscale.parallel.sp.routes import exchange_route, gather_route, ring_blocks
from mmscale.parallel.sp.ulysses import check_heads


def seen_pairs(segments, at_q, at_k):
    """(query position, key position) [pairs, 2] of some segments, by the meaning of `Segments`."""
    found = [np.zeros((0, 2), np.int64)]
    for row in segments.rows:
        num_q, num_k = row.q_end - row.q_start, row.k_end - row.k_start
        query, key = np.arange(num_q)[:, None] + (num_k - num_q), np.arange(num_k)[None]
        seen = (key <= query) | (not segments.causal)
        if segments.window is not None:
            seen = seen & (key > query - segments.window)
        q, k = seen.nonzero()
        found.append(np.stack([at_q[row.q_start + q], at_k[row.k_start + k]], 1))
    return np.concatenate(found)


def legal_pairs(lengths, window):
    document = np.repeat(np.arange(len(lengths)), lengths)
    t = np.arange(len(document))
    seen = (document[:, None] == document) & (t <= t[:, None])
    if window is not None:
        seen &= t > t[:, None] - window
    return np.argwhere(seen)


def ordered(pairs):
    """Sorted, repeated pairs kept."""
    pairs = np.asarray(pairs)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def exchanged(at, routes, rank):
    """Positions that `rank` has when all ranks follow their routes; `at`: those that each rank holds."""
    got = [at[rank]]
    for src, theirs in enumerate(routes):
        if src != rank:
            rows = np.split(theirs.send_rows, np.cumsum(theirs.send_sizes)[:-1])[rank]
            assert len(rows) == routes[rank].recv_sizes[src] == theirs.send_sizes[rank]
            got.append(at[src][rows])
    return np.concatenate(got)


def pairs_of_plan(spans, lengths, window):
    """Sorted pairs by kind, over all ranks."""
    found = {"exchange": [], "gather": [], "ring": []}
    at = [rank_index(spans, lengths, rank) for rank in range(len(spans))]
    routes = [exchange_route(spans, rank, window) for rank in range(len(spans))]
    for rank, exchange in enumerate(routes):
        gather = gather_route(spans, rank, window)
        held = {"exchange": (exchanged(at, routes, rank), exchange), "gather": (np.concatenate(at), gather)}
        for kind, (rows, route) in held.items():
            keys = rows[route.order]
            assert np.array_equal(keys, np.unique(keys)), "key rows are sorted"
            found[kind].append(seen_pairs(route.segments, at[rank], keys))
        for hop, segments in enumerate(ring_blocks(spans, rank)):
            found["ring"].append(seen_pairs(segments, at[rank], at[(rank - hop) % len(spans)]))
    return {kind: ordered(np.concatenate(pairs)) for kind, pairs in found.items()}


def test_every_legal_pair_once_over_random_plans(seed):
    rng = random.Random(seed)
    for _ in range(500):
        num_ranks = rng.choice([1, 2, 3, 4, 8])
        lengths = tuple(rng.choice([1, 1, 2, 5, 9, 14]) for _ in range(rng.randrange(1, 6)))
        lengths = padded_lengths(lengths, num_ranks)
        layout = rng.choice(["contiguous", "zigzag", "per_document", "planned"])
        window = rng.choice([None, 1, 3, 6])
        window = None if window is None or window >= max(lengths) else window
        spans = make_plan(lengths, num_ranks, layout)
        found = pairs_of_plan(spans, lengths, window)
        for kind in ("exchange", "gather") if window else found:
            assert np.array_equal(found[kind], legal_pairs(lengths, window)), (kind, layout, lengths, window, spans)


def test_a_plan_that_is_laid_out_wrongly_fails_the_same_check():
    """Negative control: zigzag pieces held in an order that the plan does not say, as in VILA's hybrid."""
    lengths = (32,)
    spans = make_plan(lengths, 2, "zigzag")
    at = {rank: np.roll(rank_index(spans, lengths, rank), 8) for rank in range(2)}
    blocks = [(rank, hop, s) for rank in range(2) for hop, s in enumerate(ring_blocks(spans, rank))]
    found = np.concatenate([seen_pairs(s, at[rank], at[(rank - hop) % 2]) for rank, hop, s in blocks])
    legal = legal_pairs(lengths, None)
    assert len(found) == len(legal) and not np.array_equal(ordered(found), legal)


def alone(ulysses=1, ring=1):
    parts = ulysses * ring
    return Mesh(
        0, parts, 0, 1, torch.device("cpu"), sequence=Axis(0, parts), ulysses=Axis(0, ulysses), ring=Axis(0, ring)
    )


def test_heads_that_cannot_be_shared_are_refused():
    for heads, kv_heads, ulysses in ((8, 2, 8), (8, 1, 4), (12, 4, 2), (6, 3, 3), (4, 4, 4)):
        check_heads(heads, kv_heads, ulysses)
    with pytest.raises(ParallelError, match=r"parallel\.ulysses=4: .* 6 query heads.*use one of 1, 2, 6"):
        check_heads(6, 2, 4)
    with pytest.raises(ParallelError, match="12 query heads that divides the 3"):
        check_heads(12, 3, 2)
    pack = SequenceAttention((((0, 0, 8),),), (8,), alone(ulysses=4))
    x = torch.randn(2, 6, 4)
    with pytest.raises(ParallelError, match="use one of"):
        pack(x, x, x, scale=1.0, window=None, sinks=None)


def test_windows_in_a_ring_unfit_plans_and_unknown_kernels_are_refused():
    spans = make_plan((8, 4), 2, "zigzag")
    x = torch.randn(6, 2, 4)
    ring = SequenceAttention(spans, (8, 4), alone(ring=2), "ring")
    with pytest.raises(ParallelError, match=r"window of 7 tokens and a document of 8; use parallel\.sp=exchange"):
        ring(x, x, x, scale=1.0, window=7, sinks=None)
    with pytest.raises(ParallelError, match="plan for 4 outer ranks"):
        SequenceAttention(spans, (8, 4), alone(ring=4))
    with pytest.raises(ParallelError, match="13 tokens"):
        SequenceAttention(spans, (8, 5), alone(ring=2))
    with pytest.raises(ConfigError, match=r"parallel\.attention=none"):
        replace(ring, kernel="none")(x, x, x, scale=1.0, window=None, sinks=None)


def emulated_ring(tensors, spans, lengths):
    """out, dq, dk, dv of all rows, each rank's hops one after the other as the ring makes them."""
    q, k, v, up = tensors
    kernel, scale = CpuAten(), 0.25
    out = torch.empty_like(q)
    total = {name: torch.zeros(x.shape) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    at = [torch.from_numpy(rank_index(spans, lengths, rank)) for rank in range(len(spans))]
    for rank, rows in enumerate(at):
        blocks = [(s, at[(rank - hop) % len(at)]) for hop, s in enumerate(ring_blocks(spans, rank)) if s.rows]
        part, lse = empty_result(q[rows])
        for segments, keys in blocks:
            merge_(part, lse, *kernel.forward(q[rows], k[keys], v[keys], segments, scale))
        out[rows] = part.to(q.dtype)
        for segments, keys in blocks:
            dq, dk, dv = kernel.backward(up[rows], q[rows], k[keys], v[keys], out[rows], lse, segments, scale)
            for name, where, grad in (("dq", rows, dq), ("dk", keys, dk), ("dv", keys, dv)):
                total[name].index_add_(0, where, grad.float())
    return [out, *(total[n].to(q.dtype) for n in ("dq", "dk", "dv"))]


def test_error_in_bf16_does_not_grow_with_the_hops(seed):
    g = torch.Generator().manual_seed(seed)
    tokens = 1024
    exact = [torch.randn(tokens, h, 16, generator=g, dtype=torch.float64) for h in (4, 2, 2, 4)]

    def errors(ranks, dtype):
        lengths = (tokens,)
        return emulated_ring([x.to(dtype) for x in exact], make_plan(lengths, ranks, "zigzag"), lengths)

    leaves = [x.clone().requires_grad_() for x in exact[:3]]
    k, v = (x.repeat_interleave(2, 1) for x in leaves[1:])
    scores = torch.einsum("qhd,khd->hqk", leaves[0], k) * 0.25
    scores = scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    true = [out.detach(), *torch.autograd.grad(out, leaves, exact[3])]
    one, many = (
        [(a.double() - b).norm() for a, b in zip(errors(r, torch.bfloat16), true, strict=True)] for r in (1, 16)
    )
    for name, before, after in zip(("out", "dq", "dk", "dv"), one, many, strict=True):
        assert after <= 1.15 * before, f"{name}: {after / before:.3f} at 16 hops"
