"""Torch FSDP2 as an engine: weights, gradients and optimizer state cut by rows over the data and sequence ranks.

The optimizer works on each rank's rows as plain tensors, so the norm, clipping, moments and checkpoints need no collective but
one sum. Tensor-parallel weights are plain local tensors to FSDP2 as well.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from mmscale.errors import ConfigError
from mmscale.parallel.engines.base import (
    Batch,
    EngineBase,
    EngineSpec,
    StateReader,
    StepResult,
    create_moments,
    moment_names,
    set_learning_rates,
)
from mmscale.parallel.layout import Chunk
from mmscale.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class _Shard:
    """This rank's rows of one parameter.

    param      what FSDP2 trains; its gradient arrives there
    rows       the same memory as a plain parameter, [rows of this rank, ...]; the optimizer updates it
    shape      of all rows together
    first_row  where `rows` begin
    """

    name: str
    param: nn.Parameter
    rows: nn.Parameter
    shape: torch.Size
    first_row: int


class FsdpEngine(EngineBase):
    """Fully sharded like ZeRO-3. Master weights, moments and gradients are fp32; with `train.dtype: bf16` each layer's weights
    are gathered in bf16. Gradients are reduced in fp32 after every micro-batch, so no rank ever holds them whole."""

    def __init__(self, spec: EngineSpec) -> None:
        """Shards `spec.model`, whose weights must be final, and moves it to the device of the mesh.

        Raises:
            ConfigError: a parameter that FSDP2 cannot cut.
        """
        super().__init__(spec)
        before = dict(spec.model.named_parameters())
        shapes = {name: param.shape for name, param in before.items()}
        self._module = spec.model
        self._root = _fully_shard(spec, before)
        self._shards = [
            _shard(name, cast(nn.Parameter, param), shapes[name], spec.mesh)
            for name, param in self._module.named_parameters()
        ]
        self._trained = [shard for shard in self._shards if shard.param.requires_grad]
        _hand_over(spec.optimizer, before, {shard.name: shard.rows for shard in self._trained})
        create_moments(spec.optimizer, [shard.rows for shard in self._trained])
        self._module.train()

    def _add_gradient(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        self._root.set_is_last_backward(is_last)
        loss = self._forward(batch)
        (loss * scale).backward()
        return loss.detach()

    def step(self, lrs: Sequence[float]) -> StepResult:
        """See `Engine.step`."""
        optimizer = self._spec.optimizer
        set_learning_rates(optimizer, lrs)
        for shard in self._trained:
            shard.rows.grad = _local_gradient(shard)
        grad_norm = self._grad_norm()
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            self._clip(grad_norm)
            optimizer.step()
            self._num_updates += 1
        for shard in self._trained:
            shard.param.grad = shard.rows.grad = None
        return StepResult(grad_norm, skipped)

    def evaluate(self, batch: Batch) -> float:
        """See `EngineBase.evaluate`."""
        try:
            return super().evaluate(batch)
        finally:
            self._root.reshard()  # the root stays gathered until a backward pass, which does not come

    def _chunks(self) -> Iterator[tuple[str, Chunk]]:
        for shard in self._shards:
            for state, rows in self._states(shard):
                for chunk in self._spec.chunks(shard.name, rows.detach(), shard.shape, shard.first_row):
                    yield state, chunk

    def _load(self, reader: StateReader) -> None:
        create_moments(self._spec.optimizer, [shard.rows for shard in self._trained], self._num_updates)
        with torch.no_grad():
            for shard in self._shards:
                for state, rows in self._states(shard):
                    whole = self._spec.read(reader, state, shard.name, shard.shape)
                    rows.copy_(whole[shard.first_row : shard.first_row + len(rows)])

    def close(self) -> None:
        """See `Engine.close`."""

    def _states(self, shard: _Shard) -> Iterator[tuple[str, Tensor]]:
        """State names of a parameter that a checkpoint holds, and this rank's rows of them."""
        if shard.name in self._spec.stored:
            yield f"model.{shard.name}", shard.rows
        for moment in moment_names(self._spec.optimizer) if shard.param.requires_grad else ():
            yield f"optim.state.{shard.name}.{moment}", self._spec.optimizer.state[shard.rows][moment]

    def _grad_norm(self) -> float:
        """Of the whole gradient: rows differ from rank to rank, and what tensor-parallel ranks hold alike counts once."""
        mesh = self._spec.mesh
        own = [s.rows.grad for s in self._trained if s.rows.grad is not None and self._spec.is_writer(s.name)]
        square = get_total_norm(own).to(mesh.device, torch.float64) ** 2
        for axis in (mesh.grads, mesh.tensor):
            if axis.size > 1:
                dist.all_reduce(square, group=axis.group)
        return math.sqrt(square.item())

    def _clip(self, grad_norm: float) -> None:
        clip = self._spec.train.clip
        if 0 < clip < grad_norm:
            grads = [shard.rows.grad for shard in self._trained if shard.rows.grad is not None]
            torch._foreach_mul_(grads, clip / (grad_norm + 1e-6))


