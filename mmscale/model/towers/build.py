"""Opens a Hugging Face encoder with exactly the layers that are used: no upper layers, no unused norm, no pooling head.

Every parameter that is left takes part in the output, so sharded engines never wait for a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mmscale.errors import ConfigError

_FINAL_NORM = {
    "clip_vision_model": "post_layernorm",
    "siglip_vision_model": "post_layernorm",
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "whisper": "layer_norm",
    "wav2vec2": "encoder.layer_norm",
}
_PROBABILITIES = (
    *("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "feat_proj_dropout", "final_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerdrop", "encoder_layerdrop"),
    *("mask_time_prob", "mask_feature_prob"),
)
"""Towers run without randomness: a pack's composition must not change an item's features, and a skipped layer would leave
sharded engines waiting."""


def kept_layers(select_layer: int | None, num_layers: int, where: str) -> int:
    """Layers to build for an index into the hidden states (0 = embeddings); all of them for None.

    Raises:
        ConfigError: the index does not exist.

    Example:
        >>> kept_layers(-2, 24, "model.vision"), kept_layers(None, 24, "model.vision")
        (23, 24)
    """
    if select_layer is None:
        return num_layers
    kept = select_layer if select_layer >= 0 else num_layers + 1 + select_layer
    if not 0 <= kept <= num_layers:
        raise ConfigError(
            f"{where}.select_layer: an index from {-num_layers - 1} to {num_layers} is expected for a tower of {num_layers} "
            f"layers, found {select_layer}; choose one of these"
        )
    return kept


def truncated_config(config: PretrainedConfig, select_layer: int | None, where: str) -> PretrainedConfig:
    """A copy of a tower's configuration with only the layers that are run, without dropout, heads or decoder."""
    config = copy.deepcopy(config)
    config.dtype = None  # the type that the caller builds in, not the one a checkpoint was stored in
    config.num_hidden_layers = kept_layers(select_layer, int(config.num_hidden_layers), where)
    for name in _PROBABILITIES:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    if config.model_type == "whisper":
        config.decoder_layers = 0
    return config


def open_tower(config: PretrainedConfig, select_layer: int | None, path: str | None, where: str) -> PreTrainedModel:
    """The Hugging Face encoder whose `last_hidden_state` is the selected hidden state.

    Args:
        config: the untruncated configuration of the tower.
        path: folder with its weights (a composite checkpoint gives its half); None = random weights.

    Raises:
        ConfigError: weights are missing in the folder.
    """
    config = truncated_config(config, select_layer, where)
    if path is None:
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    else:
        with _without_load_report():
            model, info = AutoModel.from_pretrained(
                *(path,),
                config=config,
                attn_implementation="sdpa",
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        missing = sorted(k for k in info["missing_keys"] if not k.startswith("decoder."))
        if missing:
            raise ConfigError(
                f"{where}.path: the weights of the tower are expected in {path}, missing {missing[:3]}; check it"
            )
    if config.model_type == "whisper":
        model = model.get_encoder()
    _drop_unused(model, config, select_layer)
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silences transformers' table of unused weights: here they are the upper layers and heads, left out on purpose, and
    missing weights are refused below."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _drop_unused(model: PreTrainedModel, config: PretrainedConfig, select_layer: int | None) -> None:
    kind = config.model_type
    # CLIP's final norm serves its pooled output only; wav2vec2's stands before the layers unless they are "stable".
    unused_norm = kind == "clip_vision_model" or select_layer is not None
    if kind == "wav2vec2" and not config.do_stable_layer_norm:
        unused_norm = False
    if unused_norm:
        parent, _, name = _FINAL_NORM[kind].rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
    if kind == "wav2vec2":
        # In training mode it marks the samples as wanting a gradient: a frozen tower would run its whole backward pass.
        extractor: Any = model.get_submodule("feature_extractor")
        extractor._requires_grad = False
    if kind.startswith("dinov2"):
        # Only masked pre-training uses it.
        model.get_submodule("embeddings").register_parameter("mask_token", None)
