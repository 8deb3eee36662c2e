"""What the output head and the loss cost when rows without a target are dropped and logits exist in chunks."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.result import Result, Settings, interleaved, median_ratio
from mmscale.kernels.linear_cross_entropy import linear_cross_entropy_sum, take_rows
from mmscale.types import IGNORE

TOKENS, WIDTH, VOCAB = 2048, 512, 16_384
CHUNK = 512
MEMORY = CHUNK * (VOCAB * 4 + 2 * WIDTH * 4 + 128)
ROUNDS = 5
DENSE_ROUNDS = 3


def linear_ce_ratio_30(settings: Settings) -> Result:
    """Time of a fused loss over all rows over ours with 30 % targets, forward and backward, one thread; both chunked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratio, text = _compare()
    finally:
        torch.set_num_threads(threads)
    return Result("linear_ce_ratio_30", ratio, "x", ">= 2.5", text)


def _compare() -> tuple[float, str]:
    hidden_TD, weight_VD, labels_T, targets_N = _inputs(0.3)

    def ours() -> list[Tensor]:
        rows_ND = take_rows(hidden_TD, targets_N)
        loss = linear_cross_entropy_sum(rows_ND, weight_VD, labels_T.index_select(0, targets_N), memory_bytes=MEMORY)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden_TD, weight_VD))]

    def fused() -> list[Tensor]:
        loss = _FusedOverAllRows.apply(hidden_TD, weight_VD, labels_T)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden_TD, weight_VD))]

    _require_equal(ours(), fused())
    times = interleaved([ours, fused], ROUNDS, time.process_time)
    mine, theirs = (statistics.median(t) * 1e3 for t in times)
    dense, peaks = _against_plain()
    peer = (
        f"the same chunks of {CHUNK} rows with the gradient formed in the forward pass, over all {TOKENS} rows, those without a "
        f"target masked (Liger's kernel does so; it needs a GPU): {theirs:.0f} ms, ours {mine:.0f} ms CPU; equal loss and "
        f"gradients; width {WIDTH}, vocabulary {VOCAB}, fp32. With targets everywhere ours takes {dense:.2f} of the time of "
        f"cross_entropy on all logits at once and {peaks[0]:.0f} MB beside the gradients, that {peaks[1]:.0f} MB"
    )
    return median_ratio(times[1], times[0]), peer


def _against_plain() -> tuple[float, tuple[float, float]]:
    """(our time over that of all logits at once, (our peak, theirs) in MB beside gradients) with every row a target."""
    hidden_ND, weight_VD, labels_N, _ = _inputs(1.0)

    def ours() -> list[Tensor]:
        loss = linear_cross_entropy_sum(hidden_ND, weight_VD, labels_N, memory_bytes=MEMORY)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden_ND, weight_VD))]

    def plain() -> list[Tensor]:
        loss = F.cross_entropy(F.linear(hidden_ND, weight_VD).float(), labels_N, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, (hidden_ND, weight_VD))]

    _require_equal(ours(), plain())
    times = interleaved([ours, plain], DENSE_ROUNDS, time.process_time)
    gradients = hidden_ND.nbytes + weight_VD.nbytes
    return median_ratio(*times), (_peak_mb(ours) - gradients / 1e6, _peak_mb(plain) - gradients / 1e6)


def _inputs(share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=g)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=g) / WIDTH**0.5
    labels_T = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    labels_T[torch.randperm(TOKENS, generator=g)[round(share * TOKENS) :]] = IGNORE
    targets_N = (labels_T != IGNORE).nonzero()[:, 0]
    return nn.Parameter(hidden_TD), nn.Parameter(weight_VD), labels_T, targets_N


class _FusedOverAllRows(torch.autograd.Function):
    """The fused loss as others have it: every row is multiplied, the gradient of a row without a target is set to zero."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, labels_T):
        dhidden_TD, dweight_VD = torch.empty_like(hidden_TD), torch.zeros_like(weight_VD)
        loss = hidden_TD.new_zeros(())
        for start in range(0, len(hidden_TD), CHUNK):
            rows = slice(start, start + CHUNK)
            x, labels = hidden_TD[rows], labels_T[rows]
            is_target = labels != IGNORE
            column = labels.where(is_target, 0)[:, None]
            z = x @ weight_VD.t()
            z -= z.amax(1, keepdim=True)
            target = z.gather(1, column)[:, 0]
            total = z.exp_().sum(1)
            loss += (total.log() - target).where(is_target, 0).sum()
            z *= total.reciprocal().where(is_target, 0)[:, None]
            z.scatter_add_(1, column, -is_target.to(z.dtype)[:, None])
            torch.mm(z, weight_VD, out=dhidden_TD[rows])
            dweight_VD.addmm_(z.t(), x)
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        return loss

    @staticmethod
    def backward(ctx, grad):
        dhidden_TD, dweight_VD = ctx.saved_tensors
        return dhidden_TD.mul_(grad), dweight_VD.mul_(grad), None


def _require_equal(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= 2e-6, f"equal losses and gradients are compared, found a difference of {error:.1e}"


def _peak_mb(action) -> float:
    """The most memory in use at a time beyond what was there before, by the events of torch's allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    used = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return peak / 1e6
