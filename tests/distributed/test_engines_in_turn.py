"""Several engines one after the other in the same processes: none inherits anything from the one before it.

A rollback closes the engine of a run and builds the next one from a checkpoint, with no new process in between.
"""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grids import grid
from tiny_run import FSDP, Memory, build, train_config, train_steps, whole_state

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig
from mmscale.parallel.comm import broadcast_object
from mmscale.parallel.mesh import Mesh, init_mesh

STEPS, CLIP = 4, 0.2


def run_engine(mesh: Mesh, stage: int, seed: int, **settings: Any) -> Any:
    """(loss, gradient norm) of some steps with a fresh engine, which is closed again."""
    train = train_config("adamw", CLIP)
    engine = build(mesh, stage, train, seed, **settings)
    losses = train_steps(engine, mesh, train, range(STEPS), 2, seed)
    engine.close()
    return losses


def after_zero_plus_plus(mesh: Mesh, paths: list[str], seed: int) -> Any:
    """Losses of engines with a second partition, each followed by ZeRO-3 with tensor ranks; and how many groups that left."""
    defaults = ParallelConfig()
    settings = {"zero_stage": defaults.zero_stage, "zero_keep_whole": defaults.zero_keep_whole}
    runs, num_groups = [], []
    for path in paths:
        num_groups.append(len(dist.distributed_c10d._world.pg_map))
        runs.append(run_engine(grid(mesh), 3, seed, deepspeed=path, **settings))
        runs.append(run_engine(grid(mesh, tensor=2), 3, seed))
    return runs, num_groups


def test_a_second_partition_ends_with_its_engine(ranks, tmp_path, seed) -> None:
    """The groups of ZeRO++ are one of deepspeed's globals, which the next engine would take as its own."""
    paths = []
    for size in (2, 4, 2, 2):
        zero = {"stage": 3, "zero_hpz_partition_size": size, "stage3_param_persistence_threshold": 0}
        paths.append(tmp_path / f"hpz{size}.json")
        paths[-1].write_text(json.dumps({"zero_optimization": zero}))
    want = run_engine(init_mesh(ParallelConfig(), "cpu", Launch()), 0, seed)
    for runs, num_groups in ranks(4).run(after_zero_plus_plus, [str(path) for path in paths], seed):
        for losses in runs:
            assert torch.allclose(torch.tensor(losses), torch.tensor(want), rtol=1e-6, atol=0), (losses, want)
        assert num_groups[1] == num_groups[2] == num_groups[3], "groups of closed engines are given back"


def reopened(mesh: Mesh, degrees: dict[str, int], stage: int, dtype: str, seed: int) -> Any:
    """Losses of steps 2 and 3: straight on, and twice again from the state before them, each time with the next engine."""
    mesh, train = grid(mesh, **degrees), train_config("adamw", CLIP, dtype)
    engine = build(mesh, stage, train, seed)
    train_steps(engine, mesh, train, range(2), 2, seed)
    state = broadcast_object(mesh, whole_state(engine, mesh))
    runs = [train_steps(engine, mesh, train, range(2, STEPS), 2, seed)]
    for turn in (1, 2):
        engine.close()
        engine = build(mesh, stage, train, seed + turn, Memory(state))
        runs.append(train_steps(engine, mesh, train, range(2, STEPS), 2, seed))
    engine.close()
    return [[tuple(map(float.hex, pair)) for pair in losses] for losses in runs]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("degrees", [{}, {"tensor": 2}, {"ulysses": 2}], ids=["dp2", "tp2", "sp2"])
@pytest.mark.parametrize("stage", [1, 2, 3, FSDP])
def test_the_next_engine_repeats_the_steps_bit_by_bit(ranks, stage, degrees, dtype, seed) -> None:
    for straight, *again in ranks(2).run(reopened, degrees, stage, dtype, seed % 1000):
        assert again == [straight, straight]
        assert len(set(straight)) == len(straight), "negative control: the steps differ"


def left_after_closing(mesh: Mesh, stage: int, seed: int) -> tuple[int, int]:
    """Tensors of an engine before it is closed and after: weights, masters and moments."""
    engine = build(mesh, stage, train := train_config("adamw", CLIP), seed)
    train_steps(engine, mesh, train, range(2), 2, seed)
    optimizer = engine._spec.optimizer  # type: ignore[attr-defined]
    tensors = [*engine._spec.model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]  # type: ignore[attr-defined]
    tensors += [moment for moments in optimizer.state.values() for moment in moments.values()]
    refs = [weakref.ref(tensor) for tensor in tensors]
    engine.close()
    del engine, optimizer, tensors
    gc.collect()
    return len(refs), sum(ref() is not None for ref in refs)


@pytest.mark.parametrize("stage", [1, 2, 3, FSDP])
def test_a_closed_engine_gives_its_memory_back(ranks, stage, seed) -> None:
    """Two engines at once, of a run that is rolled back, would not fit a GPU."""
    for before, after in ranks(2).run(left_after_closing, stage, seed % 1000):
        assert before > 20 and after == 0, (before, after)
