"""The cost of packs as a run measured it: its steps planned again, and their times explained by what they held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.config.cost import FEATURES, FittedCost, fit_cost, predict_cost
from mmscale.data_tools.inspection.plan_report import Floats
from mmscale.data_tools.inspection.run_stream import open_run_stream
from mmscale.errors import RefusedInputError
from mmscale.streaming.loader import Stream
from mmscale.streaming.plan import PlannedStep, PlanState, pack_features

_ROUNDS = 3
_LEAST_STEPS, _MOST_PACKS = 200, 100_000
"""Steps looked at: the first ones, as many as these packs make, and no fewer than so many."""


@dataclass(frozen=True)
class RunFit:
    """The fitted cost in seconds, from `steps` measured steps on `ranks` data-parallel ranks."""

    fitted: FittedCost
    steps: int
    ranks: int

    @property
    def yaml(self) -> str:
        """What goes into the config of the next run."""
        values = {name: getattr(self.fitted.cost, name) for name in FEATURES}
        return "data:\n  cost:\n" + "".join(f"    {name}: {value:.4g}\n" for name, value in values.items())


def fit_run(run: Path, ranks: int | None = None) -> RunFit:
    """The cost of a pack from the step times of a finished or running run.

    A step takes as long as its slowest rank. Which one that is depends on the cost, so it is chosen by the configured cost
    first and by the fit afterwards. The time that a step waited for data is taken off.

    Args:
        run: the run directory.
        ranks: data-parallel size of the run; None = as its `events.jsonl` says.

    Raises:
        RefusedInputError: the directory is not a run's, or its steps held other samples than its config plans now.
        DataError: too few steps.
    """
    opened = open_run_stream(_file(run, "config.yaml"))
    stream, batch = opened.stream, opened.config.train.global_batch
    ranks = ranks or _ranks(run)
    if batch % ranks:
        raise RefusedInputError(
            f"{run}: train.global_batch={batch} is no multiple of {ranks} ranks; give another --ranks"
        )
    last = max(_LEAST_STEPS, _MOST_PACKS // batch)
    metrics = (row for row in _rows(run, "metrics.jsonl") if row["step"] <= last)
    seconds = {row["step"]: row["step_time_s"] * (1 - row["data_wait_frac"]) for row in metrics}
    if not seconds:
        raise RefusedInputError(f"{run}: expected measured steps in metrics.jsonl, found none; train some steps first")
    steps = _same_steps(stream, batch, run, max(seconds))
    table = np.stack([_rank_features(stream, steps[step - 1], ranks) for step in sorted(seconds)])
    times = np.array([seconds[step] for step in sorted(seconds)])
    cost = stream.plan.rules.cost
    for _ in range(_ROUNDS):
        slowest = predict_cost(cost, table).argmax(axis=1)
        fitted = fit_cost(table[np.arange(len(table)), slowest], times)
        cost = fitted.cost
    return RunFit(fitted, len(times), ranks)


def _rank_features(stream: Stream, step: PlannedStep, ranks: int) -> Floats:
    """The summed features of each rank's packs in a step, [ranks, 5]."""
    own = (step.for_rank(rank, ranks) for rank in range(ranks))
    sources = stream.plan.sources
    return np.array([np.sum([pack_features(pack, sources) for pack in packs], axis=0) for packs in own], np.float64)


def _same_steps(stream: Stream, batch: int, run: Path, num_steps: int) -> list[PlannedStep]:
    """The first steps of the plan, held against the samples that the run's ledger names."""
    steps = list(islice(stream.plan.steps(PlanState(), batch), num_steps))
    ledger = {row["step"]: row["ids"] for row in _rows(run, "ledger.jsonl")}
    for number, step in enumerate(steps, start=1):
        ids = [stream.sources[draw.source_idx].shards.id(draw.row) for pack in step.packs for draw in pack]
        if ids != ledger.get(number, ids):
            raise RefusedInputError(
                f"{run}: expected step {number} to hold the samples that its config plans, found others in ledger.jsonl: the "
                "data, the mixture or the planner has changed since; fit a run that was not changed on its way"
            )
    return steps


def _ranks(run: Path) -> int:
    sizes = {row["dp_size"] for row in _rows(run, "events.jsonl") if "dp_size" in row}
    if len(sizes) != 1:
        found = f"found {sorted(sizes)}" if sizes else "found none"
        raise RefusedInputError(f"{run}: expected one data-parallel size in events.jsonl, {found}; say it with --ranks")
    return sizes.pop()


def _rows(run: Path, name: str) -> Iterator[dict[str, Any]]:
    for line in _file(run, name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _file(run: Path, name: str) -> Path:
    path = run / name
    if not path.is_file():
        raise RefusedInputError(
            f"{path}: expected a run directory with {name}, found no such file; give the run.dir of a run"
        )
    return path
