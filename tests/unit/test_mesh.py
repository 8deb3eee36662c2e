from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError
from mmscale.parallel.comm import barrier, broadcast_object, gather_objects, max_ints, sum_floats, sum_ints
from mmscale.parallel.engines.base import loss_scale
from mmscale.parallel.mesh import Mesh, init_mesh


def test_one_process_needs_no_group() -> None:
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    assert (mesh.rank, mesh.world_size, mesh.dp_rank, mesh.dp_size) == (0, 1, 0, 1) and mesh.is_main
    assert mesh.dp_group is None and mesh.host_group is None and not dist.is_initialized()
    assert sum_ints(mesh, [1, 2**40]) == [1, 2**40] and max_ints(mesh, []) == [] and sum_floats(mesh, [0.5]) == [0.5]
    assert gather_objects(mesh, "a") == ["a"] and broadcast_object(mesh, "a") == "a"
    barrier(mesh)
    mesh.close()


@pytest.mark.parametrize("keys", [{"tensor": 2}, {"ulysses": 2}, {"ring": 4}, {"engine": "fsdp"}])
def test_what_does_not_exist_yet_is_refused_by_key(keys) -> None:
    (key,) = keys
    with pytest.raises(ConfigError, match=re.escape(f"parallel.{key}")):
        init_mesh(ParallelConfig(**keys), "cpu", Launch(0, 0, 8, "127.0.0.1", 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 0 on this node"):
        init_mesh(ParallelConfig(), "cuda", Launch())


def test_the_loss_is_scaled_by_ranks_over_targets() -> None:
    assert loss_scale(Mesh(0, 4, 0, 4, torch.device("cpu")), 10) == 0.4
    with pytest.raises(ValueError, match="found 0"):
        loss_scale(Mesh(0, 4, 0, 4, torch.device("cpu")), 0)
