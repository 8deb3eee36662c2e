"""What the batch script does after an attempt. Decided from files of the run directory, never from an exit code.

    python -m mmscale.cluster.after RUN --token T --restarts N --state STATE --signal NAME --rc RC

prints one word and the reason: `done`, `stale` (another attempt has taken over: touch nothing), `stopped` (cancelled), `requeue` (go
on) or `give_up` (do not start again).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.errors import MmscaleError
from mmscale.train.attempt import ATTEMPTS, DO_NOT_RESTART, OWNER, first_cause, read_owner, read_record, write_json
from mmscale.train.manifest import read_manifest

MAX_ATTEMPTS = 3
"""Attempts in a row without a new verified step after which a run is given up."""

FINAL = {"refused": "the input was refused", "diverged": "training diverged"}
"""Outcomes that another start would only repeat."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, in one word, and why, in one line."""

    word: str
    reason: str


def decide(run_dir: Path, token: str, restarts: int, state: str = "RUNNING", signal: str | None = None) -> Decision:
    """What the batch script of the attempt `token` does now that its step has ended.

    Args:
        run_dir: the run directory; only read.
        token: `<job id>.<restart count>` of the attempt.
        restarts: SLURM's own count of restarts of the job now.
        state: of the job; RUNNING, or TIMEOUT when SLURM ends it at its limit, both of which a requeue still mends.
        signal: what the batch script was sent: USR1 ahead of the time limit, TERM when SLURM takes the job away; None = nothing.
    """
    if (run_dir / "DONE").exists():
        return Decision("done", "the run is finished")
    if restarts != int(token.rpartition(".")[2]):
        return Decision("stale", f"SLURM is at restart {restarts} of the job, this script is attempt {token}")
    if _is_taken_over(run_dir, token):
        return Decision("stale", f"the run belongs to attempt {read_owner(run_dir)}, this script is attempt {token}")
    if state not in ("RUNNING", "TIMEOUT"):
        return Decision("stopped", f"the job was cancelled, or ended by SLURM without a requeue (state {state})")
    own = _read(run_dir, token, "end")
    if _is_final(run_dir, token, own.get("outcome")):
        return Decision("give_up", str(own.get("reason") or FINAL[own["outcome"]]))
    failures = _failures(run_dir, token, signal)
    if len(failures) >= MAX_ATTEMPTS:
        return Decision(
            "give_up", f"{len(failures)} attempts in a row without a new checkpoint; the last: {failures[-1]}"
        )
    if failures:
        return Decision(
            "requeue", f"attempt {len(failures)} of {MAX_ATTEMPTS} without a new checkpoint: {failures[-1]}"
        )
    step = newest_step(run_dir, token)
    found = f"checkpoint of step {step}" if step else "it was stopped before a checkpoint"
    return Decision("requeue", f"{found}, the run goes on")


def newest_step(run_dir: Path, token: str) -> int:
    """The step of the newest checkpoint that `token` wrote and whose files have their sizes; 0 when there is none.

    Only sizes are compared: the sums are the next attempt's work.
    """
    found = [
        _checkpoint_step(path, token) for path in (run_dir / "checkpoints").glob("step_*") if path.suffix != ".tmp"
    ]
    return max(found, default=0)


