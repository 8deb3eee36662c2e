"""The training run: set up, then one optimizer step after the other until the last step or a request to stop."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmscale.config.schema import Config
from mmscale.errors import DivergedError
from mmscale.logging import get_logger
from mmscale.parallel.comm import broadcast_object, gather_objects, sum_floats, sum_ints
from mmscale.parallel.engines.base import StepResult
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.share import Shared, share_packs
from mmscale.parallel.sp.attention import check_same_plan
from mmscale.streaming.protocol import DataState, DataStep
from mmscale.train.checkpoint import save_checkpoint
from mmscale.train.metrics import Reporter, StepMetrics, resident_gb
from mmscale.train.schedule import lr_factor
from mmscale.train.setup import Run, mark_done, open_run
from mmscale.train.signals import StopFlag
from mmscale.types import MODALITIES, PackedBatch, Skip

log = get_logger(__name__)

KINDS = ("text", *MODALITIES)

CHECK_PLAN_EVERY = 100
"""Steps between checks that the ranks of a replica have the same plans; the first step of a start is checked too."""

MAX_BAD_STEPS = 3
"""Steps in a row without a finite loss and gradient after which a run stops; none of them is ever saved."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Facts about one global batch that every rank must agree on before it starts; summed over all ranks.

    `mflop`: millions of operations, forward and backward.
    """

    stops: int
    targets: int
    num_skips: int
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    mflop: int


def train(config: Config, mesh: Mesh, stop: StopFlag) -> None:
    """Trains until `train.steps` or until `stop` is set; both leave a verified checkpoint behind.

    Raises what `open_run` raises, and DataError when the data turns out bad beyond the allowed rate.

    Distributed: every rank of the mesh calls it with the same config.
    """
    with open_run(config, mesh) as run:
        if run is None:
            return
        with Reporter(config, run.mesh.is_main, run.first_step) as reporter:
            began = "resume" if run.first_step > 1 else "start"
            reporter.event(began, run.first_step - 1, dp_size=run.mesh.dp_size)
            _steps(run, reporter, stop)


@dataclass(frozen=True, slots=True)
class Clock:
    """When a step began (`time.perf_counter` seconds) and how long it then waited for its packs, in seconds."""

    step: int
    started: float
    waited: float


def _steps(run: Run, reporter: Reporter, stop: StopFlag) -> None:
    """All optimizer steps that are left."""
    config, saved, num_bad = run.config, run.first_step - 1, 0
    state = run.state
    batches = run.stream.steps(state)
    try:
        for step in range(run.first_step, config.train.steps + 1):
            started = time.perf_counter()
            batch = next(batches)
            shared = share_packs(run.sharing, batch.packs, batch.places, batch.num_packs)
            clock = Clock(step, started, time.perf_counter() - started)
            totals = agree(run, batch, stop)
            if totals.stops:
                _stop(run, reporter, state, step - 1, saved)
                return
            if step == run.first_step or step % CHECK_PLAN_EVERY == 0:
                _check_plans(run.mesh, shared)
            state, is_finite = _step(run, reporter, state, batch, shared, totals, clock)
            num_bad = 0 if is_finite else num_bad + 1
            if num_bad == MAX_BAD_STEPS or (num_bad and step == config.train.steps):
                raise DivergedError(
                    f"step {step}: expected a finite loss and gradient, found {num_bad} steps without; the newest checkpoint is of "
                    f"step {saved}: lower train.lr or set train.clip, and look at the samples of these steps in ledger.jsonl"
                )
            if config.eval.every and (step % config.eval.every == 0 or step == config.train.steps):
                validate(run, reporter, step)
            if not num_bad and (step % config.train.save_every == 0 or step == config.train.steps):
                save(run, reporter, state, step)
                saved = step
    finally:
        batches.close()
    mark_done(run)


def _check_plans(mesh: Mesh, shared: Shared) -> None:
    for spans in shared.spans or ():
        check_same_plan(mesh, spans)


def _step(
    run: Run,
    reporter: Reporter,
    before: DataState | None,
    batch: DataStep,
    shared: Shared,
    totals: StepTotals,
    clock: Clock,
) -> tuple[DataState, bool]:
    """One optimizer step and its report; gives the data state after it, and whether loss and gradient were finite."""
    step = clock.step
    # by counter, not by state: whatever is random in the model depends on seed, step and the part of the data alone, so that
    # tensor-parallel ranks, which work on the same part, draw the same
    part = run.mesh.dp_rank * run.mesh.sequence.size + run.mesh.sequence.rank
    torch.manual_seed((run.config.train.seed << 32) + (step << 12) + part)
    if totals.targets:
        local_loss = run.engine.forward_backward(shared.batches, totals.targets)
        result = run.engine.step(_learning_rates(run, step))
    else:  # nothing to learn from on any rank: no mean exists, and every rank knows it
        local_loss, result = 0.0, StepResult(0.0, skipped=True)
    loss = _sum_losses(run.mesh, local_loss) / max(1, totals.targets)
    skips = _all_skips(run.mesh, batch.packs) if totals.num_skips else ()
    state = batch.state_after(before, skips)
    metrics = _metrics(run, batch, totals, clock, result, loss, state)
    named = (*skips, *batch.left_out()) if run.mesh.is_main else ()
    reporter.step(metrics, batch.ids, [dataclasses.asdict(skip) for skip in named])
    if result.skipped:
        log.warning("step %d: no update: loss %s, gradient norm %s", step, loss, result.grad_norm)
    return state, math.isfinite(loss) and math.isfinite(result.grad_norm)


def _sum_losses(mesh: Mesh, local_loss: float) -> float:
    """The sum over all ranks, in which the loss of tensor-parallel ranks, which is the same, counts once."""
    return sum_floats(mesh, [local_loss if mesh.speaks_for_replica else 0.0])[0]


def _learning_rates(run: Run, step: int) -> list[float]:
    """The learning rate of each parameter group in a step."""
    return [group.lr * lr_factor(step, run.config.train) for group in run.groups]


def agree(run: Run, batch: DataStep, stop: StopFlag) -> StepTotals:
    """Counts of the global batch, and whether any rank was asked to stop: one small all-reduce on host memory.

    Each rank counts the packs that it has made, so every pack counts once.
    """
    own = [int(stop.is_set), sum(p.num_targets for p in batch.packs), sum(len(p.skipped) for p in batch.packs)]
    own += [sum(p.tokens.get(kind, 0) for p in batch.packs) for kind in KINDS]
    by_kind = [target_kinds(p) for p in batch.packs]
    own += [sum(counts[kind] for counts in by_kind) for kind in KINDS]
    own.append(sum(round(run.flops.pack(p) / 1e6) for p in batch.packs))
    total = sum_ints(run.mesh, own)
    n = len(KINDS)
    tokens, targets = (dict(zip(KINDS, total[at : at + n], strict=True)) for at in (3, 3 + n))
    return StepTotals(total[0], total[1], total[2], tokens, targets, mflop=total[-1])


def target_kinds(pack: PackedBatch) -> dict[str, int]:
    """Target tokens of a pack by the medium of their document; `text` for documents without media.

    A document with several kinds of media counts for the last one in the order image, video, audio.
    """
    kind_of_document = torch.zeros(len(pack.lengths), dtype=torch.int64)
    for modality, media in pack.media.items():
        kind_of_document[media.document] = torch.clamp(kind_of_document[media.document], min=KINDS.index(modality))
    documents = torch.searchsorted(pack.cu_seqlens.long(), pack.target_idx, right=True) - 1
    counts = torch.bincount(kind_of_document[documents], minlength=len(KINDS)).tolist()
    return dict(zip(KINDS, counts, strict=True))


def _all_skips(mesh: Mesh, packs: tuple[PackedBatch, ...]) -> tuple[Skip, ...]:
    """The samples masked in this step on any rank, in rank order, the same on every rank."""
    gathered = gather_objects(mesh, [skip for pack in packs for skip in pack.skipped])
    return broadcast_object(mesh, tuple(skip for skips in gathered or () for skip in skips))


def _metrics(
    run: Run, batch: DataStep, totals: StepTotals, clock: Clock, result: StepResult, loss: float, state: DataState
) -> StepMetrics:
    took = time.perf_counter() - clock.started
    tokens = sum(totals.tokens.values())
    peak = run.config.run.peak_tflops
    sent, waited_s = run.mesh.meter.take()
    return StepMetrics(
        step=clock.step,
        loss=loss,
        loss_hex=float(loss).hex(),
        grad_norm=result.grad_norm,
        lr=max(_learning_rates(run, clock.step)),
        tokens=totals.tokens,
        target_tokens=totals.target_tokens,
        tokens_per_s=tokens / took,
        mfu=None if peak is None else totals.mflop * 1e6 / took / (run.mesh.world_size * peak * 1e12),
        data_wait_frac=clock.waited / took,
        fill=tokens / (run.config.train.global_batch * run.config.data.seq_len),
        skipped=state.num_skipped,
        step_time_s=took,
        epoch=batch.num_epochs,
        memory_gb=resident_gb(),
        update_skipped=result.skipped,
        comm_bytes=sent,
        comm_wait_s=waited_s,
    )


def validate(run: Run, reporter: Reporter, step: int) -> None:
    """Mean loss over the validation targets, every row once, the same on any number of ranks."""
    assert run.eval_stream is not None, "check_config refuses eval.every without eval.sources"
    loss, targets = 0.0, 0
    for pack in run.eval_stream.turns(run.config.eval.max_packs):
        own = () if pack is None else (pack,)
        for batch in share_packs(run.sharing, own, (0,) * len(own), 1).batches:
            loss += run.engine.evaluate(batch)
        targets += sum(p.num_targets for p in own)
    all_targets = sum_ints(run.mesh, [targets])[0]
    run.mesh.meter.take()  # the next step tells what it sends itself
    reporter.validation(step, _sum_losses(run.mesh, loss) / max(1, all_targets), all_targets)


def save(run: Run, reporter: Reporter, state: DataState, step: int) -> Path:
    """A committed checkpoint after `step` finished steps."""
    started = time.perf_counter()
    config = run.config
    trainer: dict[str, Any] = {
        "data": state.to_dict(),
        "config": config.model_dump(mode="json"),
        "external_parts": run.external,
    }
    path = save_checkpoint(run.folder / "checkpoints", step, run.engine, trainer, run.mesh, config.train.keep_last)
    took = time.perf_counter() - started
    reporter.event("save", step, seconds=round(took, 3))
    log.info("step %d: saved %s in %.2f s", step, path.name, took)
    return path


def _stop(run: Run, reporter: Reporter, state: DataState | None, step: int, saved: int) -> None:
    if step > saved:
        assert state is not None, "a step was made, and it gave a state"
        save(run, reporter, state, step)
    reporter.event("stop", step)
    log.info("stopped on request after step %d; the same command goes on from there", step)
