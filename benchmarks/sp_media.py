"""How evenly the ranks that share a pack encode its media: by cost, against dealing whole items by their number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.result import Result, Settings
from mmscale.parallel.sp.media import plan_media

RANKS, TOKENS, PACKS = 8, 131_072, 20
TILE, FRAME, WINDOW = (256, 1.0), (196, 1.0), (750, 1.9)
"""(tokens, cost) of one tower input: a tile, a frame, 30 s of sound (Whisper's 1500 positions against 1024 patches)."""

Item = NDArray[np.float64]
"""Costs of the tower inputs of one image, clip or sound."""

Draw = Callable[[np.random.Generator], tuple[float, list[Item]]]
"""Tokens of a document, and its items."""


def image_document(rng: np.random.Generator) -> tuple[float, list[Item]]:
    """One to four photos of 1 to 13 tiles, and a text."""
    return _document(rng, [(TILE, int(rng.integers(1, 14))) for _ in range(int(rng.integers(1, 5)))])


def video_document(rng: np.random.Generator) -> tuple[float, list[Item]]:
    """One clip of 8 to 128 frames, and a text."""
    return _document(rng, [(FRAME, int(rng.integers(8, 129)))])


def mixed_document(rng: np.random.Generator) -> tuple[float, list[Item]]:
    """Text alone, photos, a clip or up to 3 minutes of sound."""
    kind = int(rng.integers(4))
    if kind == 0:
        return _document(rng, [])
    if kind == 1:
        return _document(rng, [(WINDOW, int(rng.integers(1, 7)))])
    return image_document(rng) if kind == 2 else video_document(rng)


def _document(rng: np.random.Generator, media: list[tuple[tuple[int, float], int]]) -> tuple[float, list[Item]]:
    text = float(np.exp(rng.uniform(np.log(30), np.log(3000))))
    return text + sum(kind[0] * count for kind, count in media), [np.full(n, kind[1]) for kind, n in media]


def pack_of(draw: Draw, rng: np.random.Generator) -> list[Item]:
    """The media of one pack of `TOKENS` tokens."""
    items: list[Item] = []
    used = 0.0
    while True:
        tokens, media = draw(rng)
        used += tokens
        if used > TOKENS:
            return items
        items += media


def by_cost(items: list[Item]) -> float:
    """Most over mean cost of a rank when `plan_media` deals the tower inputs."""
    costs = np.concatenate(items)
    return _uneven(costs, plan_media(costs.tolist(), RANKS))


def by_count(items: list[Item]) -> float:
    """The same when every rank gets as many items, in order, as VILA and Megatron deal them."""
    rank = np.arange(len(items)) * RANKS // len(items)
    return _uneven(np.array([item.sum() for item in items]), rank)


def _uneven(costs: NDArray[np.float64], rank: NDArray[np.int64]) -> float:
    load = np.bincount(rank, weights=costs, minlength=RANKS)
    return float(load.max() / load.mean())


def vision_balance(_settings: Settings) -> Result:
    """Most over mean encoder cost of 8 ranks in the worst of 60 packs of 131,072 tokens: 20 each of three mixes."""
    found: dict[str, tuple[float, float, float]] = {}
    for name, draw in (("image", image_document), ("mixed", mixed_document), ("video", video_document)):
        packs = [pack_of(draw, np.random.default_rng(seed)) for seed in range(PACKS)]
        ours, theirs = ([measure(items) for items in packs] for measure in (by_cost, by_count))
        found[name] = (float(np.mean(ours)), max(ours), float(np.mean(theirs)))
    peer = "; ".join(
        f"{name}: mean {mean:.3f}, whole items by count {count:.3f}" for name, (mean, _, count) in found.items()
    )
    return Result("vision_balance", max(worst for _, worst, _ in found.values()), "max/mean", "<= 1.02", peer)
