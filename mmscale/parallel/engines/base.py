"""What a training engine does, and the parts that all engines share.

State names: `model.<parameter name>` and, for each trained parameter under AdamW, `optim.state.<parameter name>.exp_avg`
and `.exp_avg_sq`, all fp32 and whole; `optim.num_updates` is a scalar (int64), the optimizer updates done so far.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from mmscale.config.schema import TrainConfig
from mmscale.errors import CheckpointError
from mmscale.model.batch import ModelBatch
from mmscale.parallel.layout import Chunk, ShardLayout, chunks, whole_layout
from mmscale.parallel.mesh import Mesh
from mmscale.types import PackedBatch

Batch = PackedBatch | ModelBatch
"""A whole pack, or one rank's part of a pack that is divided."""

NUM_UPDATES = "optim.num_updates"
"""State name of the number of optimizer updates; skipped steps do not count."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an optimizer step did. `grad_norm`: of the true global gradient, before clipping. `skipped`: no update was made
    because the norm was not finite; identical on all ranks."""

    grad_norm: float
    skipped: bool


class StateReader(Protocol):
    """Whole fp32 tensors by state name, one at a time; a checkpoint opened for reading is one."""

    @property
    def names(self) -> frozenset[str]:
        """All state names that can be read."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU."""
        ...


class Engine(Protocol):
    """A model with its optimizer on some layout of ranks. Every method is called by every rank.

    An engine never sees files, the data cursor or the schedule.
    """

    def forward_backward(self, micro_batches: Sequence[Batch], num_targets: int) -> float:
        """This rank's sum of token losses over its micro-batches; gradients are added up for `step`.

        Args:
            micro_batches: this rank's packs of the optimizer step, at least one, as many on every rank.
            num_targets: targets of the whole optimizer step over all ranks, at least 1.
        """
        ...

    def step(self, lrs: Sequence[float]) -> StepResult:
        """Clips, updates and clears the gradients; `lrs` holds one learning rate per optimizer group."""
        ...

    def evaluate(self, batch: Batch) -> float:
        """This rank's sum of token losses of one pack, without gradients and in evaluation mode."""
        ...

    @property
    def state_names(self) -> frozenset[str]:
        """All state names of a checkpoint of this engine."""
        ...

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        """State names and tensors in chunks, on any device, of which those of all ranks cover each whole tensor exactly once.

        Every rank iterates to the end. A chunk may share memory with the engine: copy it before the next `step`.
        """
        ...

    def load_state(self, reader: StateReader) -> None:
        """Restores master weights, moments and the update count; strict in both directions."""
        ...

    def close(self) -> None:
        """Gives up buffers and hooks."""
        ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What every engine is made of.

    model      the prepared plain module: `model(batch)` gives the sum of token losses as an fp32 scalar
    optimizer  torch AdamW or SGD over all parameters that require gradients
    stored     names of the parameters that belong into a checkpoint
    layouts    how tensor parallelism cut parameters; those not named are whole on every rank
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mesh: Mesh
    train: TrainConfig
    stored: frozenset[str]
    layouts: Mapping[str, ShardLayout] = field(default_factory=dict)

    def read(self, reader: StateReader, state: str, name: str, whole: torch.Size) -> Tensor:
        """This rank's part of the state called `state` of parameter `name`, whose tensor-parallel part has shape `whole`."""
        layout = self.layouts.get(name)
        value = read_checked(reader, state, whole if layout is None else layout.whole)
        return value if layout is None else layout.cut(value)

    def is_writer(self, name: str) -> bool:
        """True on one of the tensor-parallel ranks that hold the same numbers of parameter `name`: it alone writes them into
        checkpoints and counts them in the gradient norm."""
        layout = self.layouts.get(name)
        return self.mesh.tensor.rank == 0 if layout is None else layout.is_writer

    def chunks(self, name: str, rows: Tensor, shape: torch.Size, first_row: int = 0) -> Iterator[Chunk]:
        """Where rows of parameter `name`, or of its moment, stand in the whole tensor; nothing unless `is_writer`.

        Args:
            rows: rows `first_row : first_row + len(rows)` of this rank's tensor-parallel part.
            shape: of the whole tensor-parallel part.
        """
        if self.is_writer(name):
            yield from chunks(rows, self.layouts.get(name, whole_layout(shape)) if shape else None, first_row)