def _fully_shard(spec: EngineSpec, params: Mapping[str, nn.Parameter]) -> FSDPModule:
    _refuse_scalars(params)
    # towers give slices of their output, and nobody changes these in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    mesh = spec.mesh
    assert mesh.grads.group is not None, "the mesh of this engine has groups"
    device_mesh = DeviceMesh.from_group(mesh.grads.group, mesh.device.type, mesh_dim_names=("grads",))
    low = torch.bfloat16 if spec.train.dtype == "bf16" else None
    # Towers cast their input to the type of a weight, which is fp32 until the layer that holds it is gathered, so FSDP2 casts
    # too. The language model starts from gathered embeddings; FSDP2 would copy the batch and the attention for each layer.
    llm = {id(module) for module in _parts(spec.model)["llm"].modules()} | {id(spec.model)}
    for unit in (*_units(spec.model), spec.model):
        policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=id(unit) not in llm)
        sharded = fully_shard(unit, mesh=device_mesh, mp_policy=policy)
        if mesh.device.type == "cpu":
            # gloo's reduce-scatter has summed where it was asked to average (pytorch#162338): divide after the sum instead
            sharded.set_force_sum_reduction_for_comms(True)
    for param in params.values():
        param.data = param.data.new_empty(0)  # others may still hold the whole parameters; their memory is given back
    return cast(FSDPModule, spec.model)


def _parts(model: nn.Module) -> Mapping[str, nn.Module]:
    return model.parts()  # type: ignore[operator, no-any-return]


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """What is gathered one at a time, the innermost first: the layers of every stack, then towers and connectors.

    The rest, such as embeddings and the output head (often the same tensor), belongs to the whole model.
    """
    outer = [module for name, module in _parts(model).items() if name != "llm"]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stacks = [stack for stack in lists if not any(isinstance(layer, (nn.ModuleList, nn.ModuleDict)) for layer in stack)]
    nested = {id(inner) for stack in stacks for layer in stack for inner in layer.modules() if inner is not layer}
    for stack in stacks:
        if id(stack) not in nested:
            yield from (layer for layer in stack if any(True for _ in layer.parameters()))
    yield from (module for module in outer if any(True for _ in module.parameters()))


def _refuse_scalars(params: Mapping[str, nn.Parameter]) -> None:
    scalars = [name for name, param in params.items() if param.dim() == 0]
    if scalars:
        raise ConfigError(
            f"parallel.engine=fsdp cuts every parameter by rows, found {len(scalars)} without rows, first {scalars[0]} (a "
            "scalar); set parallel.engine=deepspeed"
        )


def _shard(name: str, param: nn.Parameter, shape: torch.Size, mesh: Mesh) -> _Shard:
    rows = cast(DTensor, param).to_local().detach()
    per_rank = -(-shape[0] // mesh.grads.size)
    first_row = min(per_rank * mesh.grads.rank, shape[0])
    assert len(rows) == min(first_row + per_rank, shape[0]) - first_row, f"{name}: FSDP2 cuts rows as torch.chunk does"
    return _Shard(name, param, nn.Parameter(rows, requires_grad=param.requires_grad), shape, first_row)


def _local_gradient(shard: _Shard) -> Tensor:
    """This rank's rows of the gradient; zeros for a parameter that no micro-batch has touched."""
    grad = shard.param.grad
    return torch.zeros_like(shard.rows) if grad is None else cast(DTensor, grad).to_local()


def _hand_over(
    optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], rows: Mapping[str, nn.Parameter]
) -> None:
    """Puts each rank's rows in place of the whole parameters of the optimizer."""
    names = {id(param): name for name, param in before.items()}
    for group in optimizer.param_groups:
        group["params"] = [rows[names[id(param)]] for param in group["params"]]
