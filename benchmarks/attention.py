"""Attention kernels on one GPU: share of its peak on a pack, and what the spans of a planned rank cost beside one document."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.result import Result, Settings
from mmscale.kernels.attention.attend import attend
from mmscale.kernels.attention.base import AttentionBackend, Segment, Segments
from mmscale.kernels.attention.select import backend
from mmscale.model.llm.attention import document_segments
from mmscale.parallel.sp.plan import make_plan
from mmscale.parallel.sp.routes import exchange_route

HEADS, KV_HEADS, SIZE = 32, 8, 128
"""Of an 8B model."""
LENGTHS = (8192, 300, 2048, 5000, 61, 1024, 4096, 900, 3000, 7, 6000, 2140)
"""Documents of one pack, 32,768 tokens."""
PLANNED = (60_000, 1500, 24_000, 700, 9000, 16_000, 3872, 16_000)
"""Documents of a pack of 131,072 tokens, for 8 outer ranks."""
RANKS = 8
ROUNDS = 15

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""bf16 without sparsity, as the vendor states it for the boards with SXM."""


def attention_peak_share(settings: Settings) -> Result:
    """Forward and backward of the kernel that `auto` takes for bf16, on documents of uneven lengths."""
    segments = document_segments(LENGTHS, None)
    kernel = backend("auto", torch.device(settings.device), torch.bfloat16, SIZE)
    seconds = time_of(kernel, segments, sum(LENGTHS), sum(LENGTHS))
    tflops = flops(segments) / seconds / 1e12
    peak, source = peak_tflops()
    text = f"{source} {peak:,.0f} TFLOP/s; {kernel.name} {tflops:,.0f}, {seconds * 1e3:.2f} ms, bf16, {len(LENGTHS)} documents"
    return Result("attention_peak_share", tflops / peak, "share", ">= 0.3", text)


def attention_planned_overhead(settings: Settings) -> Result:
    """Time for the spans of a planned rank over that of one document with as many pairs of tokens, less 1; the worst rank."""
    kernel = backend("auto", torch.device(settings.device), torch.bfloat16, SIZE)
    share, rank, own, alone, num = planned_overhead(PLANNED, RANKS, partial(time_of, kernel))
    text = f"one causal call of equal FLOPs {alone * 1e3:.2f} ms; rank {rank} of {RANKS} {own * 1e3:.2f} ms, {num} spans, {kernel.name}"
    return Result("attention_planned_overhead", share, "share", "<= 0.1", text)


def planned_overhead(
    lengths: Sequence[int], num_ranks: int, seconds: Callable[[Segments, int, int], float]
) -> tuple[float, int, float, float, int]:
    """(overhead, rank, its seconds, seconds of one document with as many pairs, its spans) of the worst rank.

    Args:
        lengths: documents of a pack that the ranks divide evenly.
        seconds: time of attention, forward and backward, for segments over so many queries and keys.
    """
    spans = make_plan(lengths, num_ranks, "planned")
    found = []
    for rank in range(num_ranks):
        route = exchange_route(spans, rank, None)
        own = seconds(route.segments, sum(lengths) // num_ranks, len(route.order))
        length = round((2 * pairs(route.segments)) ** 0.5)
        alone = seconds(document_segments((length,), None), length, length)
        found.append((own / alone - 1, rank, own, alone, len(route.segments.rows)))
    return max(found)


def pairs(segments: Segments) -> int:
    """How many (query, key) pairs causal segments without a window see."""
    return sum(_pairs(row) for row in segments.rows)


def _pairs(row: Segment) -> int:
    queries, keys = row.q_end - row.q_start, row.k_end - row.k_start
    return queries * keys - queries * (queries - 1) // 2


def flops(segments: Segments) -> float:
    """Floating-point operations of forward (2 products of matrices) and backward (5)."""
    return 7 * 2.0 * HEADS * SIZE * pairs(segments)


def time_of(kernel: AttentionBackend, segments: Segments, num_q: int, num_k: int) -> float:
    """Median seconds of forward and backward on the GPU."""
    shapes = ((num_q, HEADS), (num_k, KV_HEADS), (num_k, KV_HEADS))
    q, k, v = (torch.randn(*s, SIZE, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    upstream = torch.randn_like(q)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, segments, SIZE**-0.5, kernel), (q, k, v), upstream)

    return seconds_on_gpu(run)


def seconds_on_gpu(run: Callable[[], object]) -> float:
    """Median seconds between two events around `run`, after three runs to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def peak_tflops() -> tuple[float, str]:
    """The GPU's peak and where the number is from; for an unknown one what a large product of matrices reaches."""
    name = torch.cuda.get_device_name()
    for known, peak in PEAK_TFLOPS.items():
        if known in name:
            return peak, f"{name}, stated peak"
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / seconds_on_gpu(lambda: a @ b) / 1e12, f"{name}, measured product of matrices"
