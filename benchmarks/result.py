"""What a benchmark gives back, and what it is given."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, slots=True)
class Settings:
    """`device`: `cpu` or `cuda`. `folder`: an empty folder of this benchmark alone, removed afterwards."""

    device: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Result:
    """One measured number. `target` is an operator and a number, such as `<= 0.5`; `peer` says what it was held against."""

    name: str
    value: float
    unit: str
    target: str
    peer: str

    @property
    def is_ok(self) -> bool:
        """Whether the value meets the target."""
        compare, _, bound = self.target.partition(" ")
        return _COMPARE[compare](self.value, float(bound))

    def line(self) -> str:
        """The line that `make bench` prints."""
        return f"bench {self.name} {self.value:.4g} {self.unit} target {self.target} {'ok' if self.is_ok else 'short'}"

    def entry(self) -> dict[str, float | str | bool]:
        """The entry in the results file."""
        value = float(f"{self.value:.5g}")
        return {"value": value, "unit": self.unit, "target": self.target, "ok": self.is_ok, "peer": self.peer}


Benchmark = Callable[[Settings], Result]
Clock = Callable[[], float]


def interleaved(
    actions: list[Callable[[], object]], rounds: int, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Seconds of each action in each round [actions][rounds]; the actions take turns, after one untimed round."""
    for action in actions:
        action()
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, own in zip(actions, times, strict=True):
            started = clock()
            action()
            own.append(clock() - started)
    return times


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median over the rounds of one time divided by the other of the same round."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))
