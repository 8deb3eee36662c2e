"""Who talks to whom: the only file that creates process groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from mmscale.config.checks import check_parallel, data_parallel_size
from mmscale.config.env import Launch, launch_from_env
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError, ParallelError
from mmscale.parallel.megatron import make_grid
from mmscale.parallel.meter import CommMeter


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the grid: this rank's place in its group. `group` is None when there is no one to talk to."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None


ALONE = Axis()


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process's place among all others.

    `rank = tensor.rank + tensor.size * (sequence.rank + sequence.size * dp_rank)`: the order tensor - context - data of
    megatron-core. A sequence rank is `ulysses.rank + ulysses.size * ring.rank`, so Ulysses groups are neighbours.

    dp_rank, dp_size  ranks that see different packs
    tensor            ranks that hold parts of the same weights
    sequence          ranks that hold parts of the same packs: `ulysses` inside, `ring` (or exchange) outside
    replica           all ranks that work on the same packs, tensor x sequence; a gloo group on host memory
    grads             data x sequence ranks in one flat group: gradients are averaged over it, engines shard over it
    host_group        a gloo group of all ranks for small collectives on host memory; None on one process without an engine
    meter             what this rank sends
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    tensor: Axis = ALONE
    sequence: Axis = ALONE
    ulysses: Axis = ALONE
    ring: Axis = ALONE
    replica: Axis = ALONE
    grads: Axis = ALONE
    meter: CommMeter = field(default_factory=CommMeter)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone writes to the run directory."""
        return self.rank == 0

    @property
    def speaks_for_replica(self) -> bool:
        """True on one tensor-parallel rank of each part of a pack: sums over all ranks count its loss once."""
        return self.tensor.rank == 0

    def close(self) -> None:
        """Ends the process groups; call it last on every rank."""
        if self.host_group is not None and dist.is_initialized():
            dist.destroy_process_group()


def resolve_engine(parallel: ParallelConfig, world_size: int) -> str:
    """The engine that `parallel.engine` means on `world_size` processes: `single`, `deepspeed` or `fsdp`.

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
    data_parallel_size(parallel, launch.world_size)
    place = _device(device, launch.local_rank)
    if resolve_engine(parallel, launch.world_size) == "single":
        if launch.world_size > 1:
            raise ConfigError(f"expected one process for the engine 'single', found {launch.world_size}")
        return Mesh(0, 1, 0, 1, place)
    _init_world(launch, place, timedelta(seconds=parallel.timeout_s))
    return make_mesh(parallel, place)


def make_mesh(parallel: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh over a world whose default group exists already.

    Distributed: every rank calls it with the same degrees; it creates groups.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    timeout = timedelta(seconds=parallel.timeout_s)
    world = dist.group.WORLD
    host = world if device.type == "cpu" else dist.new_group(backend="gloo", timeout=timeout)
    dp_size = data_parallel_size(parallel, world_size)
    sp_size = parallel.ulysses * parallel.ring
    replica_size = parallel.tensor * sp_size
    if replica_size == 1:
        return Mesh(rank, world_size, rank, dp_size, device, host, grads=_axis(world))
    grid = make_grid(parallel.tensor, sp_size, parallel.timeout_s)
    sequence = _axis(grid.context)
    ulysses, ring = _sequence_axes(parallel, world_size, timeout)
    replicas = [list(range(first, first + replica_size)) for first in range(0, world_size, replica_size)]
    mesh = Mesh(
        rank, world_size, rank // replica_size, dp_size, device, host, _axis(grid.tensor), sequence, ulysses, ring,
        replica=_axis(_new_group(replicas, timeout, "gloo")), grads=_axis(grid.data_context),
    )  # fmt: skip
    assert mesh.tensor.rank == rank % parallel.tensor, "megatron-core orders tensor ranks first"
    assert sequence.rank == ulysses.rank + ulysses.size * ring.rank == rank // parallel.tensor % sp_size
    return mesh


def _axis(group: dist.ProcessGroup | None) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)


def _sequence_axes(parallel: ParallelConfig, world_size: int, timeout: timedelta) -> tuple[Axis, Axis]:
    """The Ulysses and the outer groups inside each context group."""
    tensor, inner, outer = parallel.tensor, parallel.ulysses, parallel.ring
    block = tensor * inner * outer
    starts = [base + t for base in range(0, world_size, block) for t in range(tensor)]
    near = [[s + tensor * (u + inner * r) for u in range(inner)] for s in starts for r in range(outer)]
    far = [[s + tensor * (u + inner * r) for r in range(outer)] for s in starts for u in range(inner)]
    axes = [_axis(_new_group(ranks, timeout)) if size > 1 else ALONE for ranks, size in ((near, inner), (far, outer))]
    return axes[0], axes[1]


def _new_group(members: list[list[int]], timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """The one of some disjoint groups that holds this rank; every rank helps to create all of them."""
    own, rank = None, dist.get_rank()
    for ranks in members:
        group = dist.new_group(ranks, timeout=timeout, backend=backend)
        own = group if rank in ranks else own
    assert own is not None, "the groups cover all ranks"
    return own


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
