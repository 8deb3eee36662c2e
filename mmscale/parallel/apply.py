"""THE order in which a plain model becomes a training engine.

    freeze -> dtype and device -> load weights -> wrap -> load optimizer state

Weights are loaded before an engine wraps the model, so that sharded live weights and their fp32 masters come from the
same numbers; an engine that is filled afterwards would run its first forward with the old ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import timedelta
from types import MappingProxyType

import torch
from torch import nn

from mmscale.config.checks import check_engine_keys
from mmscale.config.schema import ModelConfig, ParallelConfig, TrainConfig
from mmscale.errors import ConfigError
from mmscale.logging import get_logger
from mmscale.model.composite import MultimodalLM
from mmscale.parallel.engines.base import Engine, EngineSpec, StateReader, check_names, state_names
from mmscale.parallel.engines.deepspeed_json import Known, deepspeed_config, zero_stage
from mmscale.parallel.engines.single import SingleEngine
from mmscale.parallel.layout import ShardLayout
from mmscale.parallel.mesh import Mesh, resolve_engine

log = get_logger(__name__)


def make_engine(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parallel: ParallelConfig,
    train: TrainConfig,
    mesh: Mesh,
    external_parts: Collection[str] = (),
    resume: StateReader | None = None,
    layouts: Mapping[str, ShardLayout] = MappingProxyType({}),
) -> Engine:
    """An engine over `model`, fresh or with the state of `resume`.

    Args:
        model: plain module on the CPU; `model(batch)` gives the sum of token losses as an fp32 scalar, `model.parts()`
            names its parts. Activation checkpointing, if wanted, is already on.
        optimizer: over the parameters to train; every other parameter is frozen here.
        external_parts: frozen parts whose weights a checkpoint leaves out because they come from elsewhere, see
            `external_parts`.
        resume: an open checkpoint; its names must be exactly this model's.
        layouts: how tensor parallelism cut the parameters, as `shard_tensor` gave it.

    Raises:
        CheckpointError: `resume` does not fit the model.
        MissingExtraError: DeepSpeed is needed and not installed.

    Distributed: every rank calls it with the same arguments.
    """
    _freeze_untrained(model, optimizer)
    # FSDP2 moves one layer after the other while it cuts them, so that no device ever holds the whole model
    device = torch.device("cpu") if resolve_engine(parallel, mesh.world_size) == "fsdp" else mesh.device
    # masters are fp32 whatever the files hold; `.data` keeps the optimizer's references
    for param in model.parameters():
        param.data = param.data.to(device, torch.float32)
    model.to(device)
    spec = EngineSpec(model, optimizer, mesh, train, _stored_names(model, external_parts), layouts)
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
    kind = resolve_engine(parallel, spec.mesh.world_size)
    check_engine_keys(parallel, spec.mesh.world_size)
    if kind == "single":
        return SingleEngine(spec)
    if kind == "fsdp":
        from mmscale.parallel.engines.fsdp import FsdpEngine

        return FsdpEngine(spec)
    from mmscale.parallel.engines.deepspeed import DeepSpeedEngine

    known = Known(parallel, spec.train, spec.mesh.dp_size, _hidden_size(spec.model), spec.mesh.device.type == "cuda")
    config = deepspeed_config(known)
    if parallel.deepspeed is not None and spec.mesh.is_main:
        log.info("DeepSpeed configuration from %s: %s", parallel.deepspeed, json.dumps(config, sort_keys=True))
    return DeepSpeedEngine(spec, zero_stage(parallel), config, timedelta(seconds=parallel.timeout_s))


def _hidden_size(model: nn.Module) -> int:
    if isinstance(model, MultimodalLM):
        return int(model.config.text_config.hidden_size)
    return max((module.embedding_dim for module in model.modules() if isinstance(module, nn.Embedding)), default=1)


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
            param.copy_(spec.read(reader, f"model.{name}", name, param.shape))
