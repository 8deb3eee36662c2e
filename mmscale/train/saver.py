"""The checkpoints of a running trainer: in the background, and in spite of a disk that refuses for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config.schema import TrainConfig
from mmscale.errors import SaveError
from mmscale.logging import get_logger
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.mesh import Mesh
from mmscale.train.attempt import Attempt
from mmscale.train.checkpoint import CheckpointWriter, Saved
from mmscale.train.deadline import Deadline
from mmscale.train.metrics import Reporter

log = get_logger(__name__)

FINISH_TRIES = 3
"""How often `finish` tries again to write what the disk has refused."""
FINISH_PAUSE_S = 3.0
"""Seconds before each of these; a job that is being stopped has some 30."""


@dataclass
class _Pending:
    """A checkpoint that is not committed yet. `started`: `time.perf_counter` seconds; `blocked_s`: how long training was held."""

    step: int
    trainer_state: Mapping[str, Any]
    started: float
    blocked_s: float = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Counts the time until its end as time in which training was held."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_s += time.perf_counter() - began


class Saver:
    """Writes checkpoints between steps. Every method is called by every rank at the same step boundary, but `is_written`."""

    def __init__(
        self, root: Path, engine: Engine, mesh: Mesh, train: TrainConfig, attempt: Attempt, reporter: Reporter,
        deadline: Deadline, saved: int,
    ) -> None:  # fmt: skip
        self._train, self._reporter, self._deadline = train, reporter, deadline
        self._writer = CheckpointWriter(root, engine, mesh, attempt)
        self._pending: _Pending | None = None
        self._is_under_way = False
        self._retry_at: int | None = None
        self._knows_margin = False
        self.saved = saved
        """Step of the newest committed checkpoint; 0 = none."""

    def is_due(self, step: int) -> bool:
        """True when a checkpoint is to be written after `step`: at `save_every`, at the last step, and to try a failed one again."""
        is_retry = self._retry_at is not None and step >= self._retry_at
        return step % self._train.save_every == 0 or step == self._train.steps or is_retry

    def start(self, step: int, trainer_state: Mapping[str, Any]) -> None:
        """Begins a checkpoint of the state after `step`; an earlier one that is still being written is finished first.

        Raises CheckpointError when the chunks of all ranks do not make up every tensor; a disk that refuses is an event, and the
        checkpoint is tried again some steps later.
        """
        self.settle()
        self._pending = _Pending(step, trainer_state, time.perf_counter())
        with self._pending.held():
            self._writer.snapshot()
            self._begin(self._pending)
        if not self._train.async_save:
            self.settle()

    @property
    def is_written(self) -> bool:
        """True when this rank has a checkpoint under way and has written its part of it."""
        return self._writer.is_written

    def settle(self) -> None:
        """Commits the checkpoint under way, if any, once every rank has written its part of it."""
        if self._pending is None or not self._is_under_way:
            return
        pending, self._is_under_way = self._pending, False
        try:
            with pending.held():
                saved = self._writer.commit()
        except SaveError as error:
            self._refused(pending, error)
        else:
            self._committed(pending, saved)

    def finish(self) -> None:
        """Leaves everything that was started committed: waits, and tries again what the disk has refused.

        Raises SaveError when it refuses until the end.
        """
        self.settle()
        tries = 0
        while self._pending is not None:
            if tries == FINISH_TRIES:
                raise SaveError(
                    f"expected to save step {self._pending.step}, found that the disk refused it {tries + 1} times; the newest "
                    f"checkpoint is {self._newest}: make room and start again, the run goes on from there"
                )
            tries += 1
            with self._pending.held():
                time.sleep(FINISH_PAUSE_S)
                self._begin(self._pending)
            self.settle()

    def abandon(self) -> None:
        """Gives up the checkpoint under way and stops the background thread. Talks to no other rank."""
        self._writer.close()

    @property
    def _newest(self) -> str:
        return f"of step {self.saved}" if self.saved else "none"

    def _begin(self, pending: _Pending) -> None:
        try:
            self._writer.begin(pending.step, pending.trainer_state)
        except SaveError as error:
            self._refused(pending, error)
        else:
            self._is_under_way = True

    def _refused(self, pending: _Pending, error: SaveError) -> None:
        self._retry_at = pending.step + max(1, self._train.save_every // 4)
        self._reporter.event("save_failed", pending.step, reason=str(error))
        log.error(
            "step %d: NOT SAVED: %s. The newest checkpoint is %s; training goes on, and the next try is after step %d or "
            "when the run stops",
            pending.step, error, self._newest, self._retry_at,
        )  # fmt: skip

    def _committed(self, pending: _Pending, saved: Saved) -> None:
        took = time.perf_counter() - pending.started
        self.saved, self._pending, self._retry_at = pending.step, None, None
        self._deadline.saw_save(took)
        self._reporter.event(
            "save",
            pending.step,
            blocked_s=round(pending.blocked_s, 3),
            write_s=round(saved.write_s, 3),
            bytes=saved.num_bytes,
        )
        log.info(
            "step %d: saved %s, %.1f MB in %.2f s; training was held for %.3f s",
            pending.step, saved.path.name, saved.num_bytes / 1e6, took, pending.blocked_s,
        )  # fmt: skip
        self._writer.prune(self._train.keep_last, self._train.keep_every)
        if not self._knows_margin:
            self._show_margin()

    def _show_margin(self) -> None:
        self._knows_margin = True
        margin = self._deadline.margin_text()
        if margin is not None:
            (log.warning if self._deadline.is_short else log.info)("%s", margin)
