"""Names in, names out: how a composite model is written in a format that other software reads.

Pure functions over the model's description; no weights are touched here. A writer walks over our parameter names, asks
`ExportPlan.rename` for the name on disk, and adds `ExportPlan.constants`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from transformers import LlavaConfig, PretrainedConfig

from mmscale.errors import ConfigError
from mmscale.model.description import MmscaleConfig
from mmscale.model.towers.build import truncated_config

Target = Literal["auto", "llava", "mmscale"]

_LLAVA_CONNECTOR = {
    "vision.connector.0.": "multi_modal_projector.linear_1.",
    "vision.connector.2.": "multi_modal_projector.linear_2.",
}
LLAVA_IMAGE_MODES = ("resize", "square")
"""Image modes for which transformers has an image processor that works with the LLaVA class."""
_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")
_HEAD_WITH_BIAS = ("phi",)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export writes.

    target        `llava` (a stock class of transformers) or `mmscale` (our class)
    config        written as `config.json`
    constants     tensors that the format wants and the model does not have: name on disk -> (shape, fill value)
    left_out      parts whose weights are not written
    """

    target: Literal["llava", "mmscale"]
    config: PretrainedConfig
    constants: dict[str, tuple[tuple[int, ...], float]]
    left_out: tuple[str, ...]

    def rename(self, name: str) -> str | None:
        """The name on disk of our parameter `name`; None when it is not written (a tied head, a part left out)."""
        if any(name.startswith(f"{part}.") for part in self.left_out):
            return None
        if self.config.tie_word_embeddings and name == "llm.lm_head.weight":
            return None
        return to_llava(name) if self.target == "llava" else name


def export_plan(config: MmscaleConfig, target: Target = "auto", drop: tuple[str, ...] = ()) -> ExportPlan:
    """How to write the model that `config` describes.

    Args:
        config: from `describe`, with `media_token_ids`.
        target: `auto` takes the stock LLaVA class when the model fits it without dropping more than asked.
        drop: parts to leave out, `audio` or `vision`.

    Raises:
        ConfigError: `llava` was asked for and does not fit; the text gives every reason.
    """
    unknown = sorted(set(drop) - {"audio", "vision"})
    if unknown:
        raise ConfigError(f"drop: `audio` or `vision` is expected, found {', '.join(unknown)}; correct the name")
    reasons = llava_refusals(config, drop)
    if target == "llava" and reasons:
        raise ConfigError(
            f"a model that fits LlavaForConditionalGeneration is expected for target llava, found: {'; '.join(reasons)}; "
            f"use --target mmscale, or --drop the part"
        )
    left_out = tuple(p for p in ("vision", "audio") if p in drop and getattr(config, f"{p}_config") is not None)
    if target == "mmscale" or reasons:
        return ExportPlan("mmscale", _without(config, left_out), {}, left_out)
    return ExportPlan("llava", llava_config(config), _llava_constants(config), left_out)


def llava_refusals(config: MmscaleConfig, drop: tuple[str, ...] = ()) -> list[str]:
    """Why the model does not fit the stock LLaVA class; empty when it does."""
    reasons = []
    if config.audio_config is not None and "audio" not in drop:
        reasons.append("it has an audio part (drop audio to leave it out)")
    if config.text_config.model_type in _HEAD_WITH_BIAS:
        reasons.append(f"the {config.text_config.model_type} head has a bias")
    if config.vision_config is None or "vision" in drop:
        return [*reasons, "it has no vision part"]
    if config.vision_connector != "mlp2x_gelu":
        reasons.append(f"its vision connector is {config.vision_connector}, not mlp2x_gelu")
    if config.vision_config.model_type not in _LLAVA_TOWERS:
        reasons.append(f"its vision tower is {config.vision_config.model_type}, not CLIP or SigLIP")
    elif config.vision_select_layer is None and config.vision_config.model_type != "clip_vision_model":
        reasons.append("it uses the tower's final norm (select_layer null), which LLaVA skips")
    if config.image_spec["mode"] not in LLAVA_IMAGE_MODES:
        modes = " or ".join(LLAVA_IMAGE_MODES)
        reasons.append(f"its images are prepared with data.image.mode={config.image_spec['mode']}, not {modes}")
    if "image" not in config.media_token_ids:
        reasons.append("it has no token for images")
    return reasons


def to_llava(name: str) -> str | None:
    """The name on disk, in a LLaVA folder of transformers, of our parameter; None when LLaVA has no such part.

    Example:
        >>> to_llava("llm.model.norm.weight"), to_llava("vision.connector.2.bias")
        ('language_model.model.norm.weight', 'multi_modal_projector.linear_2.bias')
    """
    if name.startswith("llm."):
        return "language_model." + name.removeprefix("llm.")
    if name.startswith("vision.tower.model."):
        # The older level `vision_model.` is read by every version of transformers and by serving software.
        return "vision_tower.vision_model." + name.removeprefix("vision.tower.model.")
    for ours, theirs in _LLAVA_CONNECTOR.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None


def llava_config(config: MmscaleConfig) -> LlavaConfig:
    """The stock configuration of a model that fits (`llava_refusals` is empty).

    The tower is written with the layers that were run, so LLaVA's "last hidden state without final norm" is ours.
    """
    vision = truncated_config(config.vision_config, config.vision_select_layer, "model.vision")
    has_class_token = vision.model_type == "clip_vision_model"
    drops_it = has_class_token and config.vision_select_feature == "patch"
    values: dict[str, Any] = {
        "vision_config": vision,
        "text_config": copy.deepcopy(config.text_config),
        "image_token_index": config.media_token_ids["image"],
        "image_seq_length": config.image_spec["tokens"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if drops_it else "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    out = LlavaConfig(**values)
    out.architectures = ["LlavaForConditionalGeneration"]
    return out


def _llava_constants(config: MmscaleConfig) -> dict[str, tuple[tuple[int, ...], float]]:
    """The final norm, which LLaVA's tower has and never applies to the hidden state that it takes: neutral."""
    prefix, width = "vision_tower.vision_model.post_layernorm.", (int(config.vision_config.hidden_size),)
    return {f"{prefix}weight": (width, 1.0), f"{prefix}bias": (width, 0.0)}


def _without(config: MmscaleConfig, parts: tuple[str, ...]) -> MmscaleConfig:
    lost = {"vision": ("image", "video"), "audio": ("audio",)}
    values = config.to_dict()
    for part in parts:
        values |= {f"{part}_config": None, f"{part}_connector": None, **{f"{m}_spec": None for m in lost[part]}}
    gone = {modality for part in parts for modality in lost[part]}
    values["media_token_ids"] = {m: i for m, i in config.media_token_ids.items() if m not in gone}
    out = MmscaleConfig(**values)
    out.architectures = ["MmscaleForConditionalGeneration"]
    return out
