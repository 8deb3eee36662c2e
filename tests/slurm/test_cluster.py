"""The throw-away cluster itself: what the fault tests rely on."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from cluster import Cluster, poll

WAIT = 'sleep "$1" & wait\n'


def test_job_runs_on_two_nodes(cluster: Cluster) -> None:
    job = cluster.submit_text('srun bash -c "echo on $SLURMD_NODENAME \\$SLURMD_NODENAME"\n', options=["-N2"])
    assert job.wait_end() == "COMPLETED"
    assert sorted(job.log.split()[2::3]) == ["fx1", "fx2"]
    assert job.restarts == 0
    assert 0 <= int(job.fields()["StartTime"]) - int(job.fields()["SubmitTime"]) < 30


def test_node_names_do_not_resolve(cluster: Cluster) -> None:
    assert cluster.run("getent", "hosts", "fx1", is_checked=False) == ""


def test_two_clusters_run_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    first = cluster.submit_text(WAIT, "100")
    first.wait_state("RUNNING")
    with Cluster(tmp_path / "fx", num_nodes=1) as other:
        second = other.submit_text(WAIT, "100")
        second.wait_state("RUNNING")
        assert first.id != second.id
        assert str(second.id) not in cluster.run("squeue", "-h", "-o", "%A").split()
        shell = second.children("fx1", "batch")
        assert len(shell) == 1 and not set(shell) & set(cluster.processes("fx1"))
    assert poll(lambda: not psutil.pid_exists(shell[0]), 10)
    assert first.state == "RUNNING"


def test_killed_node_leaves_no_process_and_comes_back(cluster: Cluster) -> None:
    job = cluster.submit_text("srun sleep 100 & wait\n", options=["-N2", "--nodelist=fx1,fx2"])
    job.wait_until(lambda: f"{job.id}.0" in cluster.stepds("fx2"), 20, "step 0 is on fx2")
    job.wait_until(lambda: job.children("fx2", "0"), 20, "a task is on fx2")
    (task,) = job.children("fx2", "0")
    cluster.kill_node("fx2")
    assert cluster.processes("fx2") == []
    assert poll(lambda: not psutil.pid_exists(task), 10)  # a zombie until init takes it
    assert cluster.stepds("fx1") and cluster.stepds("fx3") == {}  # the others are whole
    cluster.restore()
    cluster.assert_clean()


def test_controller_restart_keeps_the_job(cluster: Cluster) -> None:
    job = cluster.submit_text(WAIT, "100")
    job.wait_until(lambda: int(job.fields()["RunTime"].rsplit(":", 1)[1]) > 5, 20, "slurmctld has saved the job")
    cluster.restart_controller()
    job.wait_state("RUNNING")
    assert job.restarts == 0


def test_a_limit_shows_queue_and_logs(cluster: Cluster) -> None:
    job = cluster.submit_text('echo "the job says so"; sleep 100 & wait\n')
    job.wait_log("the job says so")
    with pytest.raises(AssertionError, match=r"(?s)not within 0.6 s.*JOBID.*slurmctld.*the job says so"):
        job.wait_until(lambda: False, 0.2, "never")