def bad_nodes(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Nodes on which a health check of this run has failed: node -> reason, token and time."""
    return read_record(run_dir / "bad_nodes.json")


def record(run_dir: Path, token: str, decision: Decision, rc: int, signal: str | None) -> None:
    """Writes what was decided: into the attempt's folder, and for the whole run unless the attempt is stale."""
    folder = run_dir / ATTEMPTS / token
    at = time.time()
    write_json(
        folder / "after.json",
        {"decision": decision.word, "reason": decision.reason, "at": at, "rc": rc, "signal": signal},
    )
    if decision.word == "stale":
        return
    nodes = bad_nodes(run_dir)
    for path in sorted(folder.glob("health-*.json")):
        report = read_record(path)
        if report.get("problems"):
            nodes[report["node"]] = {"reason": "; ".join(report["problems"]), "token": token, "at": at}
    if nodes:
        write_json(run_dir / "bad_nodes.json", nodes)
    submission = _read(run_dir, token, "job").get("submission")
    if decision.word == "give_up" and not _is_another_run(run_dir, token, submission):
        write_json(
            run_dir / DO_NOT_RESTART, {"reason": decision.reason, "token": token, "submission": submission, "at": at}
        )


def _is_final(run_dir: Path, token: str, outcome: str | None) -> bool:
    """Whether another start would only repeat this end.

    An input that an earlier attempt of the submission has accepted may be refused for a while, when a disk is away: that is a failure
    like any other.
    """
    if outcome != "refused":
        return outcome in FINAL
    return not any(_read(run_dir, one, "start") for one in _attempts(run_dir, token) if one != token)


def _is_taken_over(run_dir: Path, token: str) -> bool:
    """Whether an attempt that started after `token` owns the run."""
    if read_owner(run_dir) in (None, token):
        return False
    # `token` may have been killed before it wrote OWNER, which then names the attempt before it. All times are of one file system.
    folder = run_dir / ATTEMPTS / token
    began = [path.stat().st_mtime for name in ("claim", "job") if (path := folder / f"{name}.json").exists()]
    return bool(began) and (run_dir / OWNER).stat().st_mtime >= max(began)


def _failures(run_dir: Path, token: str, signal: str | None) -> list[str]:
    """Why each of the attempts in a row that got nowhere ended, up to `token`; empty when `token` got somewhere."""
    reasons: list[str] = []
    later = newest_step(run_dir, token)
    for one in reversed(_attempts(run_dir, token)):
        base = _read(run_dir, one, "start").get("base_step")
        if base is not None and later > base:
            break
        asked = signal if one == token else _read(run_dir, one, "after").get("signal")
        if not _was_stopped(run_dir, one, asked):
            reasons.insert(0, f"{one} {_what_happened(run_dir, one, asked)}")
        if base is not None:
            later = base
    return reasons


def _is_another_run(run_dir: Path, token: str, submission: str | None) -> bool:
    """Whether the directory belongs to another submission, and `token` never had it: what stops it does not stop the other."""
    owner = read_owner(run_dir)
    if owner is None or (run_dir / ATTEMPTS / token / "claim.json").exists():
        return False
    return _read(run_dir, owner, "job").get("submission") != submission


def _attempts(run_dir: Path, token: str) -> list[str]:
    """The tokens of the same submission up to `token`, in order of their start."""
    jobs = {path.parent.name: read_record(path) for path in (run_dir / ATTEMPTS).glob("*/job.json")}
    own = jobs.get(token, {})
    same = [one for one, job in jobs.items() if job.get("submission") == own.get("submission")]
    order = sorted(same, key=lambda one: (jobs[one].get("started_at") or 0, jobs[one].get("restarts") or 0))
    return order[: order.index(token) + 1] if token in order else [token]


def _was_stopped(run_dir: Path, token: str, asked: str | None) -> bool:
    """Whether an attempt without a new checkpoint ended because others wanted its nodes, so that it is not to blame.

    An attempt that comes to its time limit (USR1, or the trainer's own clock) without one is: however often it starts, it would not get
    further.
    A crash on one node makes SLURM send SIGTERM to the others, so the agents' signals count only when every node got one.
    """
    outcome = _read(run_dir, token, "end").get("outcome")
    num_signalled = len(list((run_dir / ATTEMPTS / token).glob("signal-*.json")))
    if asked == "USR1":
        return False
    if outcome == "stopped":  # without a signal it was the trainer's own look at the clock
        return asked == "TERM" or num_signalled > 0
    if outcome is not None:
        return outcome in ("done", "fenced")
    nodes = _read(run_dir, token, "job").get("nodes") or []
    return asked == "TERM" or 0 < len(nodes) <= num_signalled


def _what_happened(run_dir: Path, token: str, asked: str | None) -> str:
    """One line on the end of an attempt."""
    folder = run_dir / ATTEMPTS / token
    end, start = _read(run_dir, token, "end"), _read(run_dir, token, "start")
    for path in sorted(folder.glob("hang-*.json")):
        slowest = read_record(path).get("slowest") or {}
        return f"hung in rank {slowest.get('rank')}, phase {slowest.get('phase')}, step {slowest.get('step')}"
    for path in sorted(folder.glob("health-*.json")):
        report = read_record(path)
        if report.get("problems"):
            return f"found node {report.get('node')} unfit: {'; '.join(report['problems'])}"
    cause = first_cause(read_record(path) for path in folder.glob("error-*.json"))
    if cause is not None or end.get("outcome") in ("failed", "refused"):
        return cause or str(end.get("reason"))
    if asked == "USR1" or end.get("outcome") == "stopped":
        return "came to its time limit before it had a new checkpoint; give the job more time"
    return (
        f"was killed after it went on from step {start.get('base_step')}; see its log"
        if start
        else "did not start; see its log"
    )


def _checkpoint_step(path: Path, token: str) -> int:
    """The step of a checkpoint folder, 0 when it is not of `token` or a file has not its size."""
    try:
        manifest = read_manifest(path)
        is_whole = all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # a damaged checkpoint is no progress; the next attempt rejects it and says why
    return int(manifest["step"]) if manifest["attempt"] == token and is_whole else 0


def _read(run_dir: Path, token: str, name: str) -> dict[str, Any]:
    return read_record(run_dir / ATTEMPTS / token / f"{name}.json")


def main(arguments: list[str] | None = None) -> None:
    """Decides, records the decision and prints it."""
    parser = argparse.ArgumentParser(
        prog="python -m mmscale.cluster.after", description="The decision after an attempt."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--token", required=True)
    parser.add_argument("--restarts", type=int, required=True)
    parser.add_argument("--state", default="RUNNING")
    parser.add_argument("--signal", default="")
    parser.add_argument("--rc", type=int, required=True)
    given = parser.parse_args(arguments)
    decision = decide(given.run, given.token, given.restarts, given.state, given.signal or None)
    try:
        record(given.run, given.token, decision, given.rc, given.signal or None)
    except OSError as error:  # a full disk must not keep the run from going on
        sys.stderr.write(f"the decision cannot be written into {given.run}: {error}; make room\n")
    sys.stdout.write(f"{decision.word} {' '.join(decision.reason.split())}\n")


if __name__ == "__main__":
    try:
        main()
    except MmscaleError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
