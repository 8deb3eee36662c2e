"""What a run tells: one line per step in `metrics.jsonl` and `ledger.jsonl`, what happens between steps in `events.jsonl`,
TensorBoard, a progress bar or step lines."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmscale.config.schema import Config
from mmscale.logging import get_logger
from mmscale.redact import redact, redact_values
from mmscale.train.records import lines_backward

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step over all ranks.

    `loss`: mean over the target tokens of the global batch. `tokens`: positions by what they hold. `target_tokens`: loss
    terms by the medium in their document (`text` = none). `fill`: useful tokens / (packs * seq_len). `skipped`: samples
    drawn and not delivered so far in the run, for any reason. `mfu`, `hfu`: operations that the training needs, and that the
    devices do, over the peak of all devices; null where it is not known. Times in seconds; the loader's share of the step is
    `data_wait_frac`. `comm_bytes`: what rank 0 sent in the step, by kind, counted where it is sent; `comm_wait_s`: how long rank
    0 did nothing but wait for such a transfer. Both leave out what the engines send. `ended_at`: unix seconds. `attempt`: token
    of the start of the run that made the step. A batch that was passed over has no `loss` and no `loss_hex`.
    """

    step: int
    loss: float | None
    loss_hex: str | None
    grad_norm: float
    lr: float
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    tokens_per_s: float
    mfu: float | None
    hfu: float | None
    data_wait_frac: float
    fill: float
    skipped: int
    step_time_s: float
    epoch: float
    memory_gb: float
    update_skipped: bool
    comm_bytes: dict[str, int]
    comm_wait_s: float
    ended_at: float
    attempt: str


