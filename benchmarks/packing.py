"""How full the planned packs are, and what planning costs, on invented mixes of lengths."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import lognormal
from benchmarks.result import Result, Settings
from mmscale.streaming.plan import Plan, PlanSource, PlanState

NUM_SAMPLES = 80_000
IMAGE_TOKENS = (144, 196, 576, 729)
FRAME_TOKENS = 196


@dataclass(frozen=True, slots=True)
class Planned:
    """One pass over a mix: share of tokens in use, the same for packs filled in arrival order, CPU time per sample."""

    fill: float
    arrival_fill: float
    us_per_sample: float


def photo_mix(rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instruction data: (text tokens, media tokens) [n], mostly one image, short skewed texts."""
    images = rng.choice(5, NUM_SAMPLES, p=(0.15, 0.70, 0.08, 0.04, 0.03))
    return lognormal(rng, 180, 1.0, 16, 8192, NUM_SAMPLES), images * rng.choice(IMAGE_TOKENS, NUM_SAMPLES)


def interleaved_mix(rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Web documents: (text tokens, media tokens) [n], 0 to 16 images, long skewed texts."""
    images = np.minimum(rng.geometric(0.35, NUM_SAMPLES) - 1, 16)
    return lognormal(rng, 400, 1.2, 16, 16_384, NUM_SAMPLES), images * rng.choice(IMAGE_TOKENS, NUM_SAMPLES)


def video_mix(rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One clip of 8 to 64 frames in 10 samples, else 1 to 6 image tiles: (text tokens, media tokens) [n]."""
    is_clip = rng.random(NUM_SAMPLES) < 0.10
    clips = rng.integers(8, 65, NUM_SAMPLES) * FRAME_TOKENS
    tiles = rng.integers(1, 7, NUM_SAMPLES) * rng.choice(IMAGE_TOKENS, NUM_SAMPLES)
    return lognormal(rng, 250, 1.1, 16, 16_384, NUM_SAMPLES), np.where(is_clip, clips, tiles)


def plan_mix(mix: tuple[NDArray[np.int64], NDArray[np.int64]], seq_len: int, window: int = 4096) -> Planned:
    """The packs of one epoch of the samples that fit into a pack; samples still carried at its end are not counted."""
    text, media = mix
    fits = text + media <= seq_len
    tokens, media = (text + media)[fits].astype(np.uint32), media[fits].astype(np.uint32)
    source = PlanSource("mix", tokens, media, {})
    started = time.process_time()
    plan = Plan([source], seq_len=seq_len, plan_group=64, window=window)
    num_windows = len(tokens) // plan.window
    packs = []
    for pack, _, state in plan.packs(PlanState()):
        if state.window == num_windows:  # the first pack of one more window, which is planned as a whole by now
            break
        packs.append(pack)
    took = time.process_time() - started
    used = [sum(draw.tokens for draw in pack) for pack in packs]
    assert max(used) <= seq_len, "no pack is larger than seq_len"
    fill, arrival = sum(used) / len(packs) / seq_len, arrival_fill(tokens.tolist(), seq_len)
    return Planned(fill, arrival, took * 1e6 / ((num_windows + 1) * plan.window))


def arrival_fill(tokens: list[int], seq_len: int) -> float:
    """Share of tokens in use when each pack is closed by the first sample that does not fit."""
    packs, used = 1, 0
    for n in tokens:
        if used + n > seq_len:
            packs, used = packs + 1, 0
        used += n
    return sum(tokens) / packs / seq_len


def _fill(name: str, planned: Planned, target: str) -> Result:
    peer = f"in arrival order, closed by the first sample that does not fit: {planned.arrival_fill:.3f}"
    return Result(name, planned.fill, "share", target, peer)


def pack_fill_4k(_: Settings) -> Result:
    """Fill of 4,096-token packs of instruction data."""
    return _fill("pack_fill_4k", plan_mix(photo_mix(np.random.default_rng(0)), 4096), ">= 0.999")


def pack_fill_8k(_: Settings) -> Result:
    """Fill of 8,192-token packs of instruction data."""
    return _fill("pack_fill_8k", plan_mix(photo_mix(np.random.default_rng(0)), 8192), ">= 0.999")


def pack_fill_32k(_: Settings) -> Result:
    """Fill of 32,768-token packs of interleaved documents."""
    return _fill("pack_fill_32k", plan_mix(interleaved_mix(np.random.default_rng(0)), 32_768, window=16_384), ">= 0.999")


def pack_fill_video_4k(_: Settings) -> Result:
    """Fill of 4,096-token packs with video."""
    return _fill("pack_fill_video_4k", plan_mix(video_mix(np.random.default_rng(0)), 4096), ">= 0.995")


def pack_us_per_sample(_: Settings) -> Result:
    """CPU time to plan one sample: order, packing, grouping by cost; the slowest of the four mixes."""
    mixes = {
        "4k": plan_mix(photo_mix(np.random.default_rng(0)), 4096),
        "8k": plan_mix(photo_mix(np.random.default_rng(0)), 8192),
        "32k": plan_mix(interleaved_mix(np.random.default_rng(0)), 32_768, window=16_384),
        "video 4k": plan_mix(video_mix(np.random.default_rng(0)), 4096),
    }
    each = ", ".join(f"{name} {planned.us_per_sample:.1f}" for name, planned in mixes.items())
    value = max(planned.us_per_sample for planned in mixes.values())
    return Result("pack_us_per_sample", value, "us", "<= 5", f"none; CPU us by mix: {each}")
