"""The engine of one process: plain torch, fp32 weights, bf16 by autocast."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mmscale.parallel.engines.base import (
    NUM_UPDATES,
    Batch,
    EngineSpec,
    StateReader,
    StepResult,
    check_names,
    create_moments,
    loss_scale,
    moment_names,
    read_checked,
    set_learning_rates,
    state_names,
)
from mmscale.parallel.layout import Chunk, chunks


class SingleEngine:
    """One process, one device, no process group."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._model = spec.model
        self._optimizer = spec.optimizer
        self._trained = [(n, p) for n, p in spec.model.named_parameters() if p.requires_grad]
        self._num_updates = 0
        create_moments(spec.optimizer, [p for _, p in self._trained])
        self._model.train()

    def forward_backward(self, micro_batches: Sequence[Batch], num_targets: int) -> float:
        """See `Engine.forward_backward`."""
        scale = loss_scale(self._spec.mesh, num_targets)
        total = torch.zeros((), dtype=torch.float64, device=self._spec.mesh.device)
        for batch in micro_batches:
            with self._autocast():
                loss = self._model(batch.to(self._spec.mesh.device))
            (loss * scale).backward()
            total += loss.detach()
        return total.item()

    def step(self, lrs: Sequence[float]) -> StepResult:
        """See `Engine.step`."""
        set_learning_rates(self._optimizer, lrs)
        for _, param in self._trained:
            if param.grad is None:  # untouched in every micro-batch: the sharded engines see zeros too
                param.grad = torch.zeros_like(param)
        params = [param for _, param in self._trained]
        norm = get_total_norm([param.grad for param in params if param.grad is not None])
        grad_norm = norm.item()
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            if self._spec.train.clip > 0:
                clip_grads_with_norm_(params, self._spec.train.clip, norm)
            self._optimizer.step()
            self._num_updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, skipped)

    def evaluate(self, batch: Batch) -> float:
        """See `Engine.evaluate`."""
        self._model.eval()
        try:
            with torch.no_grad(), self._autocast():
                return float(self._model(batch.to(self._spec.mesh.device)))
        finally:
            self._model.train()

    @property
    def state_names(self) -> frozenset[str]:
        """See `Engine.state_names`."""
        return state_names(self._spec)

    def state_views(self) -> Iterator[tuple[str, Chunk]]:
        """See `Engine.state_views`. On the CPU the chunks share memory with the weights and moments."""
        for name, value in self._whole_state():
            for chunk in chunks(value.float().cpu() if value.is_floating_point() else value, None):
                yield name, chunk

    def _whole_state(self) -> Iterator[tuple[str, Tensor]]:
        yield NUM_UPDATES, torch.tensor(self._num_updates)
        for name, param in self._model.named_parameters():
            if name in self._spec.stored:
                yield f"model.{name}", param.detach()
        for name, param in self._trained:
            for moment in moment_names(self._optimizer):
                yield f"optim.state.{name}.{moment}", self._optimizer.state[param][moment]

    def load_state(self, reader: StateReader) -> None:
        """See `Engine.load_state`."""
        check_names(reader, state_names(self._spec))
        self._num_updates = int(reader.read(NUM_UPDATES))
        create_moments(self._optimizer, [p for _, p in self._trained], self._num_updates)
        with torch.no_grad():
            for name, param in self._model.named_parameters():
                if name in self._spec.stored:
                    param.copy_(read_checked(reader, f"model.{name}", param.shape))
            for name, param in self._trained:
                for moment in moment_names(self._optimizer):
                    value = read_checked(reader, f"optim.state.{name}.{moment}", param.shape)
                    self._optimizer.state[param][moment].copy_(value)

    def close(self) -> None:
        """See `Engine.close`."""

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self._spec.train.dtype == "bf16":
            return torch.autocast(self._spec.mesh.device.type, dtype=torch.bfloat16)  # type: ignore[return-value]
        return contextlib.nullcontext()
