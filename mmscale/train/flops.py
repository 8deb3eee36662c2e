"""Floating-point operations of a training step, estimated from parameter counts and document lengths.

A matrix weight costs 2 operations per token forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1);
causal attention over a document of L tokens adds 2 * L^2 * width forward and twice that backward, per layer. Frozen parts
cost their forward pass. Recomputed activations are not counted: this is model FLOPs, as in MFU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from mmscale.types import PackedBatch


@dataclass(frozen=True, slots=True)
class FlopModel:
    """Operations per token of each part, and per squared document length of the LLM's attention."""

    per_llm_token: float
    per_length_squared: float
    per_media_row: Mapping[str, float]

    def pack(self, pack: PackedBatch) -> float:
        """Operations of one pack, forward and backward."""
        media = sum(self.per_media_row.get(m, 0.0) * int(b.num_tokens.sum()) for m, b in pack.media.items())
        return self.per_llm_token * pack.num_tokens + self.per_length_squared * sum(n * n for n in pack.lengths) + media


def _matrix_weights(module: nn.Module) -> int:
    """Weights that take part in a matrix product: no embeddings (lookups), norms or biases."""
    lookups = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if p.dim() > 1 and id(p) not in lookups)


def flop_model(parts: Mapping[str, nn.Module], trainable: Sequence[str]) -> FlopModel:
    """The estimate for a model made of named parts (`llm`, `vision`, `vision_connector`, ...)."""
    llm = parts["llm"]
    config = cast(PreTrainedModel, llm).config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width, layers = int(config.num_attention_heads) * int(head_size), int(config.num_hidden_layers)

    def per_row(name: str) -> float:
        return (6 if name in trainable else 2) * _matrix_weights(parts[name])

    per_row_of = {
        modality: per_row(tower) + per_row(f"{tower}_connector")
        for modality, tower in (("image", "vision"), ("video", "vision"), ("audio", "audio"))
        if tower in parts
    }
    return FlopModel(6.0 * _matrix_weights(llm), 6.0 * width * layers, per_row_of)
