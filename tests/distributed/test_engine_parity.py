"""1, 2 and 4 ranks, ZeRO-1, 2, 3 and FSDP2, with and without accumulation, train like one plain torch process.

SGD as well as AdamW, clipping off and on: AdamW and clipping hide a wrong scale of the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_run import FSDP, LR, Batch, TinyModel, build, documents, micro_batches, train_config, train_steps, whole_state

from mmscale.config.env import Launch
from mmscale.config.schema import ParallelConfig
from mmscale.parallel.mesh import Mesh, init_mesh

STEPS = 4
CLIP = 0.2


def plain_run(optimizer: str, clip: float, seed: int) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """The same training in plain torch: the whole batch at once, mean over its targets, no mmscale engine."""
    train = train_config(optimizer, clip)
    torch.manual_seed(seed)
    model = TinyModel()
    model.tower.requires_grad_(False)
    lr, decay = LR[optimizer], train.weight_decay if optimizer == "adamw" else 0.0
    matrices = [p for n, p in model.layer.named_parameters() if n in ("1.weight", "3.weight")]
    vectors = [p for p in model.layer.parameters() if p.dim() == 1]
    groups = [
        {"params": [model.connector.weight], "lr": lr / 2, "weight_decay": decay},
        {"params": [model.connector.bias], "lr": lr / 2, "weight_decay": 0.0},
        {"params": matrices, "lr": lr, "weight_decay": decay},
        {"params": [model.embed.weight, *vectors], "lr": lr, "weight_decay": 0.0},
    ]
    chosen: Any = (
        torch.optim.SGD(groups) if optimizer == "sgd" else torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for step in range(STEPS):
        batch = documents(step, seed)
        loss = model(batch) / (batch.labels != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
        chosen.step()
        chosen.zero_grad()
        results.append((loss.item(), norm.item()))
    return results, {f"model.{name}": param.detach() for name, param in model.named_parameters()}


def engine_run(
    mesh: Mesh, stage: int, optimizer: str, clip: float, accumulation: int, seed: int, wrong: float = 1.0
) -> Any:
    train = train_config(optimizer, clip)
    engine = build(mesh, stage, train, seed)
    losses = train_steps(engine, mesh, train, range(STEPS), accumulation, seed, wrong)
    state = whole_state(engine, mesh)
    engine.close()
    return losses, state


def differences(runs: list[Any], optimizer: str, clip: float, seed: int) -> tuple[float, float, float]:
    """Largest relative difference of losses and norms and largest difference of weights from the plain run."""
    want, weights = plain_run(optimizer, clip, seed)
    state = {name: value for _, share in runs for name, value in share.items()}
    assert sum(len(share) for _, share in runs) == len(state), "a tensor came from two ranks"
    for losses, _ in runs:
        assert losses == runs[0][0], "ranks disagree"
    got = runs[0][0]
    assert all(math.isfinite(value) for pair in got for value in pair)
    loss = max(abs(a[0] - b[0]) / b[0] for a, b in zip(got, want, strict=True))
    norm = max(abs(a[1] - b[1]) / b[1] for a, b in zip(got, want, strict=True))
    return loss, norm, max((state[name] - value).abs().max().item() for name, value in weights.items())


@pytest.mark.parametrize("stage", [1, 2, 3, FSDP])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("optimizer", "clip", "accumulation"), [("sgd", 0.0, 4), ("sgd", CLIP, 1), ("adamw", 0.0, 1), ("adamw", CLIP, 4)]
)
def test_engine_equals_plain_torch(ranks, stage, world_size, optimizer, clip, accumulation, seed) -> None:
    runs = ranks(world_size).run(engine_run, stage, optimizer, clip, accumulation, seed)
    loss, norm, weight = differences(runs, optimizer, clip, seed)
    assert loss <= 1e-5 and norm <= 1e-5 and weight <= 1e-5, (loss, norm, weight)


@pytest.mark.parametrize(("optimizer", "clip", "accumulation"), [("sgd", 0.0, 4), ("adamw", CLIP, 2), ("sgd", 1e3, 1)])
def test_single_engine_equals_plain_torch(optimizer, clip, accumulation, seed) -> None:
    mesh = init_mesh(ParallelConfig(), "cpu", Launch())
    runs = [engine_run(mesh, 0, optimizer, clip, accumulation, seed)]
    loss, norm, weight = differences(runs, optimizer, clip, seed)
    assert loss <= 1e-5 and norm <= 1e-5 and weight <= 1e-5, (loss, norm, weight)


def test_a_wrong_scale_is_detected(ranks, seed) -> None:
    runs = ranks(2).run(engine_run, 2, "sgd", 0.0, 1, seed, 2.0)
    loss, norm, weight = differences(runs, "sgd", 0.0, seed)
    assert norm > 0.1 and weight > 1e-3, (loss, norm, weight)


def group_timeouts(mesh: Mesh, seed: int) -> list[float]:
    """Seconds that the group waits over which ZeRO averages, by `parallel.timeout_s`."""
    from deepspeed.utils import groups

    seconds = []
    for timeout_s in (77, 60):
        engine = build(mesh, 1, train_config(), seed, timeout_s=timeout_s)
        backend = groups._get_data_parallel_group()._get_backend(torch.device("cpu"))
        seconds.append(backend.options._timeout.total_seconds())
        engine.close()
    return seconds


def test_deepspeed_waits_no_longer_than_configured(ranks, seed) -> None:
    """It makes a group of its own, for which torch's default is half an hour."""
    assert ranks(2).run(group_timeouts, seed) == [[77.0, 60.0]] * 2


def test_clipping_really_clips(seed) -> None:
    norms = [norm for _, norm in plain_run("sgd", CLIP, seed)[0]]
    assert min(norms) > CLIP, norms


def test_one_rank_has_no_target(seed) -> None:
    mesh = Mesh(0, 4, 0, 4, torch.device("cpu"))
    (share,) = micro_batches(documents(0, seed), mesh, 1)
    assert isinstance(share, Batch) and not (share.labels != -100).any()
