"""What `mmscale status` learns from the real squeue."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import Cluster

from mmscale.cluster.summary import QueuedJob, jobs_of
from mmscale.train.history import read_history


def test_the_jobs_of_a_run_are_found_by_their_script(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "run" / "slurm" / "job.sbatch"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/bash\n#SBATCH --output=/dev/null\nsleep 100 & wait\n")
    cluster.submit_text("sleep 100 & wait\n")
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    history = read_history(tmp_path / "run")
    held = cluster.run("sbatch", "--parsable", "--hold", str(script)).strip()
    assert jobs_of(history.folder, history.attempts) == (QueuedJob(held, "PENDING", "JobHeldUser"),)
    running = cluster.run("sbatch", "--parsable", str(script), "an argument").strip()
    assert {job.job for job in jobs_of(history.folder, history.attempts)} == {held, running}
