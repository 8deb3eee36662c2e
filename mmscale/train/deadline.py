"""The end of the job: a run that knows it stops in time by itself, whether or not a signal arrives."""

from __future__ import annotations

import time
from collections.abc import Callable

from mmscale.config.env import JobLimits

SLACK_S = 60.0
"""What a stop needs beside a step and two saves: the scheduler's signal may come up to a minute early, processes end slowly."""


class Deadline:
    """Learns how long steps and saves take, and says when the run must stop to be saved before the job's limit."""

    def __init__(self, limits: JobLimits, now: Callable[[], float] = time.time) -> None:
        self._limits, self._now = limits, now
        self._step_s = self._save_s = 0.0

    def saw_step(self, seconds: float) -> None:
        """Notes how long a step took."""
        self._step_s = max(self._step_s, seconds)

    def saw_save(self, seconds: float) -> None:
        """Notes how long a save took from its beginning to its commit."""
        self._save_s = max(self._save_s, seconds)

    @property
    def needed_s(self) -> float:
        """Seconds from a request to stop until the run is saved: one step, and two saves as one may be under way."""
        return self._step_s + 2 * self._save_s

    def is_due(self) -> bool:
        """True when there is just time enough left to stop: half of `SLACK_S` is left to end the processes."""
        ends_at = self._limits.ends_at
        return ends_at is not None and self._now() > ends_at - self.needed_s - SLACK_S / 2

    def margin_text(self) -> str | None:
        """The lead and the time to kill against what a stop needs; None without a job."""
        lines = []
        if self._limits.lead_s is not None:
            spare = self._limits.lead_s - self.needed_s - SLACK_S
            lines.append(f"signal {self._limits.lead_s:.0f} s before the limit, margin {spare:.0f} s")
        if self._limits.kill_wait_s is not None:
            spare = self._limits.kill_wait_s - self.needed_s
            lines.append(f"{self._limits.kill_wait_s:.0f} s from SIGTERM to the kill, margin {spare:.0f} s")
        if not lines:
            return None
        return f"a stop needs {self.needed_s:.1f} s (step {self._step_s:.1f} s + 2 saves of {self._save_s:.1f} s): {'; '.join(lines)}"

    @property
    def is_short(self) -> bool:
        """True when a stop may not be saved in the time that the job gives."""
        limits = self._limits
        lead_short = limits.lead_s is not None and limits.lead_s < self.needed_s + SLACK_S
        return lead_short or (limits.kill_wait_s is not None and limits.kill_wait_s < self.needed_s)
