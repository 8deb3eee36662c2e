"""Does a recorded step once more: the same batch, the same weights, the loss of each of its packs. Only reads, so the run may be alive.

RUN/config.yaml, data plan    the global batch; its samples must be those of the ledger
RUN/checkpoints               the newest whole one before the step, or the beginning
the steps between             trained again, in memory
the step                      loss of each pack, then loss and gradient norm as in training
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.config.env import Launch
from mmscale.config.load import load_config
from mmscale.config.mixture import is_stream_mode
from mmscale.config.schema import Config, ParallelConfig
from mmscale.errors import ConfigError, DataError
from mmscale.logging import get_logger
from mmscale.parallel.comm import all_gather_objects, on_main, sum_ints
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.share import Shared, share_packs
from mmscale.streaming.protocol import DataStep
from mmscale.train.attempt import read_lineage, read_owner
from mmscale.train.checkpoint_folders import list_checkpoints
from mmscale.train.checkpoint_reader import open_checkpoint
from mmscale.train.loop import update
from mmscale.train.manifest import folder_step, verify_checkpoint
from mmscale.train.records import rows_backward, rows_of_steps
from mmscale.train.setup import Run, open_again

log = get_logger(__name__)

SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class ReplayedPack:
    """One pack of the step: `loss` is the mean over its `targets` (None without one), computed without gradients."""

    targets: int
    loss: float | None
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Replayed:
    """A step done again. `base`: the step whose checkpoint the weights come from, 0 = the beginning.

    `recorded`: the step's line in `metrics.jsonl`; without `loss_hex` its batch was passed over there. `packs`: in the order of the
    plan. `reason`: why the run passes it over, None = it does not.
    """

    step: int
    base: int
    loss: float
    grad_norm: float
    packs: tuple[ReplayedPack, ...]
    recorded: dict[str, Any]
    reason: str | None


def replay_config(folder: Path, launch: Launch) -> Config:
    """The config to replay a run with: its own, without validation; on one process also without its layout.

    Raises ConfigError when it cannot be read, or the run is of stream mode, whose batches cannot be made again.
    """
    config = load_config(str(folder / "config.yaml"), [])
    if is_stream_mode("data.sources", config.data.sources):
        raise ConfigError(
            f"{folder}: expected indexed data, found sources of `mode: stream`, whose batches depend on what is read when; index the "
            "data (mmscale-data index DIR) to be able to replay"
        )
    parallel = config.parallel
    if launch.world_size == 1 and parallel.tensor * parallel.ulysses * parallel.ring > 1:
        parallel = ParallelConfig(attention=parallel.attention)
    elif launch.world_size == 1:
        parallel = parallel.model_copy(update={"engine": "auto", "deepspeed": None, "offload_optimizer": False})
    return config.model_copy(
        update={
            "parallel": parallel,
            "eval": config.eval.model_copy(update={"every": 0}),
            "run": config.run.model_copy(update={"dir": str(folder)}),
        }
    )


def replay(config: Config, mesh: Mesh, step: int) -> Replayed:
    """A recorded step of the run in `config.run.dir`, done again.

    Raises:
        ConfigError: the run has no such step on record.
        DataError: the plan gives other samples than the ledger names.
        CheckpointError: weights or data that are not those of the run.

    Distributed: every rank calls it; in the layout of the run the result is equal to the bit, in another one within rounding.
    """
    folder = Path(config.run.dir)
    recorded, ids = on_main(mesh, lambda: _find_step(folder, step))
    path = on_main(mesh, lambda: _checkpoint_before(folder, step))
    reader = None if path is None else open_checkpoint(path, verify=False)
    with open_again(config, mesh, reader) as run, closing(run.stream.steps(run.state)) as batches:
        batch, shared = _train_up_to(run, step, batches)
        if batch.ids != ids:
            raise DataError(
                f"step {step}: expected the {len(ids)} samples of {folder / 'ledger.jsonl'}, found {len(batch.ids)} of which "
                f"{len({*batch.ids} - {*ids})} are others; give data.root and train.global_batch as they were at that step"
            )
        packs = _look_at(run, batch, shared)
        loss, result = update(run, step, shared, sum(pack.targets for pack in packs))
        reason = run.passed_over.reasons.get(step)
    return Replayed(step, 0 if reader is None else reader.step, loss, result.grad_norm, packs, recorded, reason)


def _find_step(folder: Path, step: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What is on record of a step: its metrics and its samples."""
    metrics = folder / "metrics.jsonl"
    # the last line, not the largest step: a rollback gave up what lies beyond
    last = next((row["step"] for row in rows_backward(metrics)), 0)
    rows = rows_of_steps(metrics, [step]) if 1 <= step <= last else {}
    ledger = rows_of_steps(folder / "ledger.jsonl", [step]) if rows else {}
    if not (rows and ledger):
        found = f"steps 1 to {last} on record" if last else "no step on record"
        raise ConfigError(
            f"--step {step}: expected a step that the run has done, found {found} in {metrics}; give one of them"
        )
    return rows[step], tuple(ledger[step]["ids"])


def _checkpoint_before(folder: Path, step: int) -> Path | None:
    """The newest whole checkpoint of the run's own before `step`; None = there is none, so the weights are those of the beginning."""
    owner = read_owner(folder)
    lineage = None if owner is None else read_lineage(folder, owner)
    for path in list_checkpoints(folder / "checkpoints"):
        if (folder_step(path.name) or 0) >= step:
            continue
        problems = verify_checkpoint(path, lineage)
        if not problems:
            return path
        log.warning("checkpoint %s is not used: %s", path, "; ".join(problems[:3]))
    return None


def _train_up_to(run: Run, step: int, batches: Iterator[DataStep]) -> tuple[DataStep, Shared]:
    """The batch of `step`, with the weights as they were before it."""
    if step > run.first_step:
        log.info("steps %d to %d are done again, in memory", run.first_step, step - 1)
    said = time.monotonic()
    for at in range(run.first_step, step + 1):
        batch = next(batches)
        shared = share_packs(run.sharing, batch.packs, batch.places, batch.num_packs)
        if at == step:
            break
        if at not in run.passed_over.reasons:
            targets = sum_ints(run.mesh, [sum(pack.num_targets for pack in batch.packs)])[0]
            update(run, at, shared, targets)
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            log.info("step %d of %d", at, step)
    return batch, shared


def _look_at(run: Run, batch: DataStep, shared: Shared) -> tuple[ReplayedPack, ...]:
    """All packs of the global batch by data rank and micro-batch, with their losses before the update."""
    mesh = run.mesh
    losses = [run.engine.evaluate(part) for part in shared.batches]
    # every part of a pack counts once, though tensor-parallel ranks hold the same ones
    sums = [((mesh.dp_rank, place), loss) for place, loss in enumerate(losses) if mesh.speaks_for_replica]
    made = [
        ((mesh.dp_rank, place), pack.num_targets, pack.ids)
        for place, pack in zip(batch.places, batch.packs, strict=True)
    ]
    by_rank = all_gather_objects(mesh, (sums, made))
    total: dict[tuple[int, int], float] = {}
    for place, loss in (one for found, _ in by_rank for one in found):
        total[place] = total.get(place, 0.0) + loss
    packs = sorted(one for _, found in by_rank for one in found)
    return tuple(ReplayedPack(n, total[place] / n if n else None, ids) for place, n, ids in packs)
