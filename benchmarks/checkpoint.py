"""What checkpoints and the records of a run cost a training step."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.result import Result, Settings
from benchmarks.step import run_config, write_data
from mmscale.config.schema import Config, TrainConfig
from mmscale.parallel.mesh import init_mesh
from mmscale.train.attempt import Attempt
from mmscale.train.heartbeat import Heartbeat
from mmscale.train.loop import train
from mmscale.train.metrics import Reporter

LLM = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
"""29 million parameters, so that a checkpoint has some hundred megabytes."""
STEPS, SAVE_EVERY = 9, 3
INTERVAL = TrainConfig.model_fields["save_every"].default
WARM_UP = 3


def ckpt_async_blocked_frac(settings: Settings) -> Result:
    """Share of the training time, at the default interval, for which a background save holds it up."""
    return _blocked("ckpt_async_blocked_frac", settings, async_save=True, target="<= 0.01")


def ckpt_sync_blocked_frac(settings: Settings) -> Result:
    """The same for a save in the foreground."""
    return _blocked("ckpt_sync_blocked_frac", settings, async_save=False, target="<= 0.05")


def ledger_overhead_frac(settings: Settings) -> Result:
    """Share of a step that its records take: metrics, ledger, TensorBoard, heartbeat, the look at OWNER."""
    write_data(settings)
    config = run_config(settings, workers=1, steps=WARM_UP + 20)
    seconds: list[float] = []
    with timed(seconds, (Reporter, "step"), (Heartbeat, "phase"), (Attempt, "is_fenced")):
        train(config, init_mesh(config.parallel, config.run.device))
    step_s = [row["step_time_s"] for row in _rows(config, "metrics.jsonl")]
    per_step = sum(seconds) / len(step_s)
    step = statistics.median(step_s[WARM_UP:])
    text = f"none; {per_step * 1e3:.2f} of {step * 1e3:.0f} ms, {len(step_s)} steps"
    return Result("ledger_overhead_frac", per_step / step, "share", "<= 0.01", text)


def _blocked(name: str, settings: Settings, *, async_save: bool, target: str) -> Result:
    write_data(settings)
    config = _large(run_config(settings, workers=1, steps=STEPS), async_save)
    train(config, init_mesh(config.parallel, config.run.device))
    saves = [row for row in _rows(config, "events.jsonl") if row["event"] == "save"]
    assert len(saves) == STEPS // SAVE_EVERY, "every save was committed"
    rows = _rows(config, "metrics.jsonl")
    step_s = statistics.median(row["step_time_s"] for row in rows)
    blocked_s = [save["blocked_s"] for save in saves]
    # the last one is waited for, as the run ends with it
    counted = blocked_s[:-1] if async_save else blocked_s
    share = statistics.mean(counted) / (INTERVAL * step_s)
    text = (
        f"none; {saves[0]['bytes'] / 1e6:.0f} MB; held {_ms(counted)}, written in {_ms([save['write_s'] for save in saves])}; "
        f"{INTERVAL} steps of {step_s:.2f} s"
    )
    return Result(name, share, "share", target, text)


def _ms(seconds: list[float]) -> str:
    return ", ".join(f"{1e3 * s:.0f}" for s in seconds) + " ms"


def _large(config: Config, async_save: bool) -> Config:
    """The benchmark's run with a larger language model, saved often."""
    content = config.model_dump()
    content["model"]["llm"]["config"] |= LLM
    content["train"] |= {"save_every": SAVE_EVERY, "async_save": async_save}
    return Config(**content)


def _rows(config: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


@contextmanager
def timed(seconds: list[float], *methods: tuple[type, str]) -> Iterator[None]:
    """Notes the seconds of every call of these methods."""
    kept = [getattr(owner, name) for owner, name in methods]
    for (owner, name), method in zip(methods, kept, strict=True):
        setattr(owner, name, _timed(seconds, method))
    try:
        yield
    finally:
        for (owner, name), method in zip(methods, kept, strict=True):
            setattr(owner, name, method)


def _timed(seconds: list[float], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - started)

    return call
