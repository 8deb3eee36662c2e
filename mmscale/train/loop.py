"""The training run: set up, then one optimizer step after the other until the last step or a request to stop."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from mmscale.config.schema import Config
from mmscale.logging import get_logger
from mmscale.parallel.comm import broadcast_object, gather_objects, on_main, sum_floats, sum_ints
from mmscale.parallel.engines.base import StepResult
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.share import Shared, share_packs
from mmscale.parallel.sp.attention import check_same_plan
from mmscale.redact import redact_values
from mmscale.streaming.protocol import DataState, DataStep
from mmscale.train.ahead import Ahead
from mmscale.train.flops import peak_flops
from mmscale.train.goodput import goodput_line, goodput_of
from mmscale.train.guard import Guard, Judgement, Verdict, read_history
from mmscale.train.heartbeat import Heartbeat
from mmscale.train.job import Job
from mmscale.train.metrics import Reporter, StepMetrics, process_age_s, resident_gb
from mmscale.train.profile import StepProfiler
from mmscale.train.rollback import roll_back
from mmscale.train.saver import Saver
from mmscale.train.schedule import lr_factor
from mmscale.train.setup import Run, mark_done, open_run
from mmscale.train.straggler import StragglerReport
from mmscale.types import MODALITIES, PackedBatch, Skip

log = get_logger(__name__)

KINDS = ("text", *MODALITIES)

NO_UPDATE = StepResult(math.nan, skipped=True)
"""Of a batch that is passed over."""

CHECK_PLAN_EVERY = 100
"""Steps between checks that the ranks of a replica have the same plans; the first step of a start is checked too."""


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Facts about one global batch that every rank must agree on before it starts; summed over all ranks.

    stops    ranks that were asked to stop
    fenced   1 when another attempt owns the run directory
    written  ranks that have written their part of the checkpoint under way
    mflop, hardware_mflop   millions of operations, see `Flops.model` and `Flops.hardware`
    """

    stops: int
    fenced: int
    written: int
    targets: int
    num_skips: int
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    mflop: int
    hardware_mflop: int


def train(config: Config, mesh: Mesh, job: Job | None = None) -> None:
    """Trains until `train.steps` or until it is asked to stop; both leave a verified checkpoint behind.

    After a rollback the run is opened again from its newest checkpoint, in the same process.

    Raises what `open_run` raises, DataError when the data turns out bad beyond the allowed rate, DivergedError after too many
    rollbacks, FencedError when another attempt has taken over the run directory.

    Args:
        job: None = no job script and no request to stop.

    Distributed: every rank of the mesh calls it with the same config.
    """
    job = Job.of(config) if job is None else job
    ended: Ended | None = Ended.ROLLBACK
    with Heartbeat(Path(config.run.dir), mesh.rank, config.run.watch, job.agent) as beat:
        while ended is Ended.ROLLBACK:
            beat.phase("setup", 0)
            ended = _train_once(config, mesh, job, beat)
            gc.collect()  # an engine holds itself in circles, and the next one needs its memory
    if mesh.is_main and ended is not None:
        job.attempt.ended(ended.value)
        log.info("%s", goodput_line(goodput_of(Path(config.run.dir))))


def _train_once(config: Config, mesh: Mesh, job: Job, beat: Heartbeat) -> Ended | None:
    """How a stretch of steps from the run's resume point ended; None when all steps were done before.

    A function of its own, so that nothing of a run is left when a rollback opens it again.
    """
    with open_run(config, mesh, job.attempt) as run:
        return None if run is None else train_from(run, job, beat)


class Ended(Enum):
    """How a stretch of steps ended."""

    DONE = "done"
    STOPPED = "stopped"
    ROLLBACK = "rollback"


