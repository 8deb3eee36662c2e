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
from numpy.typing import NDArray

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
STEPS = 5
"""Optimizer steps of each side in a round."""
DRAWS = 4000
"""Random choices of batches, of which the one most like the whole epoch is raced."""
NUM_DOCUMENTS = 2000
MEAN_TOKENS = 768
"""Of a document of the instruction mix, before the lengths are scaled to the packs of the benchmark."""


@dataclass(frozen=True, slots=True)
class Size:
    """A model and packs that fit a device; `head_rows` in proportion to a model of 1B parameters, see `run_config`."""

    width: int
    layers: int
    heads: int
    seq_len: int
    dtype: str
    head_rows: int


SIZES = {"cpu": Size(256, 4, 4, 1024, "fp32", 3584), "cuda": Size(1024, 16, 16, 16_384, "bf16", 57_344)}
SMALL_HEAD_ROWS = 768
"""What the tokenizer of the benchmark needs."""
IMAGE_SIDE, PATCH = 32, 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2


@dataclass(frozen=True, slots=True)
class Race:
    """What two training loops run on.

    Attributes:
        documents: mean documents of a pack, and documents of a padded batch.
        packs: length of a pack over that of `Size`.
        grouped: the padded batches hold documents of like length (transformers' `group_by_length`), else as they arrive.
    """

    lengths: Lengths
    documents: int = 8
    packs: int = 1
    grouped: bool = False


SKEWED = Race("skewed", documents=5)
GROUPED = Race("skewed", documents=16, packs=2, grouped=True)
DENSE = Race("dense")
INSTRUCTIONS = Race("skewed")
"""What the benchmarks that race nobody run on."""


def step_ratio_skewed(settings: Settings) -> Result:
    """Lengths of the instruction mix, scaled down; the peer takes documents in arrival order."""
    return _race("step_ratio_skewed", settings, SKEWED, ">= 2.0")


def step_ratio_grouped(settings: Settings) -> Result:
    """The same mix; the peer batches documents of like length. 16 to a batch, the size that gives fill 0.88."""
    return _race("step_ratio_grouped", settings, GROUPED, ">= 1.25")


def step_ratio_dense(settings: Settings) -> Result:
    """Documents of nearly one length, eight to a pack: packing cannot help, only cost."""
    return _race("step_ratio_dense", settings, DENSE, ">= 1.0")


def _race(name: str, settings: Settings, race: Race, target: str) -> Result:
    """The ratio with the large head; the text tells the one with the small head, too."""
    mean = write_data(settings, race)
    rows = SIZES[settings.device].head_rows
    ours, theirs, fill = _speeds(settings, race, mean, rows)
    small = median_ratio(*_speeds(settings, race, mean, SMALL_HEAD_ROWS)[:2])
    how = "length-grouped" if race.grouped else "arrival order"
    text = (
        f"padded sdpa, {how}, {race.documents} documents, fill {fill:.2f}: {statistics.median(theirs):,.0f} tokens/s; ours "
        f"{statistics.median(ours):,.0f}; {ROUNDS} rounds of {STEPS} steps, {'' if settings.device == 'cuda' else '1 thread, '}"
        f"head of {rows} rows; with {SMALL_HEAD_ROWS} rows {small:.3f} x"
    )
    return Result(name, median_ratio(ours, theirs), "x", target, text)


def _speeds(settings: Settings, race: Race, mean: float, head_rows: int) -> tuple[list[float], list[float], float]:
    """Useful tokens per second of ours and of the peer in each round, and the fill of the padded batches."""
    config = run_config(settings, workers=0, race=race, head_rows=head_rows)
    with opened(config) as (run, _):
        (source,) = run.stream.sources
        peer = PaddedTrainer(
            config, source.encoder.tokenizer.vocab_size, source.shards, source.encoder, run.mesh.device
        )
        batches = peer.batches(round(config.data.seq_len / mean), group_by_length=race.grouped)
        lengths = np.array(peer.lengths())
        chosen = typical_batches([lengths[rows] for rows in batches], STEPS)
        steps = run.stream.steps()
        require_equal_loss(run, peer, next(steps))
        rounds = [_round(run, steps, peer, [batches[i] for i in chosen]) for _ in range(1 + ROUNDS)]
        steps.close()
    ours, theirs = zip(*rounds[1:], strict=True)  # the first round warms both up
    return list(ours), list(theirs), padded_fill([lengths[batches[i]] for i in chosen])


