"""Invented mixes of sample lengths, as the plan sees them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import lognormal
from mmscale.config.schema import CostConfig
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.plan import Plan, PlanRules

NUM_SAMPLES = 60_000
IMAGE_TOKENS = (144, 196, 576, 729)
FRAME_TOKENS = 196

COST = CostConfig(token=14e9, pair=262_144, vision_input=0.8e9 * 576)
"""FLOPs of a 7B language model with a 0.4B tower."""


@dataclass(frozen=True)
class Mix:
    """`text` and `media` tokens and `vision` inputs of each sample, int64 [samples]."""

    text: NDArray[np.int64]
    media: NDArray[np.int64]
    vision: NDArray[np.int64]


def photo_mix(rng: np.random.Generator, n: int = NUM_SAMPLES) -> Mix:
    """Instruction data: mostly one image, short skewed texts."""
    images = rng.choice(5, n, p=(0.15, 0.70, 0.08, 0.04, 0.03))
    return Mix(lognormal(rng, 180, 1.0, 16, 8192, n), images * rng.choice(IMAGE_TOKENS, n), images)


def interleaved_mix(rng: np.random.Generator, n: int = NUM_SAMPLES) -> Mix:
    """Web documents: 0 to 16 images, long skewed texts."""
    images = np.minimum(rng.geometric(0.35, n) - 1, 16)
    return Mix(lognormal(rng, 400, 1.2, 16, 16_384, n), images * rng.choice(IMAGE_TOKENS, n), images)


def video_mix(rng: np.random.Generator, n: int = NUM_SAMPLES) -> Mix:
    """One clip of 8 to 64 frames in 10 samples, else 1 to 6 image tiles."""
    is_clip = rng.random(n) < 0.10
    frames, tiles = rng.integers(8, 65, n), rng.integers(1, 7, n)
    media = np.where(is_clip, frames * FRAME_TOKENS, tiles * rng.choice(IMAGE_TOKENS, n))
    return Mix(lognormal(rng, 250, 1.1, 16, 16_384, n), media, np.where(is_clip, frames, tiles))


def rules_for(seq_len: int, plan_group: int = 64, seed: int = 0) -> PlanRules:
    """Rules with the defaults of the config."""
    return PlanRules(seq_len, plan_group, None, seed, 64, None, COST)


def source_of(mix: Mix, seq_len: int, name: str = "mix") -> PlanSource:
    """The samples of a mix that fit into a pack."""
    fits = mix.text + mix.media <= seq_len
    tokens = (mix.text + mix.media)[fits].astype(np.uint32)
    return PlanSource(name, tokens, mix.vision[fits].astype(np.uint16), np.zeros(len(tokens), np.uint16))


def plan_of(mix: Mix, rules: PlanRules) -> Plan:
    """The plan of one mix."""
    return Plan([source_of(mix, rules.seq_len)], rules)
