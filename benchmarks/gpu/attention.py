"""Attention on a pack of documents with every kernel that can run, and on the spans of a rank in a sequence-parallel plan.

Shapes: Q queries, K keys, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attention import HEADS, KV_HEADS, LENGTHS, PLANNED, RANKS, SIZE, pairs, planned_overhead
from benchmarks.gpu.measure import Bench, Run
from mmscale.kernels.attention.attend import attend
from mmscale.kernels.attention.base import AttentionBackend, Segments
from mmscale.kernels.attention.select import KERNELS, backend, usable
from mmscale.model.llm.attention import document_segments

TINY, TINY_PLANNED, TINY_RANKS = (9, 1, 14), (20, 12), 2
SLOW = ("math",)
"""Kernels with the whole matrix of scores, which are no peers."""


def run(bench: Bench) -> None:
    """The kernel that `auto` takes is held against the targets."""
    lengths = TINY if bench.dry else LENGTHS
    segments, total = document_segments(lengths, None), sum(lengths)
    size = 16 if bench.dry else SIZE
    auto = backend("auto", bench.device, bench.dtype, size)
    names = [name for name in usable(bench.device, bench.dtype) if bench.dry or name not in SLOW]
    check(bench, auto)
    runs = {name: attention(bench, KERNELS[name](), segments, total, total) for name in names}
    # two products of matrices forward, five backward
    flops = 7 * 2.0 * HEADS * size * pairs(segments)
    times = bench.case(f"attention {total} tokens, {len(lengths)} documents, fwd+bwd", runs, floor_flops=flops)
    if auto.name in times:
        bench.report.claim(f"{auto.name}, of matmul rate", times[auto.name].floor_share, "", ">= 0.38")
    for name in names:
        if name != auto.name:
            bench.claim_ratio(auto.name, times, name, ours=auto.name)

    def seconds(own: Segments, num_q: int, num_k: int) -> float:
        return bench.time(attention(bench, auto, own, num_q, num_k))[0] / 1e3

    planned, num_ranks = (TINY_PLANNED, TINY_RANKS) if bench.dry else (PLANNED, RANKS)
    share, rank, own, alone, num = planned_overhead(planned, num_ranks, seconds)
    print(f"rank {rank} of {num_ranks}: {num} spans {own * 1e3:.2f} ms, one document {alone * 1e3:.2f} ms", flush=True)
    bench.report.claim("planned rank, overhead", share, "", "<= 0.1")


def check(bench: Bench, kernel: AttentionBackend) -> None:
    """A small pack against one softmax per document in float64; bf16 rounds the probabilities, too."""
    lengths = TINY if bench.dry else (300, 7, 129)
    segments, total, size = document_segments(lengths, None), sum(lengths), 16 if bench.dry else SIZE
    leaves = [bench.randn(total, heads, size, grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    upstream = torch.randn_like(leaves[0])
    got, want = (
        attend(*inputs, segments, size**-0.5, own) for inputs, own in ((leaves, kernel), (doubles, KERNELS["math"]()))
    )
    got_grads = torch.autograd.grad(got, leaves, upstream)
    want_grads = torch.autograd.grad(want, doubles, upstream.double())
    limit = 1e-2 if bench.dtype == torch.bfloat16 else None
    bench.require_close(f"attention, {kernel.name}", (got, *got_grads), (want, *want_grads), limit)


def attention(bench: Bench, kernel: AttentionBackend, segments: Segments, num_q: int, num_k: int) -> Run:
    """Forward and backward of some segments."""
    size = 16 if bench.dry else SIZE
    q_QHD = bench.randn(num_q, HEADS, size, grad=True)
    k_KGD, v_KGD = (bench.randn(num_k, KV_HEADS, size, grad=True) for _ in "kv")
    upstream = torch.randn_like(q_QHD)

    def both() -> tuple[Tensor, ...]:
        out = attend(q_QHD, k_KGD, v_KGD, segments, size**-0.5, kernel)
        return torch.autograd.grad(out, (q_QHD, k_KGD, v_KGD), upstream)

    return both
