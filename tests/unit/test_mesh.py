from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig
from mmscale.errors import ConfigError
from mmscale.parallel.comm import barrier, broadcast_object, gather_objects, max_ints, sum_floats, sum_ints
from mmscale.parallel.engines.base import loss_scale
from mmscale.parallel.mesh import Axis, Mesh, init_mesh, resolve_engine


def test_one_process_needs_no_group() -> None:
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    assert (mesh.rank, mesh.world_size, mesh.dp_rank, mesh.dp_size) == (0, 1, 0, 1) and mesh.is_main
    assert mesh.grads.group is None and mesh.host_group is None and not dist.is_initialized()
    assert sum_ints(mesh, [1, 2**40]) == [1, 2**40] and max_ints(mesh, []) == [] and sum_floats(mesh, [0.5]) == [0.5]
    assert gather_objects(mesh, "a") == ["a"] and broadcast_object(mesh, "a") == "a"
    barrier(mesh)
    mesh.close()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"tensor": 3}, "parallel.tensor=3 x .* must divide the 8 processes .*start 6 or 9.*parallel.tensor=2"),
        ({"ulysses": 3, "ring": 2}, "parallel.ulysses=3 x .* = 6 .*parallel.ulysses=2"),
        ({"engine": "fsdp", "zero_stage": 3}, "engine=fsdp .*zero_stage=3"),
        ({"tensor_sequence": True}, "parallel.tensor=1"),
        ({"deepspeed": "nowhere.json"}, "no file nowhere.json"),
    ],
)
def test_impossible_layouts_are_refused_before_any_group_exists(keys, expected) -> None:
    with pytest.raises(ConfigError, match=expected):
        init_mesh(ParallelConfig(**keys), "cpu", Launch(0, 0, 8, "127.0.0.1", 1))
    assert not dist.is_initialized()


def test_engines_by_the_number_of_processes() -> None:
    found = [resolve_engine(ParallelConfig(engine=e), n) for e in ("auto", "deepspeed", "fsdp") for n in (1, 8)]
    assert found == ["single", "deepspeed", "deepspeed", "deepspeed", "fsdp", "fsdp"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 0 on this node"):
        init_mesh(ParallelConfig(), "cuda", Launch())


def test_the_loss_is_scaled_by_ranks_over_targets() -> None:
    assert loss_scale(Mesh(0, 4, 0, 4, torch.device("cpu"), grads=Axis(0, 4)), 10) == 0.4
    with pytest.raises(ValueError, match="found 0"):
        loss_scale(Mesh(0, 4, 0, 4, torch.device("cpu")), 0)
