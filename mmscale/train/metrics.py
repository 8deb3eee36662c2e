"""What a run tells: one line per step in `metrics.jsonl` and `ledger.jsonl`, what happens between steps in `events.jsonl`,
TensorBoard, a progress bar or step lines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmscale.config.schema import Config
from mmscale.logging import get_logger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step over all ranks.

    `loss`: mean over the target tokens of the global batch. `tokens`: positions by what they hold. `target_tokens`: loss
    terms by the medium in their document (`text` = none). `fill`: useful tokens / (packs * seq_len). `skipped`: samples
    drawn and not delivered so far in the run, for any reason. `mfu`: null unless `run.peak_tflops` is set. Times in seconds; the loader's share of the step
    is `data_wait_frac`. `comm_bytes`: what rank 0 sent in the step, by kind, counted where it is sent; `comm_wait_s`: how long
    rank 0 did nothing but wait for such a transfer. Both leave out what the engines send.
    """

    step: int
    loss: float
    loss_hex: str
    grad_norm: float
    lr: float
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    tokens_per_s: float
    mfu: float | None
    data_wait_frac: float
    fill: float
    skipped: int
    step_time_s: float
    epoch: float
    memory_gb: float
    update_skipped: bool
    comm_bytes: dict[str, int]
    comm_wait_s: float


class JsonLines:
    """A file of one JSON object per line, appended and flushed line by line; a line cut off by a kill is removed first."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = self._open_clean(path)

    @staticmethod
    def _open_clean(path: Path) -> IO[str]:
        if path.exists():
            with path.open("rb+") as file:
                text = file.read()
                file.truncate(text.rfind(b"\n") + 1)
        return path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one object; numbers that JSON does not have (inf, nan) become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Reporter:
    """Writes and shows a run's metrics; on other ranks than 0 every call does nothing."""

    def __init__(self, config: Config, is_main: bool, first_step: int) -> None:
        self._active = is_main
        if not is_main:
            return
        folder = Path(config.run.dir)
        self._metrics, self._ledger = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "ledger.jsonl")
        self._skips, self._events = JsonLines(folder / "skipped.jsonl"), JsonLines(folder / "events.jsonl")
        self._tensorboard = _tensorboard(folder, first_step) if config.run.tensorboard else None
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
        for sink in (self._metrics, self._ledger, self._skips, self._events, self._tensorboard):
            if sink is not None:
                sink.close()

    def step(self, metrics: StepMetrics, ids: Sequence[str], skips: Sequence[Mapping[str, Any]]) -> None:
        """Records one finished step: metrics, the global batch's sample ids, and the samples masked in it."""
        if not self._active:
            return
        self._ledger.write({"step": metrics.step, "ids": list(ids)})
        for skip in skips:
            self._skips.write({"step": metrics.step, **skip})
        self._metrics.write(asdict(metrics))
        if self._tensorboard is not None:
            for name in ("loss", "grad_norm", "lr", "tokens_per_s", "fill", "data_wait_frac"):
                self._tensorboard.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)
            for kind, sent in metrics.comm_bytes.items():
                self._tensorboard.add_scalar(f"comm_bytes/{kind}", sent, metrics.step)
            if metrics.comm_bytes:
                self._tensorboard.add_scalar("train/comm_wait_s", metrics.comm_wait_s, metrics.step)
        self._show(metrics)

    def validation(self, step: int, loss: float, targets: int) -> None:
        """Records a validation loss: mean over `targets` tokens."""
        if not self._active:
            return
        self.event("validation", step, val_loss=loss, val_targets=targets)
        if self._tensorboard is not None:
            self._tensorboard.add_scalar("validation/loss", loss, step)
        log.info("step %d: validation loss %.4f over %d target tokens", step, loss, targets)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Records something that happened between steps: `start`, `resume`, `save`, `stop`."""
        if self._active:
            self._events.write({"event": name, "step": step, **details})

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
    return (
        f"loss {m.loss:.4f} | tokens {tokens} | {m.tokens_per_s:,.0f} tok/s | wait {m.data_wait_frac:.0%} | fill {m.fill:.1%} | "
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


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    # imported here: it takes seconds and only rank 0 needs it
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)


def resident_gb() -> float:
    """Resident memory of this process in GB, or the peak memory of its GPU when one is in use."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process(os.getpid()).memory_info().rss / 1e9