def train_from(run: Run, job: Job, beat: Heartbeat) -> Ended:
    """All steps from the resume point on; gives how they ended."""
    config, token = run.config, job.attempt.token or ""
    beat.publish()
    with Reporter(config, run.mesh.is_main, run.first_step, token) as reporter:
        saver = Saver(
            run.folder / "checkpoints", run.engine, run.mesh, config.train, job.attempt, reporter, job.deadline, run.first_step - 1
        )  # fmt: skip
        began = "resume" if run.first_step > 1 else "start"
        reporter.event(began, run.first_step - 1, dp_size=run.mesh.dp_size, startup_s=process_age_s())
        stragglers = StragglerReport(run.mesh, config.run.watch, reporter)
        steps = Ahead(run.stream.steps(run.state), run.sharing, meets_ranks=run.stream.meets_ranks)
        with steps as ahead, _open_profiler(run) as profiler:
            tools = Tools(reporter, saver, _open_guard(run), beat, stragglers, ahead, profiler)
            return _steps(dataclasses.replace(run, engine=profiler.watch(run.engine)), job, tools)


def _open_profiler(run: Run) -> StepProfiler:
    """A profiler of the first steps of this start, which does nothing unless the run asks for it."""
    folder = run.folder / "profile" if run.config.run.profile else None
    return StepProfiler(folder, run.mesh, run.config.train.steps - run.first_step + 1)


def _open_guard(run: Run) -> Guard:
    """A guard that knows the steps before this start."""
    train, first_step = run.config.train, run.first_step
    history = on_main(run.mesh, lambda: read_history(run.folder / "metrics.jsonl", first_step, train.guard))
    return Guard(train.guard, train.steps, history)


@dataclass(frozen=True)
class Tools:
    """What the steps use beside the run."""

    reporter: Reporter
    saver: Saver
    guard: Guard
    beat: Heartbeat
    stragglers: StragglerReport
    ahead: Ahead
    profiler: StepProfiler


@dataclass(frozen=True, slots=True)
class Clock:
    """When a step began (`time.perf_counter` seconds) and how long it then waited for its packs, in seconds."""

    step: int
    started: float
    waited: float


def _steps(run: Run, job: Job, tools: Tools) -> Ended:
    """All optimizer steps that are left."""
    config, saver, beat = run.config, tools.saver, tools.beat
    state = run.state
    try:
        for step in range(run.first_step, config.train.steps + 1):
            beat.phase("data", step)
            started = time.perf_counter()
            with tools.profiler.data():
                batch, shared = tools.ahead.take()
            if shared.spans is not None:
                run.mesh.meter.add("share", shared.sent_bytes)
            clock = Clock(step, started, time.perf_counter() - started)
            beat.phase("step", step)
            totals = agree(run, batch, job, saver.is_written)
            if totals.fenced:
                raise job.attempt.fence_error()
            if totals.written == run.mesh.world_size:
                saver.settle()
            if totals.stops:
                return _stop(run, job, tools, state, step - 1)
            if step == run.first_step or step % CHECK_PLAN_EVERY == 0:
                _check_plans(run.mesh, shared)
            if step < config.train.steps:
                tools.ahead.begin()
            state, judgement = _step(run, tools, state, batch, shared, totals, clock)
            tools.stragglers.after_step(step, clock.waited, time.perf_counter() - started)
            if judgement.verdict is Verdict.ROLLBACK:
                _go_back(run, job, tools, step, judgement)
                return Ended.ROLLBACK
            if config.eval.every and (step % config.eval.every == 0 or step == config.train.steps):
                beat.phase("eval", step)
                tools.ahead.settle()
                validate(run, tools.reporter, step)
            job.deadline.saw_step(time.perf_counter() - started)  # a request to stop waits for a validation too
            is_last = step == config.train.steps  # the run's end, even when the batch was passed over
            if (judgement.verdict is Verdict.SOUND or is_last) and saver.is_due(step):
                beat.phase("save", step)
                saver.start(step, trainer_state(run, state))
            tools.profiler.after_step()
        beat.phase("stop", config.train.steps)
        saver.finish()
    finally:
        saver.abandon()
    mark_done(run, job.attempt)
    return Ended.DONE


