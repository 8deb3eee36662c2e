"""Floating-point operations of one forward pass, part by part, from configurations alone.

A multiplication with its addition counts as two operations. Counted are products of matrices and convolutions, as
`torch.utils.flop_counter` does; lookups, norms, activations and softmax are not. The one place with these formulas: planning
(`mmscale.config.cost`) and the figures of a training step (`mmscale.train.flops`) are built on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmscale.config.llm import LlmSizes, llm_sizes
from mmscale.config.specs import connector_stride, mlp_depth, vision_grid

_KEEPS_LAST = frozenset(("dinov2", "dinov2_with_registers", "wav2vec2"))
"""Towers in whose layers something behind the last product (a norm, a scale) needs its result again in the backward pass."""


@dataclass(frozen=True, slots=True)
class LlmWork:
    """Forward operations of a language model.

    token   of one position in all layers, without attention between positions
    head    of one row of logits
    pairs   window W (None = the whole document) -> operations per (query, key) pair, summed over the layers with that window
    last    of one position in the products that end a layer: a recomputation stops before them
    """

    token: float
    head: float
    pairs: Mapping[int | None, float]
    last: float


@dataclass(frozen=True, slots=True)
class PartWork:
    """Forward operations of a tower or a connector on one tower input.

    first      of the product that reads the part's own input: its input gradient is wanted only when something before it learns
    linear     of all other products with weights
    attention  of products between activations
    layers     of all layers that activation checkpointing would compute again, as far as it would
    matching   of products that no gradient passes
    """

    first: float
    linear: float
    attention: float = 0.0
    layers: float = 0.0
    matching: float = 0.0

    @property
    def forward(self) -> float:
        """Of the whole forward pass."""
        return self.first + self.linear + self.attention + self.matching


def llm_work(raw: Mapping[str, Any], vocab_size: int) -> LlmWork:
    """The work of the language model with Hugging Face configuration `raw` and a head of `vocab_size` rows.

    Raises ConfigError like `llm_sizes`.

    Example:
        >>> work = llm_work({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}, 100)
        >>> work.token == 2 * 2 * (4 * 64**2 + 3 * 64 * 128), work.pairs
        (True, {None: 512.0})
    """
    sizes = llm_sizes(raw)
    token = 2.0 * sizes.layers * (sizes.attention_weights + sizes.mlp_weights)
    pair = 4.0 * sizes.heads * sizes.head_size
    pairs = {window: pair * layers for window, layers in _layers_by_window(raw, sizes).items()}
    # a mixture of experts weighs the results of its experts, and needs them for that
    last = 0.0 if sizes.experts > 1 else 2.0 * sizes.layers * sizes.width * sizes.inner
    return LlmWork(token, 2.0 * sizes.width * vocab_size, pairs, last)


def _layers_by_window(raw: Mapping[str, Any], sizes: LlmSizes) -> dict[int | None, int]:
    kinds = raw.get("text_config", raw).get("layer_types")
    if sizes.window is None or not kinds:
        return {sizes.window: sizes.layers}
    sliding = sum(kind == "sliding_attention" for kind in kinds[: sizes.layers])
    return {window: n for window, n in ((sizes.window, sliding), (None, sizes.layers - sliding)) if n}


def vision_work(raw: Mapping[str, Any], select_layer: int | None) -> PartWork:
    """The work of a vision tower on one image; `raw` has the keys of `tower_config`. Only layers up to the selected one run."""
    grid, hidden = vision_grid(dict(raw)), int(raw["hidden_size"])
    patch, inner = grid.size // grid.side, int(raw.get("mlp_ratio", 4) * hidden)
    matrices = 2
    if raw.get("use_swiglu_ffn"):  # DINOv2 giant: a gate, its width rounded up to a multiple of 8
        inner, matrices = -(-int(inner * 2 / 3) // 8) * 8, 3
    inner = int(raw.get("intermediate_size") or inner)
    embedding = 2.0 * grid.side**2 * 3 * patch**2 * hidden
    layers = layers_used(select_layer, int(raw["num_hidden_layers"]))
    return _encoder(embedding, 0.0, layers, _Layer(grid.side**2 + grid.prefix, hidden, inner, matrices), raw)


def audio_work(raw: Mapping[str, Any], select_layer: int | None, window_samples: int, frames: int) -> PartWork:
    """The work of an audio tower on one window that gives `frames` features; `raw` has the keys of `tower_config`."""
    if raw["model_type"] == "whisper":
        hidden, mel_bins = int(raw["d_model"]), int(raw["num_mel_bins"])
        inner = int(raw.get("encoder_ffn_dim") or 4 * hidden)
        layers = layers_used(select_layer, int(raw["encoder_layers"]))
        first, second = 2.0 * 3 * hidden * 2 * frames * mel_bins, 2.0 * 3 * hidden * frames * hidden
        return _encoder(first, second, layers, _Layer(frames, hidden, inner), raw)
    hidden = int(raw["hidden_size"])
    convolutions, length, channels = [], window_samples, 1
    kernels, strides = raw["conv_kernel"], raw["conv_stride"]
    for kernel, stride, width in zip(kernels, strides, raw.get("conv_dim", [512] * len(kernels)), strict=True):
        length = (length - kernel) // stride + 1
        convolutions.append(2.0 * length * kernel * channels * width)
        channels = width
    reach, groups = int(raw.get("num_conv_pos_embeddings", 128)), int(raw.get("num_conv_pos_embedding_groups", 16))
    places = frames + 1 - reach % 2  # an even kernel makes one more than is kept
    rest = sum(convolutions[1:]) + 2.0 * frames * channels * hidden + 2.0 * places * reach * hidden * hidden / groups
    inner = int(raw.get("intermediate_size") or 4 * hidden)
    layers = layers_used(select_layer, int(raw["num_hidden_layers"]))
    tower = _encoder(convolutions[0], rest, layers, _Layer(frames, hidden, inner), raw)
    return replace(tower, layers=tower.layers + sum(convolutions))  # these are computed again, too


def connector_work(name: str, inputs: int, width: int, rows: int) -> PartWork:
    """The work of the connector `name` on one tower input: from `inputs` tower channels to `rows` rows of `width`.

    What `token_merge` costs to find similar rows is left out, see `matching_work`. Raises ConfigError for an unknown connector.
    """
    cell = inputs * connector_stride(name) ** 2
    depth = 2 if name == "token_merge" else mlp_depth(name) or 1
    if connector_stride(name) == 1:
        products = [cell * width] + [width * width] * (depth - 1)
        return PartWork(2.0 * rows * products[0], 2.0 * rows * sum(products[1:]))
    # these begin with a norm whose weights learn: the gradient of the first product's input is always wanted
    if name == "patch_merger":
        products = [cell * cell, cell * width]
    elif connector_stride(name) == 3:
        products = [cell * 3 * inputs, 3 * inputs * width, width * width]
    else:
        products = [cell * width, width * width]
    return PartWork(0.0, 2.0 * rows * sum(products))


def matching_work(inputs: int, patches: int, rows_by_round: Sequence[int]) -> float:
    """Operations of `token_merge` on one tower input: in each round half of the rows meets the other half.

    Args:
        rows_by_round: rows that are left after each round.
    """
    return sum(2.0 * inputs * (n // 2) * (n - n // 2) for n in [patches, *rows_by_round][:-1])


def layers_used(select_layer: int | None, layers: int) -> int:
    """Layers that run for an index into the hidden states (0 = embeddings); all of them for None.

    Example:
        >>> layers_used(-2, 24), layers_used(None, 24)
        (23, 24)
    """
    return layers if select_layer is None else select_layer if select_layer >= 0 else layers + 1 + select_layer


@dataclass(frozen=True, slots=True)
class _Layer:
    """A transformer layer in which all tokens see each other; `matrices` of `hidden x inner` in its MLP."""

    tokens: int
    hidden: int
    inner: int
    matrices: int = 2

    @property
    def linear(self) -> float:
        return 2.0 * self.tokens * (4 * self.hidden**2 + self.matrices * self.hidden * self.inner)

    @property
    def attention(self) -> float:
        return 4.0 * self.tokens**2 * self.hidden

    @property
    def last(self) -> float:
        return 2.0 * self.tokens * self.hidden * self.inner


def _encoder(first: float, front: float, num_layers: int, layer: _Layer, raw: Mapping[str, Any]) -> PartWork:
    """A tower of equal layers behind a front of which `first` reads the tower's input."""
    kept = raw["model_type"] in _KEEPS_LAST and not raw.get("do_stable_layer_norm")
    again = layer.linear + layer.attention - (0.0 if kept else layer.last)
    return PartWork(first, front + num_layers * layer.linear, num_layers * layer.attention, num_layers * again)
