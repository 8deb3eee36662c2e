"""Judges every step by its loss and gradient, and says when a run has to go back to a checkpoint. Imports no torch.

not finite   the engine has made no update; the run goes on, and goes back after `max_nonfinite` of them in a row
spike        far above the losses before it; the update is made already, so the run goes back at once
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mmscale.config.schema import GuardConfig
from mmscale.train.records import rows_backward

STD_FLOOR = 0.01
"""Least standard deviation of losses, as a share of their mean: on a flat curve the noise of single batches is no spike."""

MIN_SEEN = 0.25
"""Share of `spike_window` that must have been seen before a loss can be a spike."""


class Verdict(Enum):
    """What a step was.

    sound     a checkpoint may be written after it
    skipped   no update was made: not finite, or passed over
    rollback  training went wrong; the run goes back
    """

    SOUND = "sound"
    SKIPPED = "skipped"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`kind`: `nonfinite` or `spike`, what was found, with `reason` in words; both empty for a step with nothing to say about.
    `bad_steps`: this one and those of the same row before it."""

    verdict: Verdict
    kind: str = ""
    reason: str = ""
    bad_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class History:
    """What was seen before. `losses`: of sound steps, the oldest first. `bad_steps`: not finite, after the last sound one."""

    losses: tuple[float, ...] = ()
    bad_steps: tuple[int, ...] = ()


class Guard:
    """Judges one step after the other. Every rank gives the same numbers and comes to the same judgement."""

    def __init__(self, config: GuardConfig, last_step: int, history: History) -> None:
        self._config, self._last_step = config, last_step
        self._losses = deque(history.losses, maxlen=config.spike_window)
        self._bad_steps = list(history.bad_steps)

    def judge(self, step: int, loss: float | None, grad_norm: float, has_update: bool) -> Judgement:
        """What a step was.

        Args:
            loss: mean over the targets of the global batch; None = its batch was passed over.
            has_update: False when the engine made none. With finite numbers that is a batch without targets, of which nothing
                can be said.
        """
        if loss is None:
            return Judgement(Verdict.SKIPPED)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._nonfinite(step, f"loss {loss}, gradient norm {grad_norm}")
        if not has_update:
            return Judgement(Verdict.SOUND)
        self._bad_steps.clear()
        spike = self._spike(loss)
        if spike is not None:
            return Judgement(Verdict.ROLLBACK, "spike", spike, (step,))
        self._losses.append(loss)
        return Judgement(Verdict.SOUND)

    def _nonfinite(self, step: int, found: str) -> Judgement:
        self._bad_steps.append(step)
        bad = tuple(self._bad_steps)
        if len(bad) >= self._config.max_nonfinite:
            reason = f"{len(bad)} steps without a finite loss and gradient in a row, the last with {found}"
            return Judgement(Verdict.ROLLBACK, "nonfinite", reason, bad)
        if step == self._last_step:  # a run must not end with a checkpoint of which nobody knows whether it works
            return Judgement(Verdict.ROLLBACK, "nonfinite", f"the last step has {found}", bad)
        return Judgement(Verdict.SKIPPED, "nonfinite", found, bad)

    def _spike(self, loss: float) -> str | None:
        """Why this loss is a spike; None when it is none."""
        sigma, count = self._config.spike_sigma, len(self._losses)
        if sigma is None or count < MIN_SEEN * self._config.spike_window:
            return None
        mean = math.fsum(self._losses) / count
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in self._losses) / count)
        limit = mean + sigma * max(std, STD_FLOOR * abs(mean))
        if loss <= limit:
            return None
        return f"loss {loss:.6g} is above {limit:.6g} (the last {count} losses: mean {mean:.6g}, standard deviation {std:.3g})"


def read_history(metrics: Path, first_step: int, config: GuardConfig) -> History:
    """What a guard had seen before `first_step`, from the run's `metrics.jsonl`: a resumed run judges as one without a stop."""
    wanted = 1 if config.spike_sigma is None else config.spike_window
    losses: list[float] = []
    bad_steps: list[int] = []
    seen = set[int]()
    for row in rows_backward(metrics):
        if row["step"] >= first_step or row["step"] in seen:  # done again since, or given up by a rollback
            continue
        seen.add(row["step"])
        if _is_nonfinite(row):
            bad_steps += () if losses else (row["step"],)
        elif not row["update_skipped"]:
            losses.append(row["loss"])
        if len(losses) == wanted:
            break
    return History(tuple(reversed(losses)), tuple(reversed(bad_steps)))


def _is_nonfinite(row: Mapping[str, Any]) -> bool:
    """Whether a line of `metrics.jsonl` is of a step without finite numbers; one that was passed over has no `loss_hex`."""
    return row["loss_hex"] is not None and (row["loss"] is None or row["grad_norm"] is None)