def _check_plans(mesh: Mesh, shared: Shared) -> None:
    for spans in shared.spans or ():
        check_same_plan(mesh, spans)


def _step(
    run: Run,
    tools: Tools,
    before: DataState | None,
    batch: DataStep,
    shared: Shared,
    totals: StepTotals,
    clock: Clock,
) -> tuple[DataState, Judgement]:
    """One optimizer step and its report; gives the data state after it, and what the step was."""
    step, reporter = clock.step, tools.reporter
    reason = run.passed_over.reasons.get(step)
    loss, result = (None, NO_UPDATE) if reason else update(run, step, shared, totals.targets)
    skips = _all_skips(run.mesh, batch.packs) if totals.num_skips else ()
    state = batch.state_after(before, skips)
    metrics = _metrics(run, batch, totals, clock, result, loss, state, reporter.attempt)
    named = (*skips, *batch.left_out()) if run.mesh.is_main else ()
    reporter.step(metrics, batch.ids, [dataclasses.asdict(skip) for skip in named])
    judgement = tools.guard.judge(step, loss, result.grad_norm, not result.skipped)
    if reason:
        reporter.event("passed_over", step, reason=reason, ids=list(batch.ids))
    if judgement.kind:
        reporter.event(judgement.kind, step, reason=judgement.reason, ids=list(batch.ids))
    if result.skipped:
        log.warning("step %d: no update: %s", step, reason or judgement.reason or "the batch has no targets")
    return state, judgement


def update(run: Run, step: int, shared: Shared, num_targets: int) -> tuple[float, StepResult]:
    """The mean loss of the global batch of `step` before its update, and what the update was.

    Args:
        num_targets: of the global batch, over all ranks.

    Distributed: every rank calls it; both results are equal on all of them.
    """
    if not num_targets:  # nothing to learn from on any rank: no mean exists, and every rank knows it
        return 0.0, StepResult(0.0, skipped=True)
    # by counter, not by state: whatever is random in the model depends on seed, step and the part of the data alone, so that
    # tensor-parallel ranks, which work on the same part, draw the same
    part = run.mesh.dp_rank * run.mesh.sequence.size + run.mesh.sequence.rank
    torch.manual_seed((run.config.train.seed << 32) + (step << 12) + part)
    local_loss = run.engine.forward_backward(shared.batches, num_targets)
    result = run.engine.step(_learning_rates(run, step))
    return _sum_losses(run.mesh, local_loss) / num_targets, result


def _go_back(run: Run, job: Job, tools: Tools, step: int, judgement: Judgement) -> None:
    """Takes the run's files back behind `step`, see `roll_back`."""
    tools.saver.settle()  # what is being written is of a sound step, and may be where the run goes back to
    tools.saver.abandon()
    guard = run.config.train.guard
    made = on_main(run.mesh, lambda: roll_back(run.folder, job.attempt, guard, run.passed_over, step, judgement))
    tools.reporter.event("rollback", step, to=made.base, steps=list(made.steps), reason=judgement.reason)


def _sum_losses(mesh: Mesh, local_loss: float) -> float:
    """The sum over all ranks, in which the loss of tensor-parallel ranks, which is the same, counts once."""
    return sum_floats(mesh, [local_loss if mesh.speaks_for_replica else 0.0])[0]


def _learning_rates(run: Run, step: int) -> list[float]:
    """The learning rate of each parameter group in a step."""
    return [group.lr * lr_factor(step, run.config.train) for group in run.groups]


