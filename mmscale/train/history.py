"""What a run directory says of its past: attempts, steps, events. Read only, and as good as it gets: the run may be alive or dead.

Files that are missing say nothing; lines that were cut off by a kill are passed over. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mmscale.config.load import read_yaml
from mmscale.errors import ConfigError
from mmscale.train.attempt import ATTEMPTS, DO_NOT_RESTART, OWNER, first_cause, read_record
from mmscale.train.heartbeat import FOLDER, Beat, read_beat
from mmscale.train.manifest import folder_step
from mmscale.train.records import rows_backward


class Step(NamedTuple):
    """One execution of an optimizer step, from its line in `metrics.jsonl`. Times in seconds, `ended_at` since 1970.

    `ended_at` is None in lines of versions that did not write it; `loss` is None when it was not finite.
    """

    step: int
    attempt: str
    ended_at: float | None
    took_s: float
    data_wait_s: float
    comm_wait_s: float
    loss: float | None
    tokens_per_s: float
    fill: float
    data_wait_frac: float


@dataclass(frozen=True, slots=True)
class Event:
    """What happened between steps. `details`: the other fields of its line."""

    name: str
    step: int
    at: float
    attempt: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One start of the trainer. Times in unix seconds; None = not on record.

    first_at, last_at  the first and the last moment from which there is a trace
    submitted_at       when its job was submitted
    submission         the job or chain it belongs to
    base_step          step of the checkpoint from which it went on; 0 = from the beginning
    has_claimed        False: it never owned the run directory
    outcome, reason    how the trainer ended by itself; None: it was killed, or it runs
    decision           what the batch script did then, and why
    hang, hung_at      what the watch found when the attempt hung, and since when it did
    problems           what the check of its nodes found
    signals            signals that its nodes got
    """

    token: str
    first_at: float
    last_at: float
    job: str | None = None
    submission: str | None = None
    submitted_at: float | None = None
    nodes: tuple[str, ...] = ()
    base_step: int | None = None
    world_size: int | None = None
    host: str | None = None
    pid: int | None = None
    has_claimed: bool = True
    outcome: str | None = None
    reason: str = ""
    decision: str | None = None
    decision_reason: str = ""
    hang: str | None = None
    hung_at: float | None = None
    problems: tuple[str, ...] = ()
    signals: tuple[str, ...] = ()

    @property
    def is_over(self) -> bool:
        """True when its end is on record."""
        return self.outcome is not None or self.decision is not None or self.hang is not None


@dataclass(frozen=True, slots=True)
class History:
    """A run directory as it stands; attempts in the order in which they began.

    total_steps      `train.steps` of the newest start; None = unknown
    done_step        the step in DONE; None = the run is not done
    given_up         why no later attempt starts; None = it may
    checkpoint_step  the newest checkpoint by its name; 0 = none. Nothing is verified
    beats            what the ranks of the newest attempt said last
    """

    folder: Path
    attempts: tuple[AttemptRecord, ...]
    events: tuple[Event, ...]
    total_steps: int | None = None
    done_step: int | None = None
    given_up: str | None = None
    checkpoint_step: int = 0
    beats: tuple[Beat, ...] = ()


def read_history(folder: Path) -> History:
    """Everything but the steps. Raises ConfigError when `folder` is no run directory.

    Cost: the small files of all attempts, and `events.jsonl`.
    """
    traces = ("config.yaml", "metrics.jsonl", ATTEMPTS, OWNER, "slurm/job.sbatch")
    if not any((folder / name).exists() for name in traces):
        raise ConfigError(
            f"{folder}: expected a run directory, found none of {', '.join(traces)} there; give the folder in `run.dir`"
        )
    events = tuple(_read_events(folder / "events.jsonl"))
    attempts = _read_attempts(folder, events)
    beats: tuple[Beat, ...] = ()
    if attempts:
        newest = attempts[-1]
        found = (read_beat(path) for path in sorted((folder / FOLDER).glob("rank_*.json")))
        beats = tuple(beat for beat in found if beat is not None and beat.at >= newest.first_at)
        last_at = max((newest.last_at, *(beat.at for beat in beats)))
        attempts = (*attempts[:-1], replace(newest, last_at=last_at))
    stop, done = read_record(folder / DO_NOT_RESTART), read_record(folder / "DONE").get("step")
    steps = (folder_step(path.parent.name) for path in (folder / "checkpoints").glob("step_*/manifest.json"))
    return History(
        folder=folder,
        attempts=attempts,
        events=events,
        total_steps=_total_steps(folder / "config.yaml"),
        done_step=done if isinstance(done, int) else None,
        given_up=str(stop.get("reason")) if stop.get("token") in {one.token for one in attempts} else None,
        checkpoint_step=max((step for step in steps if step is not None), default=0),
        beats=beats,
    )