class EngineBase(ABC):
    """What all engines do alike; the rest of `Engine` is the subclass's.

    `_module` runs a forward pass: the model, or what an engine has made of it.
    """

    _module: nn.Module

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._num_updates = 0

    def forward_backward(self, micro_batches: Sequence[Batch], num_targets: int) -> float:
        """See `Engine.forward_backward`."""
        device, scale = self._spec.mesh.device, loss_scale(self._spec.mesh, num_targets)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index, batch in enumerate(micro_batches, start=1):
            total += self._add_gradient(batch.to(device), scale, index == len(micro_batches))
        return total.item()

    @abstractmethod
    def _add_gradient(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        """The detached sum of token losses of one pack, after `scale` times its gradient was added up."""

    def evaluate(self, batch: Batch) -> float:
        """See `Engine.evaluate`. Where weights are sharded every rank must evaluate equally often, as they are gathered."""
        self._module.eval()
        try:
            with torch.no_grad():
                return float(self._forward(batch.to(self._spec.mesh.device)))
        finally:
            self._module.train()

    def _forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self._module(batch)
        return loss

    @property
    def state_names(self) -> frozenset[str]:
        """See `Engine.state_names`."""
        return state_names(self._spec)

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        """See `Engine.state_views`. Chunks may share memory with weights and moments."""
        if self._spec.mesh.is_main:
            yield NUM_UPDATES, Chunk(torch.tensor(self._num_updates), (), torch.Size())
        yield from self._chunks()

    @abstractmethod
    def _chunks(self) -> Iterator[tuple[str, Chunk]]:
        """This rank's chunks of weights and moments."""

    def load_state(self, reader: StateReader) -> None:
        """See `Engine.load_state`."""
        check_names(reader, self.state_names)
        self._num_updates = int(reader.read(NUM_UPDATES))
        self._load(reader)

    @abstractmethod
    def _load(self, reader: StateReader) -> None:
        """Restores weights and moments; `_num_updates` is that of the checkpoint already."""


def loss_scale(mesh: Mesh, num_targets: int) -> float:
    """The factor from a rank's sum of token losses to the loss it runs backward.

    Every engine averages gradients over the flat group of data and sequence ranks, so multiplying by its size makes the
    result the gradient of (sum of all token losses / number of all targets). The only place in mmscale where gradients are scaled.

    Raises:
        ValueError: `num_targets` is below 1.
    """
    if num_targets < 1:
        raise ValueError(f"expected at least 1 target in an optimizer step, found {num_targets}")
    return mesh.grads.size / num_targets


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the per-parameter state tensors that a checkpoint keeps."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    if isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups):
        return ()
    raise TypeError(f"expected AdamW or SGD without momentum, found {type(optimizer).__name__}")


def create_moments(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], num_updates: int = 0) -> None:
    """Gives every parameter fresh optimizer state (zeros), so that it can be filled without taking a step."""
    names = moment_names(optimizer)
    on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    for param in params if names else ():
        step = torch.full((), float(num_updates), device=param.device if on_device else "cpu")
        optimizer.state[param] = {"step": step, **{name: torch.zeros_like(param) for name in names}}


def state_names(spec: EngineSpec) -> frozenset[str]:
    """All state names of a checkpoint of `spec`."""
    names = {f"model.{name}" for name in spec.stored} | {NUM_UPDATES}
    for name, param in spec.model.named_parameters():
        if param.requires_grad:
            names.update(f"optim.state.{name}.{moment}" for moment in moment_names(spec.optimizer))
    return frozenset(names)


def check_names(reader: StateReader, expected: Iterable[str]) -> None:
    """Raises CheckpointError unless the reader has exactly the expected state names."""
    want = frozenset(expected)
    missing, unknown = sorted(want - reader.names), sorted(reader.names - want)
    if missing or unknown:
        raise CheckpointError(
            f"expected a checkpoint of this model, found {len(missing)} names missing {missing[:3]} and {len(unknown)} "
            f"unknown {unknown[:3]}; resume with the model, the frozen parts and the optimizer that wrote it"
        )


def read_checked(reader: StateReader, name: str, shape: torch.Size) -> Tensor:
    """The tensor called `name`. Raises CheckpointError unless its shape is `shape`."""
    value = reader.read(name)
    if value.shape != shape:
        raise CheckpointError(
            f"expected {name} with shape {list(shape)}, found {list(value.shape)} in the checkpoint; "
            "resume with the model configuration that wrote it"
        )
    return value


def set_learning_rates(optimizer: torch.optim.Optimizer, lrs: Sequence[float]) -> None:
    """Writes one learning rate per optimizer group. Raises ValueError when the numbers of both differ."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
