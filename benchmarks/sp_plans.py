"""How evenly planned packs of 131,072 tokens keep 8 sequence-parallel ranks busy, and how many keys they exchange."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.result import Result, Settings
from mmscale.parallel.sp.measures import balance, kv_traffic
from mmscale.parallel.sp.plan import Layout, make_plan, padded_lengths

TOKENS = 131_072
RANKS = 8
PACKS = 20
"""Packs of each mix."""

Draw = Callable[[np.random.Generator, int], int]
"""The length of a document, by its number in the pack."""


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


def _instructions(rng: np.random.Generator, _: int) -> int:
    """Short samples with 7 % long videos."""
    return _log_uniform(rng, 200, 2500) if rng.random() < 0.93 else _log_uniform(rng, 8000, 32_768)


MIXES: dict[str, Draw] = {
    "200-32k": lambda rng, _: _log_uniform(rng, 200, 32_768),
    "instructions": _instructions,
    "video 8-32k": lambda rng, _: _log_uniform(rng, 8000, 32_768),
    "short": lambda rng, _: _log_uniform(rng, 200, 4000),
    "64k + short": lambda rng, number: _log_uniform(rng, 200, 4000) if number else TOKENS // 2,
}
"""The five mixes of several documents, by the lengths in tokens."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the packs of one mix gave under one layout: one number per pack."""

    balance: list[float]
    traffic: list[float]
    seconds: list[float]


def make_lengths(draw: Draw, rng: np.random.Generator) -> tuple[int, ...]:
    """Document lengths of one full pack in random order; the last document is cut to fit."""
    lengths: list[int] = []
    left = TOKENS
    while left:
        lengths.append(min(draw(rng, len(lengths)), left))
        left -= lengths[-1]
    return tuple(int(n) for n in rng.permutation(lengths))


@lru_cache
def measured(layout: Layout) -> dict[str, Measured]:
    """The packs of each mix, planned in a layout; CPU seconds each."""
    found = {}
    for name, draw in MIXES.items():
        rng = np.random.default_rng(0)
        result = Measured([], [], [])
        for _ in range(PACKS):
            lengths = padded_lengths(make_lengths(draw, rng), RANKS)
            started = time.process_time()
            plan = make_plan(lengths, RANKS, layout)
            result.seconds.append(time.process_time() - started)
            result.balance.append(balance(plan))
            result.traffic.append(kv_traffic(plan))
        found[name] = result
    return found


def _by_mix(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _means(layout: Layout, what: Callable[[Measured], list[float]]) -> dict[str, float]:
    return {name: statistics.mean(what(result)) for name, result in measured(layout).items()}


def sp_balance_mean(_: Settings) -> Result:
    """Attention of the busiest rank over the mean: mean over packs, of the mix where it is worst."""
    values = _means("planned", lambda m: m.balance)
    peers: list[tuple[str, Layout]] = [("contiguous", "contiguous"), ("zigzag over the pack", "zigzag")]
    others = "; ".join(f"{label}: {_by_mix(_means(layout, lambda m: m.balance))}" for label, layout in peers)
    return Result("sp_balance_mean", max(values.values()), "x", "<= 1.07", f"{others}; planned: {_by_mix(values)}")


def sp_balance_worst(_: Settings) -> Result:
    """Attention of the busiest rank over the mean, of the worst pack of all mixes."""
    worst = max(value for result in measured("planned").values() for value in result.balance)
    contiguous = max(value for result in measured("contiguous").values() for value in result.balance)
    zigzag = max(value for result in measured("zigzag").values() for value in result.balance)
    took = [s * 1e3 for result in measured("planned").values() for s in result.seconds]
    peer = f"contiguous {contiguous:.2f}, zigzag over the pack {zigzag:.2f}"
    planning = f"planning takes {statistics.mean(took):.1f} ms of CPU per pack, at most {max(took):.1f}"
    return Result("sp_balance_worst", worst, "x", "<= 1.10", f"{peer}; {planning}")


def sp_kv_ratio_mean(_: Settings) -> Result:
    """Most key/value rows that a rank sends or gets, over a gather of all: mean over packs, of the mix where it is worst."""
    values = _means("planned", lambda m: m.traffic)
    worst = max(value for result in measured("planned").values() for value in result.traffic)
    peer = (
        f"a gather of everything: 1; zigzag of every document: {_by_mix(_means('per_document', lambda m: m.traffic))}"
    )
    return Result(
        "sp_kv_ratio_mean",
        max(values.values()),
        "x",
        "<= 0.5",
        f"{peer}; planned: {_by_mix(values)}; worst pack {worst:.3f}",
    )
