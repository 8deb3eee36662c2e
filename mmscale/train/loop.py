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
from mmscale.streaming.protocol import DataState, DataStep
from mmscale.train.checkpoint import save_checkpoint
from mmscale.train.metrics import Reporter, StepMetrics, resident_gb
from mmscale.train.schedule import lr_factor
from mmscale.train.setup import Run, mark_done, open_run
from mmscale.train.signals import StopFlag
from mmscale.types import MODALITIES, PackedBatch, Skip

log = get_logger(__name__)

KINDS = ("text", *MODALITIES)

MAX_BAD_STEPS = 3
"""Steps in a row without a finite loss and gradient after which a run stops; none of them is ever saved."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Facts about one global batch that every rank must agree on before it starts; summed over all ranks."""

    stops: int
    targets: int
    num_skips: int
    tokens: dict[str, int]
    target_tokens: dict[str, int]


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
    """When a step began (`time.perf_counter` seconds) and how long it then waited for the loader, in seconds."""

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
            clock = Clock(step, started, time.perf_counter() - started)
            totals = agree(run.mesh, batch, stop)
            if totals.stops:
                _stop(run, reporter, state, step - 1, saved)
                return
            state, is_finite = _step(run, reporter, state, batch, totals, clock)
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


def _step(
    run: Run, reporter: Reporter, before: DataState | None, batch: DataStep, totals: StepTotals, clock: Clock
) -> tuple[DataState, bool]:
    """One optimizer step and its report; gives the data state after it, and whether loss and gradient were finite."""
    step = clock.step
    # by counter, not by state: whatever is random in the model depends on seed, step and rank alone
    torch.manual_seed((run.config.train.seed << 32) + (step << 12) + run.mesh.rank)
    if totals.targets:
        local_loss = run.engine.forward_backward(batch.packs, totals.targets)
        result = run.engine.step(_learning_rates(run, step))
    else:  # nothing to learn from on any rank: no mean exists, and every rank knows it
        local_loss, result = 0.0, StepResult(0.0, skipped=True)
    loss = sum_floats(run.mesh, [local_loss])[0] / max(1, totals.targets)
    skips = _all_skips(run.mesh, batch.packs) if totals.num_skips else ()
    state = batch.state_after(before, skips)
    metrics = _metrics(run, batch, totals, clock, result, loss, state)
    named = (*skips, *batch.left_out()) if run.mesh.is_main else ()
    reporter.step(metrics, batch.ids, [dataclasses.asdict(skip) for skip in named])
    if result.skipped:
        log.warning("step %d: no update: loss %s, gradient norm %s", step, loss, result.grad_norm)
    return state, math.isfinite(loss) and math.isfinite(result.grad_norm)


def _learning_rates(run: Run, step: int) -> list[float]:
    """The learning rate of each parameter group in a step."""
    return [group.lr * lr_factor(step, run.config.train) for group in run.groups]


def agree(mesh: Mesh, batch: DataStep, stop: StopFlag) -> StepTotals:
    """Counts of the global batch, and whether any rank was asked to stop: one small all-reduce on host memory."""
    own = [int(stop.is_set), sum(p.num_targets for p in batch.packs), sum(len(p.skipped) for p in batch.packs)]
    own += [sum(p.tokens.get(kind, 0) for p in batch.packs) for kind in KINDS]
    by_kind = [target_kinds(p) for p in batch.packs]
    own += [sum(counts[kind] for counts in by_kind) for kind in KINDS]
    total = sum_ints(mesh, own)
    n = len(KINDS)
    tokens, targets = total[3 : 3 + n], total[3 + n :]
    return StepTotals(
        total[0], total[1], total[2], dict(zip(KINDS, tokens, strict=True)), dict(zip(KINDS, targets, strict=True))
    )


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
    # an estimate: this rank's packs stand for those of the others, which cost about the same by plan
    flops = sum(run.flops.pack(pack) for pack in batch.packs) * run.mesh.dp_size
    return StepMetrics(
        step=clock.step,
        loss=loss,
        loss_hex=float(loss).hex(),
        grad_norm=result.grad_norm,
        lr=max(_learning_rates(run, clock.step)),
        tokens=totals.tokens,
        target_tokens=totals.target_tokens,
        tokens_per_s=tokens / took,
        mfu=None if peak is None else flops / took / (run.mesh.world_size * peak * 1e12),
        data_wait_frac=clock.waited / took,
        fill=tokens / (run.config.train.global_batch * run.config.data.seq_len),
        skipped=state.num_skipped,
        step_time_s=took,
        epoch=batch.num_epochs,
        memory_gb=resident_gb(),
        update_skipped=result.skipped,
    )


def validate(run: Run, reporter: Reporter, step: int) -> None:
    """Mean loss over the validation targets, every row once, the same on any number of ranks."""
    assert run.eval_stream is not None, "check_config refuses eval.every without eval.sources"
    loss, targets = 0.0, 0
    for pack in run.eval_stream.passes(run.config.eval.max_packs):
        loss += run.engine.evaluate(pack)
        targets += pack.num_targets
    all_targets = sum_ints(run.mesh, [targets])[0]
    reporter.validation(step, sum_floats(run.mesh, [loss])[0] / max(1, all_targets), all_targets)


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
