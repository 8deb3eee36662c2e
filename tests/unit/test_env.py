from __future__ import annotations

import re
from pathlib import Path

import pytest

import mmscale.config.env as env_module
from mmscale.config.env import VARIABLES, AgentLink, Launch, agent_from_env, launch_from_env, rank_environment
from mmscale.errors import ConfigError
from mmscale.kernels import dispatch

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    "SLURM_JOB_ID": "123456",
}


def test_no_launcher_is_one_process() -> None:
    assert launch_from_env({}) == Launch(0, 0, 1, None, None)


def test_torchrun() -> None:
    assert launch_from_env(TORCHRUN) == Launch(3, 1, 4, "10.0.0.1", 29500)
    assert launch_from_env({**SRUN, **TORCHRUN}) == Launch(3, 1, 4, "10.0.0.1", 29500)


def test_srun_with_and_without_an_address_of_the_job_script() -> None:
    assert launch_from_env(SRUN) == Launch(3, 1, 4, "10.0.0.9", 23456)
    assert launch_from_env({**SRUN, "MASTER_ADDR": "n1", "MASTER_PORT": "7"}) == Launch(3, 1, 4, "n1", 7)


def test_processes_per_node_are_those_of_the_launcher() -> None:
    """The fewest where nodes differ; nothing where the launcher says nothing."""
    assert launch_from_env({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}).ranks_per_node == 2
    for text, count in (("8(x4)", 8), ("8(x2),4", 4), ("4", 4), ("", None)):
        assert launch_from_env({**SRUN, "SLURM_STEP_TASKS_PER_NODE": text}).ranks_per_node == count


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert launch_from_env(batch) == Launch()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE, it is not set"),
        ({"RANK": "-1"}, "RANK, found '-1'"),
        ({"RANK": "4"}, "found rank 4 of 4"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK, found 'x'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": None}, "MASTER_PORT"),
    ],
)
def test_a_broken_environment_is_named(change, text) -> None:
    env = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=re.escape(text)):
        launch_from_env(env)


def test_every_variable_that_is_read_is_in_the_table() -> None:
    source = Path(env_module.__file__).read_text()
    table, code = source.split('"""Every variable')
    read = set(re.findall(r'"([A-Z][A-Z_]+)"', code))
    read.add(dispatch.VARIABLE)  # kernels import nothing of mmscale: they read it themselves
    assert read == set(VARIABLES), read ^ set(VARIABLES)


def test_a_rank_reads_what_its_agent_gave_it() -> None:
    launch, agent = Launch(3, 1, 4, "10.0.0.1", 29500, 2), AgentLink(71, 5, 6)
    env = rank_environment(launch, agent, "9.1", {"SLURM_PROCID": "1", "OMP_NUM_THREADS": "3", "HOME": "/h"})
    assert (launch_from_env(env), agent_from_env(env)) == (launch, agent)
    assert (env["MMSCALE_ATTEMPT"], env["OMP_NUM_THREADS"], env["HOME"]) == ("9.1", "3", "/h")
    assert int(rank_environment(launch, agent, "9.1", {})["OMP_NUM_THREADS"]) >= 1
    alone = rank_environment(Launch(0, 0, 1, "127.0.0.1", 1, 1), agent, "9.1", {})
    assert "OMP_NUM_THREADS" not in alone, "one process may take all CPUs"
    assert agent_from_env({}) is None
