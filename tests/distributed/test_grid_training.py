"""Five steps on every grid with every engine equal five steps of plain torch in float64 on one process.

Losses, gradient norms and all weights; SGD as well as AdamW, clipping off and on, because AdamW and clipping hide a wrong scale.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from grids import grid
from tiny_multimodal import tiny_config, tiny_model, tiny_pack

from mmscale.config.cost import pack_cost
from mmscale.config.schema import ParallelConfig
from mmscale.parallel.apply import make_engine
from mmscale.parallel.comm import sum_floats
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.sp.media import tower_inputs
from mmscale.parallel.sp.split import bind, divide, split
from mmscale.parallel.tensor.shard import shard_tensor
from mmscale.train.optim import build_optimizer, param_groups

STEPS, PACKS = 5, 4
KINDS = ("mixed", "text", "blind", "mixed")
"""The packs of a global batch: with four data ranks one has no media and one hardly any target."""
# AdamW turns the rounding noise of a gradient near zero into a step of noise * lr / eps, hence the large eps; see tiny_run.py.
TRAIN = {"sgd": {"lr": 0.1}, "adamw": {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}}
CLIP = 0.5
NUM_GROUPS = 10  # with and without weight decay, of five parts
ENGINES = {"zero1": ("deepspeed", 1), "zero2": ("deepspeed", 2), "zero3": ("deepspeed", 3), "fsdp": ("fsdp", 1)}


def config_of(optimizer: str, clip: float) -> Any:
    return tiny_config("qwen2", optimizer=optimizer, clip=clip, global_batch=PACKS, **TRAIN[optimizer])


def packs_of(specs: Any, step: int, seed: int) -> list[Any]:
    return [tiny_pack(specs, 1000 * seed + 10 * step + i, kind) for i, kind in enumerate(KINDS)]


def open_engine(
    mesh: Mesh, layout: tuple[int, int, int], engine: str, config: Any, resume: Any = None
) -> tuple[Engine, Mesh, Any, Any]:
    """An engine over the tiny model on a grid of the pool, with its media specs and what their inputs cost."""
    m = grid(mesh, *layout)
    kind, stage = ENGINES[engine]
    names = dict(zip(("tensor", "ulysses", "ring"), layout, strict=True))
    keep_whole = {"zero_keep_whole": 0} if stage == 3 else {}
    parallel = ParallelConfig(engine=kind, zero_stage=stage, **names, **keep_whole)
    model, specs = tiny_model(config)
    layouts = shard_tensor(model, m, parallel) if layout[0] > 1 else {}
    optimizer = build_optimizer(param_groups(model, config.train), config.train)
    built = make_engine(model, optimizer, parallel, config.train, m, resume=resume, layouts=layouts)
    return built, m, specs, tower_inputs(specs, pack_cost(config.model, specs, vocab_size=128))


def train_steps(engine: Engine, m: Mesh, specs: Any, towers: Any, train: Any, steps: range, seed: int) -> Any:
    """(loss, gradient norm) of each step over the global batch."""
    results = []
    for step in steps:
        packs = packs_of(specs, step, seed)
        num_targets = sum(pack.num_targets for pack in packs)
        own = packs[m.dp_rank * PACKS // m.dp_size : (m.dp_rank + 1) * PACKS // m.dp_size]
        u, r = m.ulysses.size, m.ring.size
        planned = [replace(p, spans=divide(p.lengths, u, r, "planned")) for p in own]
        batches = [bind(split(p, u, r, towers)[m.sequence.rank], m, "exchange", "auto") for p in planned]
        local = engine.forward_backward(batches, num_targets)
        result = engine.step([train.lr] * NUM_GROUPS)
        assert not result.skipped
        total = sum_floats(m, [local if m.speaks_for_replica else 0.0])[0]
        results.append((total / num_targets, result.grad_norm))
    return results


def run(mesh: Mesh, layout: Any, cases: Any, seed: int) -> Any:
    """Several engines and optimizers on one grid in one launch: (losses and norms, this rank's chunks of the weights)."""
    results = []
    for engine_name, optimizer, clip in cases:
        config = config_of(optimizer, clip)
        engine, m, specs, towers = open_engine(mesh, layout, engine_name, config)
        losses = train_steps(engine, m, specs, towers, config.train, range(STEPS), seed)
        weights = [(n, replace(c, value=c.value.clone())) for n, c in engine.state_views() if n.startswith("model.")]
        engine.close()
        results.append((losses, weights))
    return results


@lru_cache(maxsize=8)
def plain_run(optimizer: str, clip: float, seed: int) -> Any:
    """The same in plain torch, float64, one process."""
    config = config_of(optimizer, clip)
    model, specs = tiny_model(config, torch.float64)
    groups = param_groups(model, config.train)
    chosen = build_optimizer(groups, config.train)
    params = [p for group in groups for p in group.params]
    results = []
    for step in range(STEPS):
        packs = packs_of(specs, step, seed)
        loss = sum(model(pack) for pack in packs) / sum(pack.num_targets for pack in packs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, clip or math.inf)
        chosen.step()
        chosen.zero_grad()
        results.append((loss.item(), norm.item()))
    return results, {f"model.{name}": param.detach() for name, param in model.named_parameters()}


def assembled(shares: list[list[tuple[str, Chunk]]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the chunks of all ranks, each element exactly once."""
    wholes: dict[str, torch.Tensor] = {}
    for name, chunk in (pair for share in shares for pair in share):
        whole = wholes.setdefault(name, torch.full(chunk.whole, torch.nan))
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.value.shape, strict=True))
        assert whole[place].isnan().all(), f"{name}: written twice"
        whole[place] = chunk.value
    assert not any(whole.isnan().any() for whole in wholes.values())
    return wholes


ALL = [("zero1", "sgd", 0.0), ("zero1", "adamw", CLIP), ("zero2", "sgd", CLIP), ("zero3", "adamw", 0.0), ("fsdp", "sgd", 0.0),
       ("fsdp", "adamw", CLIP)]  # fmt: skip
FEW = [("zero1", "adamw", CLIP), ("zero2", "sgd", CLIP), ("zero3", "sgd", 0.0), ("fsdp", "adamw", 0.0)]
GRIDS = [
    (2, (2, 1, 1), FEW),
    (2, (1, 2, 1), FEW),
    (4, (2, 2, 1), ALL),
    (4, (2, 1, 1), FEW),
    (4, (1, 2, 1), FEW),
    (4, (1, 2, 2), ALL),
    (8, (2, 2, 1), FEW),
]
"""Processes, (tensor, ulysses, ring), cases: tp2; sp2; tp2 x sp2; tp2 x dp2; sp2 x dp2; ulysses2 x ring2; tp2 x sp2 x dp2."""


@pytest.mark.parametrize(
    ("world", "layout", "cases"), GRIDS, ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else ""
)
def test_training_on_a_grid_equals_plain_torch(ranks, world, layout, cases, seed) -> None:
    seed %= 1000
    by_rank = ranks(world).run(run, layout, cases, seed)
    for i, (engine, optimizer, clip) in enumerate(cases):
        case = (engine, optimizer, clip)
        want, weights = plain_run(optimizer, clip, seed)
        got = by_rank[0][i][0]
        assert all(result[i][0] == got for result in by_rank), (case, "ranks disagree")
        losses = max(abs(a[0] - b[0]) / b[0] for a, b in zip(got, want, strict=True))
        norms = max(abs(a[1] - b[1]) / b[1] for a, b in zip(got, want, strict=True))
        found = assembled([result[i][1] for result in by_rank])
        assert found.keys() == weights.keys()
        errors = {n: ((found[n].double() - w).norm() / w.norm().clamp_min(1.0)).item() for n, w in weights.items()}
        worst = max(errors, key=errors.__getitem__)
        assert losses <= 1e-6 and norms <= 3e-6 and errors[worst] <= 3e-6, (case, losses, norms, worst, errors[worst])


def test_clipping_really_clips(seed) -> None:
    norms = [norm for _, norm in plain_run("sgd", CLIP, seed % 1000)[0]]
    assert min(norms) > CLIP, norms
