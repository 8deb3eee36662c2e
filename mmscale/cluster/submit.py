"""`mmscale submit`: writes the batch script of a run into its run directory and gives it to SLURM."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mmscale
from mmscale.cluster.batch import Submission, refuse_other_mode, script_text
from mmscale.cluster.site import Site, read_site
from mmscale.cluster.times import check_lead, format_time, parse_time
from mmscale.config.checks import check_config
from mmscale.config.env import environment_for_sbatch
from mmscale.config.load import load_config
from mmscale.errors import ConfigError
from mmscale.redact import find_secrets
from mmscale.train.attempt import write_text

_PACKAGE = Path(mmscale.__file__).parent
"""The folder that holds slurm/, in a checkout and in an installation."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A job that is ready to be submitted.

    script     where its text goes
    text       the batch script
    site       the settings it was written with
    num_jobs   1, or the length of the chain
    """

    run_dir: Path
    script: Path
    text: str
    site: Site
    num_jobs: int


def find_site(named: str | None) -> tuple[Site, Path | None]:
    """The settings of the cluster and the file they are from: `named`, else slurm/site.env, else defaults and None."""
    default = _PACKAGE / "slurm" / "site.env"
    if named is None and not default.exists():
        return Site(), None
    path = default if named is None else Path(named).absolute()
    return read_site(path), path


def plan_job(
    config_path: str, overrides: Sequence[str], site: Site, site_file: Path | None, chain: int | None, name: str | None
) -> Plan:
    """The batch script of a run, checked as far as that can be done without its nodes.

    Args:
        site: settings, options of the command line included.
        site_file: read by the job too; None = none.
        chain: number of jobs that follow one another; None = one job that is requeued.
        name: of the job; None = that of the run directory.

    Raises:
        ConfigError: the config is refused, its layout does not fit the processes, or the time limit is shorter than the lead.
    """
    if any(find_secrets(list(overrides))):
        raise ConfigError(
            "expected settings without secrets on the command line, which goes into the batch script, found one in an override; put it "
            "into the config file, or into a variable of your shell that EXPORT in site.env names"
        )
    config = load_config(config_path, overrides)
    num_procs = site.procs_per_node or site.gpus_per_node or 1
    check_config(config, site.nodes * num_procs)
    check_lead(parse_time(site.time) if site.time else None, site.lead_s, f"the time limit {site.time}")
    if site.venv is None and site.container is None and sys.prefix != sys.base_prefix:
        site = dataclasses.replace(site, venv=sys.prefix)
    site = dataclasses.replace(site, procs_per_node=num_procs)
    run_dir = Path(config.run.dir)
    job_name = name or run_dir.name
    submission = Submission(
        arguments=(str(Path(config_path).absolute()), *overrides),
        name=job_name,
        folder=Path.cwd(),
        run_dir=run_dir,
        repo=_PACKAGE,
        chain=f"{job_name}-{int(time.time())}"
        if chain
        else None,  # its own name: singleton waits for jobs of that name
        site=site_file,
    )
    text = script_text("pretrain", site, submission)
    return Plan(run_dir, run_dir / "slurm" / "job.sbatch", text, site, chain or 1)


def submit(plan: Plan, is_chain: bool) -> list[str]:
    """The ids of the submitted jobs. Raises ConfigError when SLURM refuses, or when jobs of the other mode are in the queue."""
    queue = _slurm("squeue", "--me", "--noheader", "--format=%A %j").splitlines()
    refuse_other_mode(plan.run_dir, "chain" if is_chain else "requeue", "", queue)
    try:
        (plan.run_dir / "logs").mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of a log
        plan.script.parent.mkdir(mode=0o700, exist_ok=True)  # an override may be a secret
        write_text(plan.script, plan.text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the run directory {plan.run_dir}: {error.strerror}; set run.dir to a folder you may write"
        ) from error
    return [_slurm("sbatch", "--parsable", str(plan.script)).partition(";")[0] for _ in range(plan.num_jobs)]


def report(plan: Plan, jobs: Sequence[str]) -> str:
    """What a person wants to know after a submission: the jobs, and where to look."""
    site, run = plan.site, plan.run_dir
    limit = format_time(parse_time(site.time)) if site.time else "that of the partition"
    width = "nodes" if site.nodes > 1 else "node"
    lines = [
        f"submitted {'job' if len(jobs) == 1 else f'a chain of {len(jobs)} jobs'} {' '.join(jobs)}: {site.nodes} {width} x "
        f"{site.procs_per_node} processes, time limit {limit}, saved {site.lead_s} s before it",
        f"script   {plan.script}",
        f"logs     {run}/logs/<job>.<restart>.node<k>.log, of the batch script <job>.batch.log",
        f"metrics  {run}/metrics.jsonl",
        f"status   mmscale status {run}",
        f"cancel   scancel {' '.join(jobs)}",
    ]
    return "\n".join(lines)


def _slurm(*command: str) -> str:
    """What a command of SLURM prints."""
    try:
        done = subprocess.run(command, env=environment_for_sbatch(), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            f"expected the command {command[0]} on this machine, found none; run this on a login node of the cluster"
        ) from error
    if done.returncode != 0:
        raise ConfigError(
            f"expected SLURM to take `{' '.join(command)}`, found: {done.stderr.strip() or done.stdout.strip()}; correct the "
            "options or site.env"
        )
    return done.stdout.strip()
