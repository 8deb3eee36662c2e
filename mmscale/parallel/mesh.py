"""Who talks to whom: the only file that creates process groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mmscale.config.checks import check_parallel, data_parallel_size
from mmscale.config.env import Launch, launch_from_env
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError, ParallelError


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among all others.

    dp_group    the ranks over which gradients are averaged; None on one process without an engine
    host_group  a gloo group of all ranks for small collectives on host memory; None as above
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    dp_group: dist.ProcessGroup | None = None
    host_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes to the run directory."""
        return self.rank == 0

    def close(self) -> None:
        """Ends the process groups; call it last on every rank."""
        if self.dp_group is not None and dist.is_initialized():
            dist.destroy_process_group()


def resolve_engine(parallel: ParallelConfig, world_size: int) -> str:
    """The engine that `parallel.engine` means on `world_size` processes: `single` or `deepspeed`.

    Raises:
        ConfigError: a degree or an engine that this version does not have.
    """
    check_parallel(parallel)
    if parallel.engine == "auto":
        return "deepspeed" if world_size > 1 else "single"
    return parallel.engine


def init_mesh(parallel: ParallelConfig, device: str = "auto", launch: Launch | None = None) -> Mesh:
    """The mesh of this run, with its groups created.

    Args:
        parallel: degrees, engine and timeout.
        device: `auto`, `cpu` or `cuda`.
        launch: who this process is; None asks the environment.

    Raises:
        ConfigError: a degree, engine or device that cannot work here.
        ParallelError: the other ranks cannot be reached.

    Distributed: every rank calls it. One process with the `single` engine makes no group at all.
    """
    launch = launch_from_env() if launch is None else launch
    dp_size = data_parallel_size(parallel, launch.world_size)
    place = _device(device, launch.local_rank)
    if resolve_engine(parallel, launch.world_size) == "single":
        if launch.world_size > 1:
            raise ConfigError(f"expected one process for the engine 'single', found {launch.world_size}")
        return Mesh(0, 1, 0, 1, place)
    _init_world(launch, place, timedelta(seconds=parallel.timeout_s))
    world = dist.group.WORLD
    host = (
        world if place.type == "cpu" else dist.new_group(backend="gloo", timeout=timedelta(seconds=parallel.timeout_s))
    )
    return Mesh(launch.rank, launch.world_size, launch.rank, dp_size, place, world, host)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"expected a GPU for local rank {local_rank}, found {count} on this node; start at most {count} processes "
            "per node or set run.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_world(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    try:
        if launch.world_size == 1:
            store: dist.Store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id)
            return
        address = f"tcp://{launch.master_addr}:{launch.master_port}"
        dist.init_process_group(
            backend, address, rank=launch.rank, world_size=launch.world_size, timeout=timeout, device_id=device_id
        )
    except (dist.DistError, OSError) as error:
        raise ParallelError(
            f"expected {launch.world_size} ranks to meet at {launch.master_addr}:{launch.master_port} within "
            f"{timeout.total_seconds():.0f} s, rank {launch.rank} found: {error}; check MASTER_ADDR, the network between "
            "the nodes, and that every rank has started"
        ) from error
