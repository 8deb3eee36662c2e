"""What surrounds a run: requests to stop, the job's time limit, who owns the run directory. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmscale.config.env import AgentLink, JobLimits
from mmscale.config.schema import Config
from mmscale.train.attempt import Attempt
from mmscale.train.deadline import Deadline
from mmscale.train.signals import StopFlag


@dataclass(frozen=True)
class Job:
    """One start of the trainer, as seen from outside."""

    stop: StopFlag
    deadline: Deadline
    attempt: Attempt
    agent: AgentLink | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        stop: StopFlag | None = None,
        limits: JobLimits | None = None,
        agent: AgentLink | None = None,
    ) -> Job:
        """The job that runs `config`; without `stop` nothing stops it, without `limits` there is no job script."""
        limits = JobLimits() if limits is None else limits
        attempt = Attempt(Path(config.run.dir), limits.attempt)
        return cls(StopFlag() if stop is None else stop, Deadline(limits), attempt, agent)

    @property
    def wants_stop(self) -> bool:
        """True once the run was asked to stop or its time is over."""
        return self.stop.is_set or self.deadline.is_due()
