"""The engine of one process: plain torch, fp32 weights, bf16 by autocast."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mmscale.parallel.engines.base import (
    Batch,
    EngineBase,
    EngineSpec,
    StateReader,
    StepResult,
    create_moments,
    moment_names,
    read_checked,
    set_learning_rates,
)
from mmscale.parallel.layout import Chunk, chunks


class SingleEngine(EngineBase):
    """One process, one device, no process group."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._module = spec.model
        self._optimizer = spec.optimizer
        self._trained = [(n, p) for n, p in spec.model.named_parameters() if p.requires_grad]
        create_moments(spec.optimizer, [p for _, p in self._trained])
        self._module.train()

    def _add_gradient(self, batch: Batch, scale: float, is_last: bool) -> Tensor:
        loss = self._forward(batch)
        (loss * scale).backward()
        return loss.detach()

    def _forward(self, batch: Batch) -> Tensor:
        with self._autocast():
            return super()._forward(batch)

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
            clip = self._spec.train.clip
            if 0 < clip < grad_norm + 1e-6:  # else torch's factor, clip / (norm + 1e-6) but at most 1, is 1
                clip_grads_with_norm_(params, clip, norm)
            self._optimizer.step()
            self._num_updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, skipped)

    def _chunks(self) -> Iterator[tuple[str, Chunk]]:
        for name, value in self._whole_state():
            for chunk in chunks(value.float(), None):
                yield name, chunk

    def _whole_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, param in self._module.named_parameters():
            if name in self._spec.stored:
                yield f"model.{name}", param.detach()
        for name, param in self._trained:
            for moment in moment_names(self._optimizer):
                yield f"optim.state.{name}.{moment}", self._optimizer.state[param][moment]

    def _load(self, reader: StateReader) -> None:
        create_moments(self._optimizer, [p for _, p in self._trained], self._num_updates)
        with torch.no_grad():
            for name, value in self._whole_state():
                value.copy_(read_checked(reader, name, value.shape))

    def close(self) -> None:
        """See `Engine.close`."""

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self._spec.train.dtype == "bf16":
            return torch.autocast(self._spec.mesh.device.type, dtype=torch.bfloat16)  # type: ignore[return-value]
        return contextlib.nullcontext()
