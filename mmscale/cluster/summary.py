"""How a run stands and what to do next, from its records; also what SLURM says of its job, where there is SLURM."""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from mmscale.config.load import read_yaml
from mmscale.errors import ConfigError
from mmscale.redact import hidden_keys
from mmscale.train.goodput import Account
from mmscale.train.heartbeat import Beat
from mmscale.train.history import AttemptRecord, History

_SQUEUE_LIMIT_S = 20.0
_SILENT_LIMIT_S = 600.0
"""An attempt on another machine that has not said anything for so long, and has no beats, is taken for dead."""

_FAILED = ("failed", "diverged", "refused")


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job as squeue shows it; `reason` says why it waits."""

    job: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class AttemptLine:
    """One attempt for people. `why`: how it ended, in one line."""

    token: str
    began_at: float
    world_size: int | None
    first_step: int | None
    last_step: int | None
    num_redone: int
    outcome: str
    why: str


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run stands.

    state         done, running, queued, given_up, stopped, failed, killed or new
    step          the last step on record; 0 = none
    loss          of that step; None when it was not finite
    tokens_per_s  median of the newest steps
    eta_s         seconds of training left at their pace; None = unknown
    last_error    the newest error on record; empty = none
    advice        what to do next, in one line
    """

    run: str
    state: str
    step: int
    total_steps: int | None
    checkpoint_step: int
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    attempts: tuple[AttemptLine, ...]
    last_error: str
    advice: str


def summarise(history: History, account: Account, jobs: Sequence[QueuedJob], now: float) -> Summary:
    """How the run stands at `now` (unix seconds); `jobs` are those of the run in the queue."""
    newest = account.recent[0] if account.recent else None
    state = _state(history, jobs, now)
    by_token = {one.token: one for one in account.attempts}
    lines = []
    for number, record in enumerate(history.attempts):
        counts = by_token[record.token]
        runs = state == "running" and number == len(history.attempts) - 1
        outcome, why = ("running", "") if runs else _ending(record)
        lines.append(
            AttemptLine(
                record.token,
                record.first_at,
                record.world_size,
                counts.first_step,
                counts.last_step,
                counts.num_redone,
                outcome,
                why,
            )
        )
    step_s = _step_s(account)
    left = None if newest is None or history.total_steps is None else max(0, history.total_steps - newest.step)
    return Summary(
        run=str(history.folder),
        state=state,
        step=newest.step if newest else 0,
        total_steps=history.total_steps,
        checkpoint_step=history.checkpoint_step,
        loss=newest.loss if newest else None,
        tokens_per_s=median(one.tokens_per_s for one in account.recent) if newest else None,
        eta_s=None if left is None or step_s is None or state == "done" else left * step_s,
        attempts=tuple(lines),
        last_error=_last_error(history),
        advice=_advice(history, state, jobs),
    )


def jobs_of(folder: Path, attempts: Sequence[AttemptRecord]) -> tuple[QueuedJob, ...]:
    """The jobs of the run in the queue, the running one first; empty where there is no SLURM or it does not answer."""
    script = str(folder.absolute() / "slurm" / "job.sbatch")
    known = {one.job for one in attempts if one.job is not None}
    if not known and not Path(script).exists():
        return ()
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%A|%T|%r|%o"],
            capture_output=True, text=True, timeout=_SQUEUE_LIMIT_S, check=False,
        )  # fmt: skip
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ()
    found = []
    for line in done.stdout.splitlines():
        job, state, reason, command = (*line.split("|", 3), "", "", "")[:4]
        if job in known or command.startswith(script):
            found.append(QueuedJob(job, state, reason))
    return tuple(sorted(found, key=lambda one: one.state == "PENDING"))


def _state(history: History, jobs: Sequence[QueuedJob], now: float) -> str:
    if history.done_step is not None and history.done_step >= (history.total_steps or 0):
        return "done"
    if any(job.state != "PENDING" for job in jobs):
        return "running"
    newest = history.attempts[-1] if history.attempts else None
    if newest is not None and not newest.is_over and _is_alive(newest, history.beats, now):
        return "running"
    if history.given_up is not None:
        return "given_up"
    if jobs:
        return "queued"
    if newest is None:
        return "new"
    if newest.decision == "requeue":
        return "queued"
    outcome = _ending(newest)[0]
    return outcome if outcome in ("stopped", "killed") else "failed"


