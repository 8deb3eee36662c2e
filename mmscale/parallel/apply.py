"""THE order in which a plain model becomes a training engine.

    freeze -> dtype and device -> load weights -> wrap -> load optimizer state

Weights are loaded before an engine wraps the model, so that sharded live weights and their fp32 masters come from the
same numbers; an engine that is filled afterwards would run its first forward with the old ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from mmscale.config.schema import ModelConfig, ParallelConfig, TrainConfig
from mmscale.errors import ConfigError
from mmscale.parallel.engines.base import Engine, EngineSpec, StateReader, check_names, read_checked, state_names
from mmscale.parallel.engines.single import SingleEngine
from mmscale.parallel.mesh import Mesh, resolve_engine


def make_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: ParallelConfig,
    train: TrainConfig,
    mesh: Mesh,
    external_parts: Collection[str] = (),
    resume: StateReader | None = None,
) -> Engine:
    """An engine over `model`, fresh or with the state of `resume`.

    Args:
        model: plain module on the CPU; `model(batch)` gives the sum of token losses as an fp32 scalar, `model.parts()`
            names its parts. Activation checkpointing, if wanted, is already on.
        optimizer: over the parameters to train; every other parameter is frozen here.
        external_parts: frozen parts whose weights a checkpoint leaves out because they come from elsewhere, see
            `external_parts`.
        resume: an open checkpoint; its names must be exactly this model's.

    Raises:
        CheckpointError: `resume` does not fit the model.
        MissingExtraError: DeepSpeed is needed and not installed.

    Distributed: every rank calls it with the same arguments.
    """
    _freeze_untrained(model, optimizer)
    # masters are fp32 whatever the files hold; `.data` keeps the optimizer's references
    for param in model.parameters():
        param.data = param.data.to(mesh.device, torch.float32)
    model.to(mesh.device)
    spec = EngineSpec(model, optimizer, mesh, train, _stored_names(model, external_parts))
    if resume is not None:
        check_names(resume, state_names(spec))
        _load_weights(spec, resume)
    engine = _wrap(spec, parallel)
    if resume is not None:
        engine.load_state(resume)
    return engine


def external_parts(model: ModelConfig, train: TrainConfig) -> dict[str, str]:
    """Part name -> weights folder of the parts that are frozen and loaded from a path: checkpoints only name them."""
    sources = {"llm": model.llm.path}
    sources |= {name: part.path for name in ("vision", "audio") if (part := getattr(model, name)) is not None}
    tuned = {name: part.tune for name, part in train.parts if part is not None}
    return {name: path for name, path in sources.items() if path is not None and tuned.get(name) == "frozen"}


def _wrap(spec: EngineSpec, parallel: ParallelConfig) -> Engine:
    if resolve_engine(parallel, spec.mesh.world_size) == "single":
        return SingleEngine(spec)
    from mmscale.parallel.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(spec, parallel.zero_stage, parallel.zero_keep_whole)


def _freeze_untrained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    unknown = trained - {id(param) for param in model.parameters()}
    if unknown:
        raise ConfigError(
            f"expected the optimizer to hold parameters of the model, found {len(unknown)} others; "
            "build the optimizer from this model"
        )
    for param in model.parameters():
        param.requires_grad_(id(param) in trained)


def _stored_names(model: nn.Module, left_out: Collection[str]) -> frozenset[str]:
    parts: Mapping[str, nn.Module] = model.parts() if left_out else {}  # type: ignore[operator]
    skipped = {id(p) for name in left_out for p in parts[name].parameters() if not p.requires_grad}
    return frozenset(name for name, param in model.named_parameters() if id(param) not in skipped)


@torch.no_grad()
def _load_weights(spec: EngineSpec, reader: StateReader) -> None:
    for name, param in spec.model.named_parameters():
        if name in spec.stored:
            param.copy_(read_checked(reader, f"model.{name}", param.shape))
