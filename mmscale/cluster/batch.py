"""The texts of batch scripts, and what a running batch script asks for: its run directory, and the start of an attempt.

The scripts in `slurm/` are `script_text` with its defaults; `python -m mmscale.cluster.batch render slurm` writes them again.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from mmscale.cluster.after import bad_nodes
from mmscale.cluster.site import Site
from mmscale.cluster.times import check_lead
from mmscale.errors import ConfigError, MmscaleError, RefusedInputError
from mmscale.train.attempt import ATTEMPTS, DO_NOT_RESTART, read_record, write_json

Kind = Literal["pretrain", "sft", "eval", "consolidate"]
Mode = Literal["requeue", "chain"]

USAGE: dict[Kind, tuple[str, str]] = {
    "pretrain": ("Trains until the run is finished, over as many attempts as it takes.", "CONFIG [a.b=value ...]"),
    "sft": ("As pretrain.sbatch, under another job name.", "CONFIG [a.b=value ...]"),
    "eval": (
        "Asks an exported model the questions of datasets, one per array task (N = their number - 1).",
        "MODEL DATASET...",
    ),
    "consolidate": ("Turns a checkpoint into a Hugging Face folder.", "RUN OUT [options]"),
}
FUNCTION: dict[Kind, str] = {
    "pretrain": "train_job",
    "sft": "train_job",
    "eval": "eval_job",
    "consolidate": "consolidate_job",
}
EXPORTED = (
    "PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH", "MMSCALE_REPO", "MMSCALE_SITE", "MMSCALE_CHAIN", "MMSCALE_LEAD_S",
    "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
)  # fmt: skip
"""Variables of the submitting shell that a job gets. A list, so that no secret of that shell travels by accident."""

SETTINGS = ("procs_per_node", "lead_s", "venv", "modules", "container", "container_runtime", "mounts")
"""Keys of the site that the job reads as shell variables."""

_FIND_REPO = """\
# In a job this file is a copy elsewhere; SLURM knows which one was submitted.
repo=${MMSCALE_REPO:-}
if [ -z "$repo" ]; then
    until line=$(scontrol show job --oneliner "$SLURM_JOB_ID") || [ "$SECONDS" -gt 300 ]; do sleep 5; done
    script=${line#* Command=}
    repo=$(cd "$(dirname "${script%%.sbatch*}.sbatch")/.." && pwd)
fi
"""


@dataclass(frozen=True, slots=True)
class Submission:
    """What `mmscale submit` writes into a script of its own, so that the file is all that the job needs.

    arguments  CONFIG and overrides, as typed
    folder     the folder in which they were typed
    run_dir    where the job's own log goes
    repo       the folder that holds slurm/
    chain      name of the chain of jobs; None = one job that is requeued
    site       site file for the job; None = none
    """

    arguments: tuple[str, ...]
    name: str
    folder: Path
    run_dir: Path
    repo: Path
    chain: str | None = None
    site: Path | None = None


def script_text(kind: Kind, site: Site, submission: Submission | None = None) -> str:
    """The text of a batch script; without a submission one that takes its arguments from the command line."""
    about, arguments = USAGE[kind]
    option = " --array=0-N" if kind == "eval" else ""
    if submission is None:
        head = f"# {about}\n#\n#   sbatch{option} slurm/{kind}.sbatch {arguments}\n#\n# docs/slurm.md says more.\n"
        body = f'{_FIND_REPO}. "$repo/slurm/lib/job.sh" || exit 1\nread_site\n{FUNCTION[kind]} "$@"\n'
    else:
        head = "# Written by `mmscale submit`. Submitting this file again goes on with the run.\n"
        body = _submitted_body(kind, site, submission)
    lines = "".join(f"#SBATCH {one}\n" for one in _directives(kind, site, submission))
    return f"#!/bin/bash\n{head}{lines}set -u\n{body}"


def _directives(kind: Kind, site: Site, submission: Submission | None) -> list[str]:
    is_training = FUNCTION[kind] == "train_job"
    name = kind if submission is None else submission.chain or submission.name
    options: list[tuple[str, str | int | None]] = [
        ("job-name", name),
        ("account", site.account),
        ("partition", site.partition),
        ("qos", site.qos),
        ("constraint", site.constraint),
        ("nodes", site.nodes if is_training else 1),
        ("ntasks-per-node", 1),
        ("gpus-per-node", site.gpus_per_node),
        ("cpus-per-task", site.cpus_per_task),
        ("time", site.time),
        ("signal", f"B:USR1@{site.lead_s}" if is_training else None),
        ("open-mode", "append"),
        ("export", ",".join((*EXPORTED, *filter(None, site.export.split(","))))),
    ]
    if submission is not None:
        options.append(("chdir", str(submission.folder)))
        options.append(("output", f"{submission.run_dir}/logs/%j.batch.log".replace("%", "%%").replace("%%j", "%j")))
    is_chain = submission is not None and submission.chain is not None
    flags = ["--no-requeue", "--dependency=singleton"] if is_chain else ["--requeue"]
    given = [f"--{key}={_quoted(value)}" for key, value in options if value is not None]
    return [*given, *flags, *filter(None, [site.sbatch_extra])]  # sbatch reads several options and quotes in one line


def _quoted(value: str | int) -> str:
    """A value for an #SBATCH line, whose quotes are not those of a shell."""
    text = str(value)
    if '"' in text or "\n" in text:
        raise ConfigError(
            f"expected an option of sbatch without quotes and line ends, found {text!r}; choose another name"
        )
    return f'"{text}"' if re.search(r"[\s#']", text) else text


def _submitted_body(kind: Kind, site: Site, submission: Submission) -> str:
    settings = {key: getattr(site, key) for key in SETTINGS}
    assignments = {"repo": submission.repo, "MMSCALE_SITE": submission.site or "/dev/null"}
    if submission.chain is not None:
        assignments["MMSCALE_CHAIN"] = submission.chain
    first = "".join(f"{key}={shlex.quote(str(value))}\n" for key, value in assignments.items())
    later = "".join(
        f"{key.upper()}={shlex.quote(str(value))}\n" for key, value in settings.items() if value is not None
    )
    return (
        f'{first}. "$repo/slurm/lib/job.sh" || exit 1\nread_site\n{later}'
        f"{FUNCTION[kind]} {shlex.join(submission.arguments)}\n"
    )


def fields_of(line: str) -> dict[str, str]:
    """The fields in one line of `scontrol show job --oneliner`; values with blanks are cut at the first.

    Example:
        >>> fields_of("JobId=7 Restarts=0 StartTime=1795292354")["StartTime"]
        '1795292354'
    """
    return {key: value for key, _, value in (word.partition("=") for word in line.split())}


def refuse_other_mode(run_dir: Path, mode: Mode, submission: str, queue: Sequence[str]) -> None:
    """Refuses a run directory that jobs of the other mode are still working on. Raises ConfigError.

    Both would start attempts, each against the other.

    Args:
        queue: `JOB_ID NAME` of each of the user's jobs that wait or run.
    """
    waiting = {word for line in queue for word in line.split(maxsplit=1)}
    for path in sorted((run_dir / ATTEMPTS).glob("*/job.json")):
        job = read_record(path)
        if job.get("mode") == mode or job.get("submission") == submission:
            continue
        if job.get("submission") in waiting:
            what = f"job {job['job']}" if job["mode"] == "requeue" else f"the chain {job['submission']}"
            cancel = (
                f"scancel {job['job']}"
                if job["mode"] == "requeue"
                else f"scancel --name={shlex.quote(job['submission'])}"
            )
            raise ConfigError(
                f"expected {run_dir} to be used in one way, found that {what} (mode {job['mode']}) is still in the queue while "
                f"this is a {mode} job; let it finish, or end it with `{cancel}` and submit again"
            )


def start_attempt(run_dir: Path, steps: int, token: str, mode: Mode, submission: str, lead_s: float, nodes: Sequence[str],
                  told: Sequence[str]) -> str:  # fmt: skip
    """One word and the reason for the batch script: `go`, `done` or `stop`. On `go`, job.json of the attempt is written.

    Args:
        steps: `train.steps`; a run that is done with fewer goes on.
        token: `<job id>.<restart count>`.
        submission: the job id, or the name of the chain.
        nodes: names of the attempt's nodes.
        told: by SLURM: the line of `scontrol show job --oneliner`, times in unix seconds, then the queue as in `refuse_other_mode`.

    Raises:
        ConfigError: jobs of the other mode are working here, or the time limit is shorter than the lead.
        RefusedInputError: the run directory cannot be written.
    """
    done = read_record(run_dir / "DONE").get("step")
    is_outdated = isinstance(done, int) and done < steps
    if (run_dir / "DONE").exists() and not is_outdated:
        return "done the run is finished"
    job_line, *queue = told
    refuse_other_mode(run_dir, mode, submission, queue)
    barrier = read_record(run_dir / DO_NOT_RESTART)
    if barrier.get("submission") == submission:
        reason = " ".join(str(barrier.get("reason")).split())
        return f"stop this run was given up: {reason}; mend it, then remove {run_dir / DO_NOT_RESTART} or submit anew"
    job = fields_of(job_line)
    start, end = _time(job.get("StartTime")), _time(job.get("EndTime"))
    if start is not None and end is not None:
        check_lead(end - start, lead_s, f"job {token.partition('.')[0]}")
    job_id, _, restarts = token.partition(".")
    record = {
        "job": job_id, "restarts": int(restarts), "name": job.get("JobName", ""), "nodes": list(nodes),
        "submitted_at": _time(job.get("SubmitTime")), "eligible_at": _time(job.get("EligibleTime")),
        "started_at": start or time.time(), "ends_at": end, "lead_s": lead_s, "mode": mode, "submission": submission,
    }  # fmt: skip
    try:
        if not _is_known(run_dir, submission):
            # a person has submitted the run again, so what stood against going on has been looked at
            (run_dir / DO_NOT_RESTART).unlink(missing_ok=True)
            (run_dir / "bad_nodes.json").unlink(missing_ok=True)
        (run_dir / "DONE").unlink(missing_ok=True)  # the end of this attempt must not be judged by it
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        write_json(run_dir / ATTEMPTS / token / "job.json", record)
    except OSError as error:
        raise RefusedInputError(
            f"cannot write the run directory {run_dir}: {error.strerror}; make room there or fix the permissions, and submit again"
        ) from error
    return f"go attempt {token} of {mode} {submission}"


def _is_known(run_dir: Path, submission: str) -> bool:
    jobs = (read_record(path) for path in (run_dir / ATTEMPTS).glob("*/job.json"))
    return any(job.get("submission") == submission for job in jobs)


def _time(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None


def _steps_and_folder(config: str, overrides: Sequence[str]) -> str:
    from mmscale.config.load import load_config  # it needs pydantic; the other questions do not

    loaded = load_config(config, overrides)
    return f"{loaded.train.steps} {loaded.run.dir}"


def _render(folder: Path) -> None:
    for kind in get_args(Kind):
        (folder / f"{kind}.sbatch").write_text(script_text(kind, Site()), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers one question of a batch script."""
    parser = argparse.ArgumentParser(prog="python -m mmscale.cluster.batch", description="Questions of batch scripts.")
    questions = parser.add_subparsers(dest="question", required=True)
    run = questions.add_parser("run", help="train.steps and the run directory of a config")
    run.add_argument("config")
    run.add_argument("overrides", nargs="*")
    start = questions.add_parser("start", help="may this attempt go on? the job's line and the queue come on stdin")
    start.add_argument("run", type=Path)
    for name in ("token", "mode", "submission", "nodes"):
        start.add_argument(f"--{name}", required=True)
    start.add_argument("--steps", type=int, required=True)
    start.add_argument("--lead", type=float, required=True)
    questions.add_parser("bad-nodes", help="nodes to avoid").add_argument("run", type=Path)
    questions.add_parser("render", help="write the scripts of slurm/ again").add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    if given.question == "run":
        answer = _steps_and_folder(given.config, given.overrides)
    elif given.question == "start":
        answer = start_attempt(
            given.run, given.steps, given.token, cast(Mode, given.mode), given.submission, given.lead, given.nodes.split(","),
            sys.stdin.read().splitlines(),
        )  # fmt: skip
    elif given.question == "bad-nodes":
        answer = ",".join(sorted(bad_nodes(given.run)))
    else:
        _render(given.folder)
        answer = f"written to {given.folder}"
    sys.stdout.write(answer + "\n")


if __name__ == "__main__":
    try:
        main()
    except MmscaleError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)