def _is_alive(newest: AttemptRecord, beats: Sequence[Beat], now: float) -> bool:
    """Whether the attempt runs: by its processes when they are on this machine, else by when it was last heard of."""
    here = socket.gethostname()
    if newest.host == here and newest.pid is not None and not _runs(newest.pid, newest.last_at):
        return False
    if beats:
        return all(_runs(beat.pid, beat.at) if beat.host == here else beat.at + beat.limit_s > now for beat in beats)
    return now - newest.last_at < _SILENT_LIMIT_S


def _runs(pid: int, at: float) -> bool:
    """Whether the process that had this number at that time still runs."""
    try:
        process = psutil.Process(pid)
        return process.create_time() <= at + 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ending(record: AttemptRecord) -> tuple[str, str]:
    """How an attempt ended in one word, and why in one line."""
    if record.outcome is not None:
        signals = f"after {', '.join(record.signals)}" if record.signals and record.outcome == "stopped" else ""
        return record.outcome, record.reason or signals
    if record.hang is not None:
        return "hung", record.hang
    if record.problems:
        return "bad node", "; ".join(record.problems)
    if record.signals:
        return "killed", f"after {', '.join(record.signals)}, before it could say how it ended"
    return "killed", record.reason or record.decision_reason or "no trace of why"


def _last_error(history: History) -> str:
    errors = [
        (one.at, f"step {one.step}: save failed: {one.details.get('reason')}")
        for one in history.events
        if one.name == "save_failed"
    ]
    for record in history.attempts:
        outcome, why = _ending(record)
        if outcome in (*_FAILED, "hung", "bad node"):
            errors.append((record.last_at, f"attempt {record.token} {outcome}: {why}"))
        elif record.decision == "give_up":
            errors.append((record.last_at, f"attempt {record.token}: {record.decision_reason}"))
    return max(errors, default=(0.0, ""))[1]


def _step_s(account: Account) -> float | None:
    """Seconds from step to step lately, saves included; None without steps."""
    recent = [one for one in account.recent if one.ended_at is not None and one.attempt == account.recent[0].attempt]
    if len(recent) < 2:
        return account.recent[0].took_s if account.recent else None
    first, last = recent[-1].ended_at, recent[0].ended_at
    assert first is not None and last is not None, "those without were left out"
    return max(0.0, last - first) / (len(recent) - 1)


def _advice(history: History, state: str, jobs: Sequence[QueuedJob]) -> str:
    run = history.folder
    newest = history.attempts[-1] if history.attempts else None
    again = _start_again(run, newest)
    if state == "done":
        return f"the run is finished; make a model of it: mmscale consolidate {shlex.quote(str(run))} OUT"
    if state == "running":
        return "nothing: it runs"
    if state == "queued":
        return _queue_advice(jobs)
    if state == "given_up":
        return f"mend the cause ({history.given_up}), then submit again: {again}"
    if state == "stopped":
        return f"it was stopped and saved at step {history.checkpoint_step}; go on with: {again}"
    if state == "new" or newest is None:
        return f"no attempt has started yet; start it with: {again}"
    if state == "killed":
        return f"it was killed; look at {_log_of(run, newest)}, then go on from step {history.checkpoint_step} with: {again}"
    cause = " ".join(_ending(newest)[1].split())
    return f"mend the cause ({cause}; see {_log_of(run, newest)}), then go on from step {history.checkpoint_step} with: {again}"


def _queue_advice(jobs: Sequence[QueuedJob]) -> str:
    if not jobs:
        return "the job was put back into the queue, and squeue does not show it here; look on the cluster: squeue --me"
    job = jobs[0]
    if "Held" in job.reason:
        return f"job {job.job} is held ({job.reason}); let it go: scontrol release {job.job}"
    delay = (
        ": SLURM lets a requeued job wait for about two minutes, which is normal" if job.reason == "BeginTime" else ""
    )
    return f"nothing: job {job.job} waits in the queue ({job.reason}){delay}"


def _start_again(run: Path, newest: AttemptRecord | None) -> str:
    """The command that goes on with a run."""
    script = run / "slurm" / "job.sbatch"
    if script.exists():
        return f"sbatch {shlex.quote(str(script))}"
    if newest is not None and newest.job is not None:
        return "the sbatch command that started it"
    try:
        hidden = hidden_keys(read_yaml(run / "config.yaml"))
    except ConfigError:
        return "the command that started it"
    return " ".join(["mmscale train", shlex.quote(str(run / "config.yaml")), *(f"{key}=..." for key in hidden)])


def _log_of(run: Path, newest: AttemptRecord) -> str:
    logs = sorted((run / "logs").glob(f"{newest.token}.node*.log"))
    return (
        str(logs[0])
        if len(logs) == 1
        else f"{run}/logs/{newest.token}.node*.log"
        if logs
        else "what the process printed"
    )
