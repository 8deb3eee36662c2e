"""Useful tokens per second of a training step, ours against a padded loop, and what a step costs beside its kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.data import noise_png, write_conversations, write_tokenizer
from benchmarks.mixes import photo_mix
from benchmarks.padded import PaddedTrainer
from benchmarks.result import Result, Settings, median_ratio
from mmscale.config.schema import Config
from mmscale.parallel.engines.base import Engine, StepResult
from mmscale.parallel.mesh import init_mesh
from mmscale.streaming.loader import StepBatch
from mmscale.train import loop
from mmscale.train.heartbeat import Heartbeat
from mmscale.train.job import Job
from mmscale.train.setup import Run, open_run
from mmscale.types import PackedBatch

Lengths = Literal["skewed", "dense"]

ROUNDS = 5
STEPS = 4
"""Optimizer steps of each side in a round."""
MEGABATCH = 50
"""Batches over which transformers' `group_by_length` sorts: one round takes a few of them, evenly spread over the lengths."""
NUM_DOCUMENTS = 2000


@dataclass(frozen=True, slots=True)
class Size:
    """A model and packs that fit a device."""

    width: int
    layers: int
    heads: int
    seq_len: int
    dtype: str


SIZES = {"cpu": Size(256, 4, 4, 1024, "fp32"), "cuda": Size(1024, 16, 16, 16_384, "bf16")}
IMAGE_SIDE, PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2


def step_ratio_skewed(settings: Settings) -> Result:
    """Lengths of the instruction mix, scaled down; the peer takes documents in arrival order."""
    return _race("step_ratio_skewed", settings, "skewed", group_by_length=False, target=">= 2.0")


def step_ratio_grouped(settings: Settings) -> Result:
    """The same lengths; the peer batches documents of like length (transformers' `group_by_length`)."""
    return _race("step_ratio_grouped", settings, "skewed", group_by_length=True, target=">= 1.0")


def step_ratio_dense(settings: Settings) -> Result:
    """Documents of nearly one length, eight to a pack: packing cannot help, only cost."""
    return _race("step_ratio_dense", settings, "dense", group_by_length=False, target=">= 0.95")


def _race(name: str, settings: Settings, lengths: Lengths, *, group_by_length: bool, target: str) -> Result:
    mean = write_data(settings, lengths)
    config = run_config(settings, workers=0)
    with opened(config) as (run, _):
        (source,) = run.stream.sources
        peer = PaddedTrainer(
            config, source.encoder.tokenizer.vocab_size, source.shards, source.encoder, run.mesh.device
        )
        batches = peer.batches(round(config.data.seq_len / mean), group_by_length=group_by_length)
        steps = run.stream.steps()
        require_equal_loss(run, peer, next(steps))
        apart = MEGABATCH // STEPS
        chosen = [batches[r : r + STEPS * apart : apart] for r in range(1 + ROUNDS)]
        fill = padded_fill(peer, [rows for own in chosen[1:] for rows in own])
        ours, theirs = [], []
        for number, own_batches in enumerate(chosen):
            our_speed, their_speed = _round(run, steps, peer, own_batches)
            if number:  # the first round warms both up
                ours.append(our_speed)
                theirs.append(their_speed)
        steps.close()
    how = "length-grouped" if group_by_length else "arrival order"
    text = (
        f"padded sdpa, {how}, fill {fill:.2f}: {statistics.median(theirs):,.0f} tokens/s; ours {statistics.median(ours):,.0f}; "
        f"{ROUNDS} rounds of {STEPS} steps, {config.run.threads} thread"
    )
    return Result(name, median_ratio(ours, theirs), "x", target, text)


def step_overhead_frac(settings: Settings) -> Result:
    """Share of the trainer's wall time outside the engine's forward, backward and update: data wait, loop, metrics, files."""
    write_data(settings, "skewed")
    config = run_config(settings, workers=1, steps=4 + 4 * ROUNDS)
    with opened(config) as (run, job):
        engine = TimedEngine(run.engine)
        with Heartbeat(run.folder, run.mesh.rank, config.run.watch) as beat:
            loop.train_from(replace(run, engine=engine), job, beat)
    steps = list(zip(pairwise(engine.started), engine.busy_s, strict=False))[3:]  # the first ones warm up
    walls, outside = [b - a for (a, b), _ in steps], [b - a - busy for (a, b), busy in steps]
    share = statistics.median(o / w for o, w in zip(outside, walls, strict=True))
    text = f"none; median of {len(steps)} steps: {statistics.median(outside) * 1e3:.1f} of {statistics.median(walls) * 1e3:.0f} ms"
    return Result("step_overhead_frac", share, "share", "<= 0.05", text)


