"""What one forward of the model reads: a whole pack, or one rank's part of it.

Shapes: L tokens of the part (all of them for a whole pack), N tower inputs, M media rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmscale.model.llm.attention import PackAttention, WholePack
from mmscale.types import Modality, PackedBatch


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """One forward's input.

    input_ids     int64 [L]
    position_ids  int64 [L], or [K, L] for models with several position axes (K = 4: text, then time, height, width)
    labels        int64 [L], -100 = no target
    target_idx    int64, positions of this part that have a target, ascending
    source_index  int64 [L], row of `cat([text embeddings [L], media rows])` for each position
    media_positions  int32 [M], where each media row stands, -1 = nowhere: the inverse of `source_index`
    inputs        modality -> tower inputs that are encoded here, [N, ...]
    attention     how the tokens see each other
    route         encoded rows [M, W], in the order image, video, audio, to the media rows that `source_index` counts; None
                  = they are the same. When not None it is called on every forward, and ranks wait for each other in it
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    target_idx: Tensor
    source_index: Tensor
    media_positions: Tensor
    inputs: Mapping[Modality, Tensor]
    attention: PackAttention
    route: Callable[[Tensor], Tensor] | None = field(default=None)

    @classmethod
    def of(cls, pack: PackedBatch, kernel: str = "auto") -> ModelBatch:
        """A whole pack, with the attention kernel `kernel`."""
        inputs = {modality: media.data for modality, media in pack.media.items()}
        return cls(
            pack.input_ids, pack.position_ids, pack.labels, pack.target_idx, pack.source_index, pack.media_positions, inputs,
            WholePack.of(pack, kernel),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> ModelBatch:
        """The same with every tensor on `device` (asynchronous from pinned memory)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> ModelBatch:
        """The same in pinned host memory, from which `to` does not wait; needs CUDA."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> ModelBatch:
        names = ("input_ids", "position_ids", "labels", "target_idx", "source_index", "media_positions")
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, inputs={modality: change(data) for modality, data in self.inputs.items()}, **changed)