class JsonLines:
    """A file of one JSON object per line, appended line by line; a line cut off by a kill is removed first.

    What a full disk refuses is kept in memory and written before the next line: a run goes on, and its files are complete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open_clean(path)
        self._unwritten = b""
        self._is_refused = False

    @staticmethod
    def _open_clean(path: Path) -> io.FileIO:
        if path.exists():
            with path.open("rb+") as file:
                size = file.seek(0, os.SEEK_END)
                unfinished = len(next(lines_backward(file, size)))
                if unfinished:
                    file.truncate(size - unfinished)
        return path.open("ab", buffering=0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object without secrets; numbers that JSON does not have (inf, nan) become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(finite, ensure_ascii=False, allow_nan=False)
        if redact(line) != line:  # rare; text by text, so that it stays JSON
            line = json.dumps(redact_values(finite), ensure_ascii=False, allow_nan=False)
        self._unwritten += line.encode() + b"\n"
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        self._flush()
        if self._unwritten:
            log.error(
                "%s: %d bytes are lost, the disk has refused them until the end", self._path, len(self._unwritten)
            )
        self._file.close()

    def _flush(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._is_refused = False
        except OSError as error:
            if not self._is_refused:
                log.error(
                    "%s: cannot be written (%s); its lines are kept in memory until it can: make room",
                    self._path,
                    error,
                )
            self._is_refused = True


class Curves:
    """TensorBoard's events; a disk that refuses them ends them until the next start, as they can be made from `metrics.jsonl`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # imported here: it takes seconds and only rank 0 needs it
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, name: str, value: float | None, step: int) -> None:
        """Adds one point to the curve `name`; None is not a number."""
        if self._writer is not None:
            try:
                self._writer.add_scalar(name, math.nan if value is None else value, step)
            except OSError as error:  # of an earlier point: its thread writes some seconds later
                log.error("no more TensorBoard events until the next start: %s", error)
                self._writer = None

    def close(self) -> None:
        """Closes the file."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            log.error("the last TensorBoard events are lost: %s", error)


class Reporter:
    """Writes and shows a run's metrics; on other ranks than 0 every call does nothing."""

    def __init__(self, config: Config, is_main: bool, first_step: int, attempt: str = "") -> None:
        self._active = is_main
        self.attempt = attempt
        if not is_main:
            return
        folder = Path(config.run.dir)
        self._metrics, self._ledger = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "ledger.jsonl")
        self._skips, self._events = JsonLines(folder / "skipped.jsonl"), JsonLines(folder / "events.jsonl")
        self._curves = Curves(folder, first_step) if config.run.tensorboard else None
        self._total, self._log_every = config.train.steps, config.run.log_every
        self._started, self._first = time.monotonic(), first_step
        self._progress = _progress(self._total, first_step)

    def __enter__(self) -> Reporter:
        if self._active and self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        if self._progress is not None:
            self._progress.stop()
        for sink in (self._metrics, self._ledger, self._skips, self._events, self._curves):
            if sink is not None:
                sink.close()

    def step(self, metrics: StepMetrics, ids: Sequence[str], skips: Sequence[Mapping[str, Any]]) -> None:
        """Records one finished step: metrics, the global batch's sample ids, and the samples masked in it."""
        if not self._active:
            return
        self._ledger.write({"step": metrics.step, "ids": list(ids)})
        for skip in skips:
            self._skips.write({"step": metrics.step, **skip})
        self._metrics.write({f.name: getattr(metrics, f.name) for f in fields(metrics)})  # `asdict` copies every value
        if self._curves is not None:
            names = ("loss", "grad_norm", "lr", "tokens_per_s", "fill", "data_wait_frac")
            for name in names if metrics.mfu is None else (*names, "mfu", "hfu"):
                self._curves.add(f"train/{name}", getattr(metrics, name), metrics.step)
            for kind, sent in metrics.comm_bytes.items():
                self._curves.add(f"comm_bytes/{kind}", sent, metrics.step)
            if metrics.comm_bytes:
                self._curves.add("train/comm_wait_s", metrics.comm_wait_s, metrics.step)
        self._show(metrics)

    def validation(self, step: int, loss: float, targets: int, seconds: float) -> None:
        """Records a validation loss: mean over `targets` tokens, and how long it took."""
        if not self._active:
            return
        self.event("validation", step, val_loss=loss, val_targets=targets, seconds=round(seconds, 3))
        if self._curves is not None:
            self._curves.add("validation/loss", loss, step)
        log.info("step %d: validation loss %.4f over %d target tokens", step, loss, targets)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Records something that happened between steps, such as `start`, `resume`, `save`, `stop`, `rollback`."""
        if self._active:
            head = {"event": name, "step": step, "at": round(time.time(), 3), "attempt": self.attempt}
            self._events.write({**head, **details})

    def _show(self, m: StepMetrics) -> None:
        text = step_line(m)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=m.step, text=text)
        elif m.step % self._log_every == 0 or m.step in (self._first, self._total):
            left = (time.monotonic() - self._started) / (m.step - self._first + 1) * (self._total - m.step)
            log.info("step %d/%d %s left %.0f s", m.step, self._total, text, left)


def step_line(m: StepMetrics) -> str:
    """The numbers of a step that a person watches, on one line."""
    tokens = " ".join(f"{name} {count}" for name, count in m.tokens.items() if count)
    loss = "passed over" if m.loss is None else f"loss {m.loss:.4f}"
    mfu = "" if m.mfu is None else f"mfu {m.mfu:.1%} | "
    return (
        f"{loss} | tokens {tokens} | {m.tokens_per_s:,.0f} tok/s | {mfu}wait {m.data_wait_frac:.0%} | fill {m.fill:.1%} | "
        f"norm {m.grad_norm:.2f} | lr {m.lr:.1e} | mem {m.memory_gb:.1f} GB | skipped {m.skipped}"
    )


def _progress(total: int, first_step: int) -> Progress | None:
    """A progress bar when a person watches, else None (step lines are logged)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip
    progress.add_task("step", total=total, completed=first_step - 1, text="")
    return progress


def process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    return round(time.time() - psutil.Process().create_time(), 3)


def resident_gb() -> float:
    """Resident memory of this process in GB, or the peak memory of its GPU when one is in use."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return _process(os.getpid()).memory_info().rss / 1e9


@functools.cache  # psutil looks the process up in /proc when it is made: 0.2 ms in each step
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)
