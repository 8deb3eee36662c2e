"""How full the planned packs are, what planning costs, and how evenly the packs keep ranks busy, on invented mixes."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from benchmarks.mixes import COST, Mix, interleaved_mix, photo_mix, plan_of, rules_for, video_mix
from benchmarks.result import Result, Settings
from mmscale.config.cost import predict_cost
from mmscale.streaming.pack import cost_imbalance
from mmscale.streaming.plan import Pack, Plan, PlanState, pack_features

STEPS = 400
"""Turns of all ranks over which the imbalance is measured, at most an epoch."""


def planned_packs(plan: Plan) -> Iterator[Pack]:
    """The packs of the whole windows of one epoch; one window more is planned on the way."""
    num_windows = plan.sources[0].num_rows // plan.window
    for pack, _, state in plan.packs(PlanState()):
        if state.window == num_windows:
            return
        yield pack


def us_per_sample(mix: Mix, seq_len: int) -> float:
    """CPU microseconds to plan one sample, the best of three epochs: noise only adds."""
    times = []
    gc.collect()
    gc.freeze()  # what else lives in this process is not to be walked through again and again
    for seed in range(3):  # other windows each time, for those that were planned are kept
        plan = plan_of(mix, rules_for(seq_len, seed=seed))
        started = time.process_time()
        deque(planned_packs(plan), maxlen=0)
        took = time.process_time() - started
        times.append(took * 1e6 / ((plan.sources[0].num_rows // plan.window + 1) * plan.window))
    gc.unfreeze()
    return min(times)


def arrival_fill(tokens: list[int], seq_len: int) -> float:
    """Share of tokens in use when each pack is closed by the first sample that does not fit."""
    packs, used = 1, 0
    for n in tokens:
        if used + n > seq_len:
            packs, used = packs + 1, 0
        used += n
    return sum(tokens) / packs / seq_len


def least_packs(tokens: NDArray[np.int64], seq_len: int) -> int:
    """A number of packs below which no packing can go (Martello and Toth's L2): long ones never share a pack.

    For each threshold k: those longer than L - k have a pack each; those longer than L / 2 too, with the room that they
    leave for the ones of at least k.
    """
    best = -(-int(tokens.sum()) // seq_len)
    for k in np.unique(tokens[tokens <= seq_len // 2])[:: max(1, seq_len // 1024)]:
        alone = int((tokens > seq_len - k).sum())
        large = tokens[(tokens > seq_len // 2) & (tokens <= seq_len - k)]
        small = tokens[(tokens >= k) & (tokens <= seq_len // 2)]
        more = int(small.sum()) - (len(large) * seq_len - int(large.sum()))
        best = max(best, alone + len(large) + max(0, -(-more // seq_len)))
    return best


def _fill(name: str, mix: Mix, seq_len: int, target: str) -> Result:
    plan = plan_of(mix, rules_for(seq_len))
    packs = list(planned_packs(plan))
    lengths = np.array([draw.tokens for pack in packs for draw in pack])
    fill = int(lengths.sum()) / len(packs) / seq_len
    assert max(sum(draw.tokens for draw in pack) for pack in packs) <= seq_len, "no pack is larger than seq_len"
    over = len(packs) / least_packs(lengths, seq_len) - 1
    arrival = arrival_fill(plan.sources[0].tokens.tolist(), seq_len)
    peer = f"in arrival order, closed by the first sample that does not fit: {arrival:.3f}"
    return Result(name, fill, "share", target, f"{peer}; {over:.2%} more packs than the lower bound of these samples")


def pack_fill_4k(_: Settings) -> Result:
    """Fill of 4,096-token packs of instruction data."""
    return _fill("pack_fill_4k", photo_mix(np.random.default_rng(0)), 4096, ">= 0.999")


def pack_fill_8k(_: Settings) -> Result:
    """Fill of 8,192-token packs of instruction data."""
    return _fill("pack_fill_8k", photo_mix(np.random.default_rng(0)), 8192, ">= 0.999")


def pack_fill_32k(_: Settings) -> Result:
    """Fill of 32,768-token packs of interleaved documents."""
    return _fill("pack_fill_32k", interleaved_mix(np.random.default_rng(0)), 32_768, ">= 0.999")


def pack_fill_video_4k(_: Settings) -> Result:
    """Fill of 4,096-token packs with video."""
    return _fill("pack_fill_video_4k", video_mix(np.random.default_rng(0)), 4096, ">= 0.995")


def pack_us_per_sample(_: Settings) -> Result:
    """CPU time to plan one sample: order, packing, grouping by cost; the slowest mix."""
    photos, web, videos = (mix(np.random.default_rng(0)) for mix in (photo_mix, interleaved_mix, video_mix))
    us = {
        "4k": us_per_sample(photos, 4096),
        "8k": us_per_sample(photos, 8192),
        "32k": us_per_sample(web, 32_768),
        "video 4k": us_per_sample(videos, 4096),
    }
    each = ", ".join(f"{name} {value:.1f}" for name, value in us.items())
    return Result("pack_us_per_sample", max(us.values()), "us", "<= 5", f"none; by mix: {each}")


def _imbalance(name: str, num_ranks: int, seq_len: int, target: str) -> Result:
    """Dearest over mean pack of the ranks that work side by side, the worse of two mixes."""
    found = {}
    for label, mix in (("photos", photo_mix), ("interleaved", interleaved_mix)):
        plan = plan_of(mix(np.random.default_rng(0), 320_000), rules_for(seq_len, max(64, num_ranks)))
        packs = islice(planned_packs(plan), STEPS * num_ranks)
        costs = predict_cost(COST, np.array([pack_features(pack, plan.sources) for pack in packs], np.float64))
        anyhow = np.random.default_rng(1).permutation(costs)
        found[label] = (*cost_imbalance(costs, num_ranks), cost_imbalance(anyhow, num_ranks)[0])
    label, (mean, worst, anyhow_mean) = max(found.items(), key=lambda item: item[1][0])
    others = ", ".join(f"{name} {values[0]:.4f}" for name, values in found.items())
    peer = f"the same packs assigned at random: {anyhow_mean:.3f}; {others}; worst step of {label} {worst:.3f}"
    return Result(name, mean, "x", target, peer)


def cost_imbalance_8_8k(_: Settings) -> Result:
    """Imbalance of the cost of 8,192-token packs over 8 ranks."""
    return _imbalance("cost_imbalance_8_8k", 8, 8192, "<= 1.01")


def cost_imbalance_64_8k(_: Settings) -> Result:
    """Imbalance of the cost of 8,192-token packs over 64 ranks."""
    return _imbalance("cost_imbalance_64_8k", 64, 8192, "<= 1.01")


def cost_imbalance_256_8k(_: Settings) -> Result:
    """Imbalance of the cost of 8,192-token packs over 256 ranks."""
    return _imbalance("cost_imbalance_256_8k", 256, 8192, "<= 1.01")


def cost_imbalance_64_32k(_: Settings) -> Result:
    """Imbalance of the cost of 32,768-token packs over 64 ranks."""
    return _imbalance("cost_imbalance_64_32k", 64, 32_768, "<= 1.02")
