"""The one module that reads environment variables: who this process is, as torchrun or SLURM's srun says it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mmscale.errors import ConfigError
from mmscale.redact import is_secret_name

VARIABLES: dict[str, str] = {
    "RANK": "torchrun: number of this process in the run, from 0.",
    "WORLD_SIZE": "torchrun: processes in the run.",
    "LOCAL_RANK": "torchrun: number of this process on its node; selects the GPU.",
    "LOCAL_WORLD_SIZE": "torchrun: processes on each node, between which links are fast; `parallel.sp: auto` asks for it.",
    "MASTER_ADDR": "Address on which rank 0 can be reached. Under srun it may be set by the job script.",
    "MASTER_PORT": "TCP port of rank 0. Under srun the default is 20000 + SLURM_JOB_ID modulo 10000.",
    "SLURM_PROCID": "srun: number of this task in the job step; used when RANK is not set.",
    "SLURM_STEP_NUM_TASKS": "srun: tasks in the job step. Absent in a plain batch script, which then counts as one process.",
    "SLURM_LOCALID": "srun: number of this task on its node; selects the GPU.",
    "SLURM_STEP_TASKS_PER_NODE": "srun: tasks on each node, such as `8(x4)`; as LOCAL_WORLD_SIZE.",
    "SLURM_LAUNCH_NODE_IPADDR": "srun: address of the node that ran srun, used for rank 0 when MASTER_ADDR is not set.",
    "SLURM_JOB_ID": "SLURM: number of the job, from which the default port is derived.",
    "MMSCALE_ATTEMPT": "Job script: name of this start of the run, `<job id>.<restart count>`; without it one is made up.",
    "MMSCALE_END_TIME": "Job script: unix seconds at which the job is ended; the run saves and stops before.",
    "MMSCALE_LEAD_S": "Job script: seconds before its end at which the job is sent SIGUSR1.",
    "MMSCALE_KILL_WAIT_S": "Job script: seconds from SIGTERM to SIGKILL (SLURM's KillWait).",
    "MMSCALE_AGENT": "`mmscale launch`: its process, and the file descriptors for stacks and heartbeats, for the ranks that it starts.",
    "SLURMD_NODENAME": "SLURM: name of this node, by which a bad one is excluded.",
    "OMP_NUM_THREADS": "`mmscale launch`: CPU threads per process; by default the node's CPUs are divided among its processes.",
    "SLURM_RESTART_COUNT": "SLURM: restarts of the job; `mmscale submit` keeps that of a surrounding job from the new one.",
    "MMSCALE_KERNELS": "Kernels: `auto` = Triton's on GPUs of compute capability 8.0 and more, `triton`, or `torch` = none of them.",
    "MMSCALE_SITE": "`mmscale submit` and job scripts: file with the settings of the cluster, see `slurm/site.env.example`.",
}
"""Every variable that mmscale reads, with its meaning; `docs/` prints this table."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Who this process is. `master_addr` and `master_port` are None for one process without a launcher.

    `ranks_per_node`: processes on one node, the fewest where nodes differ; None = the launcher does not say.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    ranks_per_node: int | None = None