def agree(run: Run, batch: DataStep, job: Job, is_written: bool) -> StepTotals:
    """Counts of the global batch, and what any rank has noticed: one small all-reduce on host memory.

    Each rank counts the packs that it has made, so every pack counts once.
    """
    packs = batch.packs
    own = [int(job.wants_stop), int(run.mesh.is_main and job.attempt.is_fenced()), int(is_written)]
    own += [sum(p.num_targets for p in packs), sum(len(p.skipped) for p in packs)]
    own += [sum(p.tokens.get(kind, 0) for p in packs) for kind in KINDS]
    by_kind = [target_kinds(p) for p in packs]
    own += [sum(counts[kind] for counts in by_kind) for kind in KINDS]
    flops = [run.flops.pack(p) for p in packs]
    own += [round(sum(f.model for f in flops) / 1e6), round(sum(f.hardware for f in flops) / 1e6)]
    total = sum_ints(run.mesh, own)
    n = len(KINDS)
    tokens, targets = (dict(zip(KINDS, total[at : at + n], strict=True)) for at in (5, 5 + n))
    return StepTotals(total[0], total[1], total[2], total[3], total[4], tokens, targets, total[-2], total[-1])


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
    run: Run,
    batch: DataStep,
    totals: StepTotals,
    clock: Clock,
    result: StepResult,
    loss: float | None,
    state: DataState,
    attempt: str,
) -> StepMetrics:
    took = time.perf_counter() - clock.started
    tokens = sum(totals.tokens.values())
    peak = peak_flops(run.config, run.mesh.device)
    possible = None if peak is None else peak * run.mesh.world_size * took / 1e6
    sent, waited_s = run.mesh.meter.take()
    return StepMetrics(
        step=clock.step,
        loss=loss,
        loss_hex=None if loss is None else float(loss).hex(),
        grad_norm=result.grad_norm,
        lr=max(_learning_rates(run, clock.step)),
        tokens=totals.tokens,
        target_tokens=totals.target_tokens,
        tokens_per_s=tokens / took,
        mfu=None if possible is None else totals.mflop / possible,
        hfu=None if possible is None else totals.hardware_mflop / possible,
        data_wait_frac=clock.waited / took,
        fill=tokens / (run.config.train.global_batch * run.config.data.seq_len),
        skipped=state.num_skipped,
        step_time_s=took,
        epoch=batch.num_epochs,
        memory_gb=resident_gb(),
        update_skipped=result.skipped,
        comm_bytes=sent,
        comm_wait_s=waited_s,
        ended_at=round(time.time(), 3),
        attempt=attempt,
    )


def validate(run: Run, reporter: Reporter, step: int) -> None:
    """Mean loss over the validation targets, every row once, the same on any number of ranks."""
    assert run.eval_stream is not None, "check_config refuses eval.every without eval.sources"
    started = time.perf_counter()
    loss, targets = 0.0, 0
    for pack in run.eval_stream.turns(run.config.eval.max_packs):
        own = () if pack is None else (pack,)
        for batch in share_packs(run.sharing, own, (0,) * len(own), 1).batches:
            loss += run.engine.evaluate(batch)
        targets += sum(p.num_targets for p in own)
    all_targets = sum_ints(run.mesh, [targets])[0]
    run.mesh.meter.take()  # the next step tells what it sends itself
    mean = _sum_losses(run.mesh, loss) / max(1, all_targets)
    reporter.validation(step, mean, all_targets, time.perf_counter() - started)


def trainer_state(run: Run, state: DataState) -> dict[str, Any]:
    """What a checkpoint holds beside tensors."""
    return {
        "data": state.to_dict(),
        "config": redact_values(run.config.model_dump(mode="json")),
        "external_parts": run.external,
    }


def _stop(run: Run, job: Job, tools: Tools, state: DataState | None, step: int) -> Ended:
    """Leaves a checkpoint of `step` behind."""
    tools.beat.phase("stop", step)
    tools.saver.settle()  # what the disk has refused before is older than what is saved now
    if step > tools.saver.saved:
        assert state is not None, "a step was made, and it gave a state"
        tools.saver.start(step, trainer_state(run, state))
    tools.saver.finish()
    tools.reporter.event("stop", step, signal=job.stop.signal_name)
    log.info("stopped on request after step %d; the same command goes on from there", step)
    return Ended.STOPPED