def typical_batches(batches: Sequence[NDArray[np.int64]], num: int) -> list[int]:
    """Indices of `num` padded batches that are together most like all of them.

    Like in what they cost and give per batch: positions, their squares (attention) and tokens without padding. A batch of the
    longest documents is rare and dear; a sample that has it, or has not, would tell more about luck than about the loop.

    Args:
        batches: tokens of the documents of each batch.
    """
    positions = np.array([len(b) * b.max() for b in batches], dtype=np.float64)
    squares = np.array([len(b) * b.max() ** 2 for b in batches], dtype=np.float64)
    facts = np.stack([positions, squares, np.array([b.sum() for b in batches])], axis=1)
    facts /= facts.mean(axis=0)
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(batches), num, replace=False) for _ in range(DRAWS)]
    best = min(draws, key=lambda draw: float(np.abs(facts[draw].mean(axis=0) - 1).sum()))
    return [int(i) for i in best]


def padded_fill(batches: Sequence[NDArray[np.int64]]) -> float:
    """Share of the positions of padded batches that are no padding."""
    return float(sum(b.sum() for b in batches) / sum(len(b) * b.max() for b in batches))


def step_overhead_frac(settings: Settings) -> Result:
    """Share of the trainer's wall time outside the engine's forward, backward and update: data wait, loop, metrics, files."""
    write_data(settings)
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


def write_data(settings: Settings, race: Race = INSTRUCTIONS) -> float:
    """Writes tokenizer and shards into the benchmark's folder; gives the mean tokens per document."""
    seq_len = SIZES[settings.device].seq_len * race.packs
    rng = np.random.default_rng(7)
    if race.lengths == "skewed":
        mix = photo_mix(rng)
        tokens = ((mix.text + mix.media) * seq_len // (race.documents * MEAN_TOKENS)).clip(20)
        tokens = tokens[tokens <= seq_len][:NUM_DOCUMENTS]
    else:
        tokens = rng.integers(seq_len // race.documents - 4, seq_len // race.documents + 1, NUM_DOCUMENTS)
    write_tokenizer(settings.folder / "tokenizer")
    images = [noise_png(i, IMAGE_SIDE) for i in range(16)]
    write_conversations(settings.folder / "docs", tokens.tolist(), seed=7, images=images, image_tokens=IMAGE_TOKENS)
    return float(tokens.mean())


def run_config(
    settings: Settings, workers: int, steps: int = 1000, race: Race = INSTRUCTIONS, head_rows: int = SMALL_HEAD_ROWS
) -> Config:
    """A run on the benchmark's data: a Llama of a few million parameters (on a CPU) with a small SigLIP tower.

    Ours computes the output head at target positions only (half of them), the padded loop everywhere. So the share of the head
    matters: `Size.head_rows` gives it 21 % of the weights that a token is multiplied with, as in Llama-3.2-1B (128,256 x 2,048 of
    1.24 billion); with `SMALL_HEAD_ROWS` it is 5 %, as in models of 7B (2 to 8 %).
    """
    size = SIZES[settings.device]
    seq_len = size.seq_len * race.packs
    llm = {
        "model_type": "llama",
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": seq_len,
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
        model={
            "llm": {"config": llm},
            "vision": {"config": tower},
            "tokenizer": {"path": str(folder / "tokenizer"), "pad_to_multiple": head_rows},
        },
        data={
            "root": str(folder),
            "sources": {"docs": {"path": "docs"}},
            "seq_len": seq_len,
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
        run={
            "dir": str(folder / f"run-{head_rows}"),
            "threads": 1 if settings.device == "cpu" else 8,
            "device": settings.device,
        },
    )


@contextmanager
def opened(config: Config) -> Iterator[tuple[Run, Job]]:
    """A new run of one process."""
    mesh, job = init_mesh(config.parallel, config.run.device), Job.of(config)
    with open_run(config, mesh, job.attempt) as run:
        assert run is not None, "a new run is not done"
        yield run, job