def launch_from_env(env: Mapping[str, str] | None = None) -> Launch:
    """This process's place in the run, from torchrun's variables, else srun's, else one process alone.

    Args:
        env: variables to read; None reads the process's own.

    Raises:
        ConfigError: a variable is missing or is not a number, or the rank is not below the world size.
    """
    variables = os.environ if env is None else env
    if "RANK" in variables:
        launch = _from_names(variables, "RANK", "WORLD_SIZE", "LOCAL_RANK", variables.get("MASTER_ADDR"), None)
        if "LOCAL_WORLD_SIZE" in variables:
            launch = replace(launch, ranks_per_node=_integer(variables, "LOCAL_WORLD_SIZE"))
    elif "SLURM_STEP_NUM_TASKS" in variables and "SLURM_PROCID" in variables:
        address = variables.get("MASTER_ADDR") or variables.get("SLURM_LAUNCH_NODE_IPADDR")
        port = 20000 + _integer(variables, "SLURM_JOB_ID") % 10000
        launch = _from_names(variables, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", address, port)
        launch = replace(launch, ranks_per_node=_tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", "")))
    else:
        return Launch()
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            f"expected 0 <= rank < world size, found rank {launch.rank} of {launch.world_size} in the environment; "
            "unset RANK and WORLD_SIZE, or start with torchrun or srun"
        )
    return launch


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What the job script says about this start; None = it does not say.

    attempt      token of the attempt
    ends_at      unix seconds at which the job is ended
    lead_s       seconds before that at which SIGUSR1 comes
    kill_wait_s  seconds from SIGTERM to SIGKILL
    """

    attempt: str | None = None
    ends_at: float | None = None
    lead_s: float | None = None
    kill_wait_s: float | None = None


def job_limits_from_env(env: Mapping[str, str] | None = None) -> JobLimits:
    """What the job script has set. Raises ConfigError for a number that is none."""
    variables = os.environ if env is None else env
    return JobLimits(
        variables.get("MMSCALE_ATTEMPT") or None,
        _optional_float(variables, "MMSCALE_END_TIME"),
        _optional_float(variables, "MMSCALE_LEAD_S"),
        _optional_float(variables, "MMSCALE_KILL_WAIT_S"),
    )


def _optional_float(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name, "")
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"expected a number of seconds in the environment variable {name}, found {text!r}; unset it or let the job script set it"
        ) from None


def site_file_from_env(env: Mapping[str, str] | None = None) -> str | None:
    """The file with the settings of the cluster that the user names; None = none is named."""
    return (os.environ if env is None else env).get("MMSCALE_SITE") or None


@dataclass(frozen=True, slots=True)
class AgentLink:
    """The agent that started this process, and the file descriptors on which it expects stacks and heartbeats.

    They are memory of the node, so the agent sees its ranks also when the run directory cannot be written.
    """

    pid: int
    stacks_fd: int
    beat_fd: int


def agent_from_env(env: Mapping[str, str] | None = None) -> AgentLink | None:
    """The agent that started this process; None when something else did."""
    numbers = (os.environ if env is None else env).get("MMSCALE_AGENT", "").split(",")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        return None
    return AgentLink(*map(int, numbers))


def node_name_from_env(env: Mapping[str, str] | None = None) -> str | None:
    """This node's name in SLURM; None outside of it."""
    return (os.environ if env is None else env).get("SLURMD_NODENAME") or None


def rank_environment(
    launch: Launch, agent: AgentLink, attempt: str, env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables of a rank that an agent starts: the agent's own, and who the rank is.

    Without OMP_NUM_THREADS every process would take all CPUs of the node, and together they would be slower than one.
    """
    variables = dict(os.environ if env is None else env)
    if launch.ranks_per_node and launch.ranks_per_node > 1:
        threads = len(os.sched_getaffinity(0)) // launch.ranks_per_node
        variables.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    return variables | {
        "RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size), "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.ranks_per_node), "MASTER_ADDR": str(launch.master_addr),
        "MASTER_PORT": str(launch.master_port), "MMSCALE_AGENT": f"{agent.pid},{agent.stacks_fd},{agent.beat_fd}", "MMSCALE_ATTEMPT": attempt,
    }  # fmt: skip


def secrets_from_env(env: Mapping[str, str] | None = None) -> list[str]:
    """The values of all variables whose name says that they are secret, such as HF_TOKEN; a value that is a path is none."""
    variables = os.environ if env is None else env
    return [value for name, value in variables.items() if value and is_secret_name(name) and not os.path.exists(value)]


def environment_for_sbatch(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without the restart count of a surrounding job, which sbatch hands on and a new job takes for its own."""
    variables = os.environ if env is None else env
    return {name: value for name, value in variables.items() if name != "SLURM_RESTART_COUNT"}


def set_env_default(name: str, value: str) -> None:
    """Sets a variable that a library reads at its import, unless the user has set it."""
    os.environ.setdefault(name, value)


def _from_names(
    env: Mapping[str, str], rank: str, world_size: str, local_rank: str, address: str | None, port: int | None
) -> Launch:
    size = _integer(env, world_size)
    if "MASTER_PORT" in env or (port is None and size > 1):
        port = _integer(env, "MASTER_PORT")
    if size > 1 and not address:
        raise ConfigError(
            f"expected MASTER_ADDR in the environment of a run of {size} processes, found none; set it to an address "
            "of rank 0's node that the other nodes can reach, or start with torchrun"
        )
    return Launch(_integer(env, rank), _integer(env, local_rank), size, address, port)


def _tasks_per_node(text: str) -> int | None:
    """The fewest tasks of a node in SLURM's list, such as `8(x3),4`; None for no or another text."""
    counts = [part.partition("(")[0] for part in text.split(",")]
    return min(map(int, counts)) if all(count.isdecimal() for count in counts) else None


def _integer(env: Mapping[str, str], name: str) -> int:
    value = env.get(name)
    if value is None or not value.strip().isdecimal():
        found = "it is not set" if value is None else f"found {value!r}"
        raise ConfigError(
            f"expected a number of at least 0 in the environment variable {name}, {found}; start with torchrun or srun"
        )
    return int(value)
