"""Which ranks are slow: the others wait for them in every collective, so the time of a step is the same on all and tells nothing.

Each rank therefore times work of its own that waits for no one: a small matrix product that is the same everywhere, and how long
its own loader let it wait. A rank far from the median in two looks in a row is named; once is chance.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmscale.config.schema import WatchConfig
from mmscale.logging import get_logger
from mmscale.parallel.comm import gather_objects
from mmscale.parallel.mesh import Mesh
from mmscale.train.metrics import Reporter

log = get_logger(__name__)

PROBES = 3
PROBE_WIDTH = {"cpu": 256, "cuda": 2048}
"""Rows and columns of the matrices of a probe, which takes about 1 ms: 34 MFLOP on one CPU core, 17 GFLOP on a GPU."""

MIN_WAIT_FRAC = 0.05
"""A loader's wait that is a smaller share of a step holds up no one, however many times the median it is."""


MIN_MEDIAN_S = 1e-4
"""What is faster is not worth measuring against."""


@dataclass(frozen=True, slots=True)
class Look:
    """What one rank found about itself since the last look; times in seconds, means over the steps."""

    rank: int
    host: str
    probe_s: float
    wait_s: float
    step_s: float


@dataclass(frozen=True, slots=True)
class Slow:
    """A rank and in what it is slow: `compute` or `data`; `ratio` to the median rank."""

    rank: int
    host: str
    kind: str
    ratio: float


class StragglerReport:
    """Looks every `straggler_every` steps which ranks are slow, and names them in the log and in `events.jsonl`.

    Distributed: every rank calls `after_step` for every step; one small gather per look.
    """

    def __init__(self, mesh: Mesh, watch: WatchConfig, reporter: Reporter) -> None:
        self._mesh, self._watch, self._reporter = mesh, watch, reporter
        self._waits: list[float] = []
        self._steps: list[float] = []
        self._suspects: set[tuple[int, str]] = set()

    def after_step(self, step: int, wait_s: float, step_s: float) -> None:
        """Notes how long a step waited for its packs and took as a whole; looks when it is time."""
        every = self._watch.straggler_every
        if not every or self._mesh.world_size == 1:
            return
        self._waits.append(wait_s)
        self._steps.append(step_s)
        if step % every:
            return
        own = Look(
            self._mesh.rank, socket.gethostname(), probe_s(self._mesh.device), statistics.fmean(self._waits), statistics.fmean(self._steps)
        )  # fmt: skip
        self._waits, self._steps = [], []
        looks = gather_objects(self._mesh, own)
        if looks is not None:
            self._judge(step, looks)

    def _judge(self, step: int, looks: Sequence[Look]) -> None:
        """Names the ranks that are slow now and were so at the last look."""
        slow = {(one.rank, one.kind): one for one in slow_ranks(looks, self._watch.straggler_ratio)}
        for one in (one for key, one in slow.items() if key in self._suspects):
            remedy = (
                "its loader (disk, network, CPUs)" if one.kind == "data" else "its GPU or CPU (heat, clock, other work)"
            )
            log.warning(
                "step %d: rank %d on %s is %.1f times slower than the median rank in %s, and all others wait for it; look at %s",
                step, one.rank, one.host, one.ratio, one.kind, remedy,
            )  # fmt: skip
            self._reporter.event(
                "straggler", step, rank=one.rank, host=one.host, kind=one.kind, ratio=round(one.ratio, 2)
            )
        self._suspects = set(slow)


def slow_ranks(looks: Sequence[Look], ratio: float) -> list[Slow]:
    """The ranks that are more than `ratio` times slower than the median rank.

    Example:
        >>> looks = [Look(rank, "n", 0.002 if rank == 1 else 0.001, 0.0, 1.0) for rank in range(4)]
        >>> slow_ranks(looks, 1.3)
        [Slow(rank=1, host='n', kind='compute', ratio=2.0)]
    """
    found = []
    times: Mapping[str, list[float]] = {
        "compute": [look.probe_s for look in looks],
        "data": [look.wait_s for look in looks],
    }
    for kind, seconds in times.items():
        # the lower one of two: else a slow rank of two would be measured against half of itself
        median = max(statistics.median_low(seconds), MIN_MEDIAN_S)
        for look, own in zip(looks, seconds, strict=True):
            matters = kind == "compute" or own - median > MIN_WAIT_FRAC * look.step_s
            if own > ratio * median and matters:
                found.append(Slow(look.rank, look.host, kind, own / median))
    return found


def probe_s(device: torch.device) -> float:
    """Seconds that a small matrix product takes on this rank alone, the median of a few."""
    width = PROBE_WIDTH[device.type]
    matrix = torch.ones(width, width, device=device)
    times = []
    for _ in range(PROBES + 1):
        _wait_for(device)
        started = time.perf_counter()
        matrix @ matrix
        _wait_for(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one warms up


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
