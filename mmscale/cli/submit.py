"""`mmscale submit`: a run becomes a job of SLURM."""

from __future__ import annotations

import dataclasses

from mmscale.cluster.submit import find_site, plan_job, report, submit
from mmscale.config.env import site_file_from_env


def run(
    config: str,
    overrides: list[str],
    options: dict[str, str | int | None],
    chain: int | None,
    name: str | None,
    site_file: str | None,
    is_dry_run: bool,
) -> None:
    """Writes and submits the job, or prints its text.

    Args:
        options: keys of the site that were given as options; None = not given.
    """
    site, path = find_site(site_file or site_file_from_env())
    site = dataclasses.replace(site, **{key: value for key, value in options.items() if value is not None})  # type: ignore[arg-type]
    plan = plan_job(config, overrides, site, path, chain, name)
    if is_dry_run:
        print(plan.text, end="")
        return
    print(report(plan, submit(plan, chain is not None)))
