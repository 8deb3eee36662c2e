from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster, why_not_here
from judge import History
from runs import STEPS, Run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fault takes minutes where the machine is busy with something else."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, fx1 to fx3, started at the first use; tests take `cluster`."""
    reason = why_not_here()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"tests on SLURM must run in CI: {reason}")
    if reason:
        pytest.skip(f"no SLURM cluster on this machine: {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm") / "fx", num_nodes=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster with all nodes idle and an empty queue; what the test leaves is cleaned up after it."""
    session_cluster.assert_clean()
    yield session_cluster
    session_cluster.restore()


@pytest.fixture(scope="session")
def reference(session_cluster: Cluster, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> History:
    """The history of the run that nothing happened to: two nodes with one rank each."""
    run = Run(session_cluster, tmp_path_factory.mktemp("reference"), demo_data)
    run.wait_done(run.sbatch())
    found = run.history
    assert sorted(found.ids) == sorted(found.losses) == list(range(1, STEPS + 1))
    assert len(run.attempts) == 1
    return found