class TimedEngine:
    """An engine that notes when each step enters it, and how long it is busy with the step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.started: list[float] = []
        self.busy_s: list[float] = []

    def forward_backward(self, micro_batches: Sequence[PackedBatch], num_targets: int) -> float:
        """See `Engine.forward_backward`."""
        self.started.append(time.perf_counter())
        loss = self._engine.forward_backward(micro_batches, num_targets)
        self.busy_s.append(time.perf_counter() - self.started[-1])
        return loss

    def step(self, lrs: Sequence[float]) -> StepResult:
        """See `Engine.step`."""
        started = time.perf_counter()
        result = self._engine.step(lrs)
        self.busy_s[-1] += time.perf_counter() - started
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def our_step(run: Run, batch: StepBatch) -> int:
    """One optimizer step of the trainer's engine; gives its tokens."""
    run.engine.forward_backward(batch.packs, sum(pack.num_targets for pack in batch.packs))
    run.engine.step([group.lr for group in run.groups])
    return sum(pack.num_tokens for pack in batch.packs)


def padded_fill(peer: PaddedTrainer, batches: Sequence[Sequence[int]]) -> float:
    """Share of the peer's positions that are no padding."""
    read = [peer.read(rows) for rows in batches]
    return sum(b.num_tokens for b in read) / sum(b.input_ids.numel() for b in read)


def require_equal_loss(run: Run, peer: PaddedTrainer, batch: StepBatch) -> None:
    """Fails unless both sides give the same mean loss for the same documents and weights."""
    rows = [draw.row for draw in batch.planned.packs[0]]
    padded = peer.read(rows)
    pack = batch.packs[0]
    assert (pack.num_tokens, pack.num_targets) == (padded.num_tokens, padded.num_targets), (
        "both train on the same tokens"
    )
    ours = run.engine.evaluate(pack) / pack.num_targets
    with torch.no_grad(), peer.autocast():
        theirs = float(peer.loss(padded))
    tolerance = 1e-4 if run.config.train.dtype == "fp32" else 5e-3
    assert abs(ours - theirs) <= tolerance * theirs, f"losses differ: ours {ours}, padded {theirs}"


def _round(
    run: Run, steps: Iterator[StepBatch], peer: PaddedTrainer, batches: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Useful tokens per second of both sides, which take turns step by step; reading and decoding included."""
    tokens, seconds = np.zeros(2), np.zeros(2)
    for rows in batches:
        for side in (0, 1):
            started = _clock(run)
            tokens[side] += peer.step(rows) if side else our_step(run, next(steps))
            seconds[side] += _clock(run) - started
    ours, theirs = (tokens / seconds).tolist()
    return ours, theirs


def _clock(run: Run) -> float:
    """Seconds. On a CPU those that this process computed: one thread never waits, and neighbours do not count."""
    if run.mesh.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def write_data(settings: Settings, lengths: Lengths) -> float:
    """Writes tokenizer and shards into the benchmark's folder; gives the mean tokens per document."""
    seq_len = SIZES[settings.device].seq_len
    rng = np.random.default_rng(7)
    if lengths == "skewed":
        mix = photo_mix(rng)
        tokens = ((mix.text + mix.media) * seq_len // 6144).clip(20)  # so that about 8 fill a pack
        tokens = tokens[tokens <= seq_len][:NUM_DOCUMENTS]
    else:
        tokens = rng.integers(seq_len // 8 - 4, seq_len // 8 + 1, NUM_DOCUMENTS)
    write_tokenizer(settings.folder / "tokenizer")
    images = [noise_png(i, IMAGE_SIDE) for i in range(16)]
    write_conversations(settings.folder / "docs", tokens.tolist(), seed=7, images=images, image_tokens=IMAGE_TOKENS)
    return float(tokens.mean())


def run_config(settings: Settings, workers: int, steps: int = 1000) -> Config:
    """A run on the benchmark's data: a Llama of a few million parameters (on a CPU) with a small SigLIP tower.

    The vocabulary is small on purpose: ours computes the output head at target positions only, and that is not what the
    race is about.
    """
    size = SIZES[settings.device]
    llm = {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": size.seq_len,
    }
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH,
    }
    folder = settings.folder
    return Config(
        model={"llm": {"config": llm}, "vision": {"config": tower}, "tokenizer": {"path": str(folder / "tokenizer")}},
        data={
            "root": str(folder),
            "sources": {"docs": {"path": "docs"}},
            "seq_len": size.seq_len,
            "plan_group": 4,
            "workers": workers,
        },
        train={
            "steps": steps,
            "global_batch": 1,
            "parts": {part: {"tune": "full"} for part in ("llm", "vision", "vision_connector")},
            "lr": 1e-3,
            "dtype": size.dtype,
            "save_every": 10_000,
        },
        run={"dir": str(folder / "run"), "threads": 1 if settings.device == "cpu" else 8, "device": settings.device},
    )


@contextmanager
def opened(config: Config) -> Iterator[tuple[Run, Job]]:
    """A new run of one process."""
    mesh, job = init_mesh(config.parallel, config.run.device), Job.of(config)
    with open_run(config, mesh, job.attempt) as run:
        assert run is not None, "a new run is not done"
        yield run, job
