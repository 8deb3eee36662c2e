"""Connectors that downsample under engines that shard their weights: training on two processes equals plain torch on one.

Both implementations of their first step run: it reads its parameters inside its own module, where such engines gather them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from tiny_multimodal import tiny_config, tiny_model, tiny_pack

from mmscale.config.schema import Config, ParallelConfig
from mmscale.parallel.apply import make_engine
from mmscale.parallel.comm import sum_floats
from mmscale.parallel.mesh import Mesh
from mmscale.train.optim import build_optimizer, param_groups

STEPS, KINDS = 2, ("mixed", "text")
"""One pack per process: the second has no images, and still takes part in gathering the connector."""
ENGINES = {
    "zero3": {"engine": "deepspeed", "zero_stage": 3, "zero_keep_whole": 0},
    "fsdp": {"engine": "fsdp"},
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
CASES = [
    pytest.param("mlp_downsample", "zero3", "triton", marks=needs_triton),
    pytest.param("mlp_downsample", "fsdp", "triton", marks=needs_triton),
    ("mlp_downsample", "zero3", "torch"),
    ("mlp_downsample_3x3", "fsdp", "torch"),
    ("patch_merger", "zero3", "torch"),
    ("pixel_shuffle", "fsdp", "torch"),
]


def config_of(connector: str) -> Config:
    """Images of 3 x 3 patches: an odd grid, folded into 4 rows or 1."""
    raw = tiny_config("qwen2", optimizer="sgd", lr=0.1, clip=0.0, global_batch=len(KINDS)).model_dump()
    raw["model"]["vision"] |= {"connector": connector}
    raw["model"]["vision"]["config"] |= {"image_size": 42}
    return Config.model_validate(raw)


def packs_of(specs: Any, step: int, seed: int) -> list[Any]:
    return [tiny_pack(specs, 100 * seed + 10 * step + i, kind) for i, kind in enumerate(KINDS)]


def train_sharded(mesh: Mesh, connector: str, engine: str, kernels: str, seed: int) -> Any:
    """Runs on every rank: (loss, gradient norm) of each step."""
    before = os.environ.get("MMSCALE_KERNELS")
    os.environ["MMSCALE_KERNELS"] = kernels
    try:
        config = config_of(connector)
        model, specs = tiny_model(config)
        groups = param_groups(model, config.train)
        parallel = ParallelConfig(**ENGINES[engine])
        built = make_engine(model, build_optimizer(groups, config.train), parallel, config.train, mesh)
        results = []
        for step in range(STEPS):
            packs = packs_of(specs, step, seed)
            num_targets = sum(pack.num_targets for pack in packs)
            local = built.forward_backward([packs[mesh.dp_rank]], num_targets)
            result = built.step([config.train.lr] * len(groups))
            results.append((sum_floats(mesh, [local])[0] / num_targets, result.grad_norm))
        built.close()
        return results
    finally:
        os.environ.pop("MMSCALE_KERNELS") if before is None else os.environ.update(MMSCALE_KERNELS=before)


def train_alone(connector: str, seed: int) -> Any:
    """The same in float64 on one process."""
    config = config_of(connector)
    model, specs = tiny_model(config, torch.float64)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(param_groups(model, config.train), config.train)
    results = []
    for step in range(STEPS):
        packs = packs_of(specs, step, seed)
        loss = sum(model(pack) for pack in packs) / sum(pack.num_targets for pack in packs)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize(("connector", "engine", "kernels"), CASES)
def test_sharded_connectors_train_as_whole_ones(ranks, connector, engine, kernels, seed) -> None:
    seed %= 1000
    want = train_alone(connector, seed)
    first, second = ranks(2).run(train_sharded, connector, engine, kernels, seed)
    assert first == second
    pairs = [pair for got, exact in zip(first, want, strict=True) for pair in zip(got, exact, strict=True)]
    assert max(abs(got - exact) / exact for got, exact in pairs) <= 3e-6, pairs
