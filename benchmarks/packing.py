"""How full the planned packs are, and what planning costs, on invented mixes of lengths."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import lognormal
from benchmarks.result import Result, Settings
from mmscale.streaming.plan import Pack, Plan, PlanSource, PlanState

NUM_SAMPLES = 60_000
IMAGE_TOKENS = (144, 196, 576, 729)
FRAME_TOKENS = 196

Mix = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Text tokens and media tokens of each sample."""


def photo_mix(rng: np.random.Generator) -> Mix:
    """Instruction data: mostly one image, short skewed texts."""
    images = rng.choice(5, NUM_SAMPLES, p=(0.15, 0.70, 0.08, 0.04, 0.03))
    return lognormal(rng, 180, 1.0, 16, 8192, NUM_SAMPLES), images * rng.choice(IMAGE_TOKENS, NUM_SAMPLES)


def interleaved_mix(rng: np.random.Generator) -> Mix:
    """Web documents: 0 to 16 images, long skewed texts."""
    images = np.minimum(rng.geometric(0.35, NUM_SAMPLES) - 1, 16)
    return lognormal(rng, 400, 1.2, 16, 16_384, NUM_SAMPLES), images * rng.choice(IMAGE_TOKENS, NUM_SAMPLES)


def video_mix(rng: np.random.Generator) -> Mix:
    """One clip of 8 to 64 frames in 10 samples, else 1 to 6 image tiles."""
    is_clip = rng.random(NUM_SAMPLES) < 0.10
    clips = rng.integers(8, 65, NUM_SAMPLES) * FRAME_TOKENS
    tiles = rng.integers(1, 7, NUM_SAMPLES) * rng.choice(IMAGE_TOKENS, NUM_SAMPLES)
    return lognormal(rng, 250, 1.1, 16, 16_384, NUM_SAMPLES), np.where(is_clip, clips, tiles)


def new_plan(mix: Mix, seq_len: int, window: int) -> tuple[Plan, int]:
    """The plan over the samples of a mix that fit into a pack, and the whole windows of one epoch."""
    text, media = mix
    fits = text + media <= seq_len
    tokens = (text + media)[fits]
    source = PlanSource("mix", tokens.astype(np.uint32), media[fits].astype(np.uint32), {})
    plan = Plan([source], seq_len=seq_len, plan_group=64, window=window)
    return plan, len(tokens) // plan.window


def planned_packs(plan: Plan, num_windows: int) -> Iterator[Pack]:
    """The packs of the first windows; one window more is planned on the way, the one in which the last pack is noticed."""
    for pack, _, state in plan.packs(PlanState()):
        if state.window == num_windows:
            return
        yield pack


def us_per_sample(mix: Mix, seq_len: int, window: int) -> float:
    """CPU microseconds to plan one sample, the best of three epochs: noise only adds."""
    plan, num_windows = new_plan(mix, seq_len, window)
    times = []
    gc.collect()
    gc.freeze()  # what else lives in this process is not to be walked through again and again
    for _ in range(3):
        started = time.process_time()
        deque(planned_packs(plan, num_windows), maxlen=0)
        times.append(time.process_time() - started)
    gc.unfreeze()
    return min(times) * 1e6 / ((num_windows + 1) * plan.window)


def arrival_fill(tokens: list[int], seq_len: int) -> float:
    """Share of tokens in use when each pack is closed by the first sample that does not fit."""
    packs, used = 1, 0
    for n in tokens:
        if used + n > seq_len:
            packs, used = packs + 1, 0
        used += n
    return sum(tokens) / packs / seq_len


def _fill(name: str, mix: Mix, seq_len: int, target: str, window: int = 4096) -> Result:
    plan, num_windows = new_plan(mix, seq_len, window)
    used = [sum(draw.tokens for draw in pack) for pack in planned_packs(plan, num_windows)]
    assert max(used) <= seq_len, "no pack is larger than seq_len"
    arrival = arrival_fill(plan.sources[0].tokens.tolist(), seq_len)
    peer = f"in arrival order, closed by the first sample that does not fit: {arrival:.3f}"
    return Result(name, sum(used) / len(used) / seq_len, "share", target, peer)


def pack_fill_4k(_: Settings) -> Result:
    """Fill of 4,096-token packs of instruction data."""
    return _fill("pack_fill_4k", photo_mix(np.random.default_rng(0)), 4096, ">= 0.999")


def pack_fill_8k(_: Settings) -> Result:
    """Fill of 8,192-token packs of instruction data."""
    return _fill("pack_fill_8k", photo_mix(np.random.default_rng(0)), 8192, ">= 0.999")


def pack_fill_32k(_: Settings) -> Result:
    """Fill of 32,768-token packs of interleaved documents."""
    return _fill("pack_fill_32k", interleaved_mix(np.random.default_rng(0)), 32_768, ">= 0.999", window=16_384)


def pack_fill_video_4k(_: Settings) -> Result:
    """Fill of 4,096-token packs with video."""
    return _fill("pack_fill_video_4k", video_mix(np.random.default_rng(0)), 4096, ">= 0.995")


def pack_us_per_sample(_: Settings) -> Result:
    """CPU time to plan one sample: order, packing, grouping by cost; the slowest mix."""
    photos, web, videos = (mix(np.random.default_rng(0)) for mix in (photo_mix, interleaved_mix, video_mix))
    us = {
        "4k": us_per_sample(photos, 4096, 4096),
        "8k": us_per_sample(photos, 8192, 4096),
        "32k": us_per_sample(web, 32_768, 16_384),
        "video 4k": us_per_sample(videos, 4096, 4096),
    }
    each = ", ".join(f"{name} {value:.1f}" for name, value in us.items())
    return Result("pack_us_per_sample", max(us.values()), "us", "<= 5", f"none; by mix: {each}")