def read_steps_backwards(folder: Path) -> Iterator[Step]:
    """Every execution of a step, the newest first, so that one pass knows what was done again later.

    Cost: reads `metrics.jsonl` from its end in blocks; no rows are held.
    """
    for row in rows_backward(folder / "metrics.jsonl"):
        try:
            took, share = row["step_time_s"], row["data_wait_frac"]
            yield Step(
                row["step"], row.get("attempt", ""), row.get("ended_at"), took, share * took, row.get("comm_wait_s", 0.0),
                row["loss"], row["tokens_per_s"], row["fill"], share,
            )  # fmt: skip
        except (KeyError, TypeError):  # of another version
            continue


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _total_steps(path: Path) -> int | None:
    try:
        found = read_yaml(path)["train"]["steps"]
    except (ConfigError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _read_events(path: Path) -> Iterator[Event]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        row = _parse(line)
        if row is None or not {"event", "step", "at"} <= row.keys():
            continue
        head = ("event", "step", "at", "attempt")
        details = {key: value for key, value in row.items() if key not in head}
        yield Event(row["event"], row["step"], row["at"], row.get("attempt", ""), details)


def _read_attempts(folder: Path, events: tuple[Event, ...]) -> tuple[AttemptRecord, ...]:
    """All attempts, by their folders and by the events that name them."""
    told: dict[str, list[Event]] = {}
    for event in events:
        told.setdefault(event.attempt, []).append(event)
    try:
        tokens = {path.name for path in (folder / ATTEMPTS).iterdir() if path.is_dir()}
    except FileNotFoundError:
        tokens = set()
    found = [_read_attempt(folder / ATTEMPTS / token, token, told.get(token, [])) for token in tokens | told.keys()]
    known = [one for one in found if one is not None]
    own = [one for one in known if not _is_outsider(one, known)]
    return tuple(sorted(own, key=lambda one: (one.first_at, one.token)))


def _is_outsider(one: AttemptRecord, attempts: Iterable[AttemptRecord]) -> bool:
    """Whether an attempt was refused while another one was at work: its time is not the run's, and what it found is not its state."""
    return (
        one.outcome == "refused"
        and not one.has_claimed
        and any(other.first_at < one.first_at < other.last_at for other in attempts)
    )


def _read_attempt(folder: Path, token: str, events: list[Event]) -> AttemptRecord | None:
    """None when there is no trace of when it was."""
    job, claim, start, end, after = (
        read_record(folder / f"{name}.json") for name in ("job", "claim", "start", "end", "after")
    )
    signals, hangs, healths, errors = (
        [read_record(path) for path in sorted(folder.glob(f"{name}-*.json"))]
        for name in ("signal", "hang", "health", "error")
    )
    process_starts = [event.at - event.details.get("startup_s", 0.0) for event in events]
    records = (claim, start, end, after, *signals, *hangs, *healths, *errors)
    times = [record["at"] for record in records if "at" in record] + [event.at for event in events]
    began = job.get("started_at")
    first = [began] if began is not None else [*times, *process_starts]
    if not first:
        return None
    problems = [f"{found.get('node')}: {'; '.join(found['problems'])}" for found in healths if found.get("problems")]
    return AttemptRecord(
        token=token,
        first_at=min(first),
        last_at=max((*times, min(first))),
        job=job.get("job"),
        submission=job.get("submission"),
        submitted_at=job.get("submitted_at"),
        nodes=tuple(job.get("nodes") or ()),
        base_step=start.get("base_step"),
        world_size=start.get("world_size"),
        host=start.get("host"),
        pid=start.get("pid"),
        has_claimed=bool(claim or start),
        outcome=end.get("outcome"),
        reason=first_cause(errors) or str(end.get("reason") or ""),
        decision=after.get("decision"),
        decision_reason=str(after.get("reason") or ""),
        hang=_hang_text(folder, hangs[0]) if hangs else None,
        hung_at=_hung_at(hangs[0]) if hangs else None,
        problems=tuple(problems),
        signals=tuple(sorted({str(found["signal"]) for found in signals if "signal" in found})),
    )


def _hung_at(hang: Mapping[str, Any]) -> float | None:
    at, age_s = hang.get("at"), (hang.get("slowest") or {}).get("age_s")
    return at - age_s if isinstance(at, int | float) and isinstance(age_s, int | float) else None


def _hang_text(folder: Path, hang: Mapping[str, Any]) -> str:
    slowest = hang.get("slowest") or {}
    where = f"rank {slowest.get('rank')} on {slowest.get('host')}" if slowest else "a rank"
    stacks = f"; stacks: {ATTEMPTS}/{folder.name}/{hang['stacks']}" if hang.get("stacks") else ""
    return f"{where} hung in phase {hang.get('phase')} of step {hang.get('step')} for more than {hang.get('limit_s')} s{stacks}"
