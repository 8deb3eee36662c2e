"""The whole model in one Hugging Face configuration: parts, connectors, layer selection, media sizes, placeholder ids.

Training builds `MultimodalLM` from it, an export stores it as `config.json`; both therefore hold the same modules under the
same names.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from mmscale.config.schema import LlmConfig, ModelConfig, TowerConfig
from mmscale.config.specs import tower_config
from mmscale.errors import ConfigError
from mmscale.registry import nearest
from mmscale.types import AudioSpec, ImageSpec, MediaSpecs, VideoSpec

_CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGE_STATS = {
    "clip_vision_model": _CLIP_STATS,
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "dinov2_with_registers": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of the pixels (0 to 1) that each family was trained with."""

_OLD_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "dtype", "model_type"}
"""Keys that transformers reads into other attributes."""


class MmscaleConfig(PretrainedConfig):
    """Configuration of a composite model.

    `text_config`, `vision_config`, `audio_config`: Hugging Face configurations of the untruncated parts (None = absent).
    `*_select_layer`, `*_connector`, `vision_select_feature`: as in the run's configuration. `image_mean`, `image_std`: pixel
    normalisation. `image_spec`, `video_spec`, `audio_spec`: the fields of `ImageSpec`, `VideoSpec` and `AudioSpec`.
    `media_token_ids`: modality -> token id of its slots. `template`: chat template name.
    """

    model_type = "mmscale"
    sub_configs: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
    }

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_connector: str | None = None,
        vision_select_layer: int | None = None,
        vision_select_feature: str = "patch",
        image_mean: tuple[float, ...] | None = None,
        image_std: tuple[float, ...] | None = None,
        image_spec: dict[str, Any] | None = None,
        video_spec: dict[str, Any] | None = None,
        audio_connector: str | None = None,
        audio_select_layer: int | None = None,
        audio_spec: dict[str, Any] | None = None,
        media_token_ids: dict[str, int] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config: Any = _as_config(text_config or {"model_type": "llama"})
        self.vision_config: Any = _as_config(vision_config)
        self.audio_config: Any = _as_config(audio_config)
        self.vision_connector = vision_connector
        self.vision_select_layer = vision_select_layer
        self.vision_select_feature = vision_select_feature
        self.image_mean = tuple(image_mean or ())
        self.image_std = tuple(image_std or ())
        self.image_spec: Any = image_spec
        self.video_spec: Any = video_spec
        self.audio_connector = audio_connector
        self.audio_select_layer = audio_select_layer
        self.audio_spec: Any = audio_spec
        self.media_token_ids = dict(media_token_ids or {})
        self.template = template
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def specs(self) -> MediaSpecs:
        """The media that the model takes."""
        return MediaSpecs(
            image=None if self.image_spec is None else ImageSpec(**_with_tuples(self.image_spec)),
            video=None if self.video_spec is None else VideoSpec(**self.video_spec),
            audio=None if self.audio_spec is None else AudioSpec(**self.audio_spec),
        )


def describe(
    model: ModelConfig,
    vocab_size: int,
    specs: MediaSpecs,
    media_token_ids: dict[str, int] | None = None,
    template: str | None = None,
) -> MmscaleConfig:
    """The configuration of the model that `model` asks for; reads JSON files only, no weights.

    Args:
        vocab_size: rows of the padded vocabulary; a checkpoint with more rows keeps them.
        specs: from `media_specs`.
        media_token_ids: modality -> token id; needed for an export only.

    Raises:
        ConfigError: a part whose configuration is unknown or has unknown keys.
    """
    values: dict[str, Any] = {"text_config": llm_config(model.llm, vocab_size)}
    if model.vision is not None and specs.image is not None:
        mean, std = _image_stats(model.vision)
        values |= {
            "vision_config": _part_config(model.vision, "model.vision"),
            "vision_connector": model.vision.connector,
            "vision_select_layer": model.vision.select_layer,
            "vision_select_feature": model.vision.select_feature,
            "image_mean": mean,
            "image_std": std,
            "image_spec": asdict(specs.image),
            "video_spec": None if specs.video is None else asdict(specs.video),
        }
    if model.audio is not None and specs.audio is not None:
        values |= {
            "audio_config": _part_config(model.audio, "model.audio"),
            "audio_connector": model.audio.connector,
            "audio_select_layer": model.audio.select_layer,
            "audio_spec": asdict(specs.audio),
        }
    return MmscaleConfig(**values, media_token_ids=media_token_ids, template=template)


def llm_config(part: LlmConfig, vocab_size: int) -> PretrainedConfig:
    """The Hugging Face configuration of the language model with the padded vocabulary.

    No padding token: Hugging Face would give its embedding no gradient, which is wrong when it is the end token too.
    """
    if part.path is None:
        config = hf_config({**(part.config or {}), "vocab_size": vocab_size, "pad_token_id": None}, "model.llm.config")
    else:
        config = read_config(part.path, "model.llm.path")
        config.vocab_size = max(int(config.vocab_size), vocab_size)
    config.pad_token_id = None
    config.dtype = None
    return config


def hf_config(values: dict[str, Any], where: str) -> PretrainedConfig:
    """A Hugging Face configuration from a mapping with `model_type`; unknown keys are refused.

    Raises:
        ConfigError: no or an unknown `model_type`, or a key that its class does not have.
    """
    kind = values.get("model_type")
    rest = {k: v for k, v in values.items() if k != "model_type"}
    try:
        known = AutoConfig.for_model(str(kind))
        config = AutoConfig.for_model(str(kind), **rest)
    except (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: a Hugging Face configuration is expected, found model_type={kind!r}: {text}"
        ) from error
    names = {*known.to_dict(), *known.attribute_map, *_OLD_KEYS}
    for key in rest:
        if key not in names and not hasattr(known, key):
            raise ConfigError(f"{where}.{key}: a key of {type(config).__name__} is expected; {nearest(key, names)}")
    _check_heads(config, "head_dim" in values, where)
    return config


def _check_heads(config: PretrainedConfig, has_head_dim: bool, where: str) -> None:
    """Refuses widths and head counts that do not divide, which transformers finds out in the middle of building a model."""
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if not isinstance(width, int) or not isinstance(heads, int):
        return
    if heads < 1 or width < 1 or (width % heads and not has_head_dim):
        raise ConfigError(
            f"{where}.num_attention_heads={heads} must be at least 1 and divide hidden_size={width}; change one of them"
        )
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int) and (groups < 1 or heads % groups):
        raise ConfigError(
            f"{where}.num_key_value_heads={groups} must be at least 1 and divide num_attention_heads={heads}; change one of them"
        )


def read_config(path: str, where: str) -> PretrainedConfig:
    """The configuration of a local Hugging Face folder; code in the folder is never run. Raises ConfigError."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"{where}: a folder with a Hugging Face config.json is expected, found {path}; check the path"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{where}: a configuration known to transformers is expected in {path}: {error}") from error


def _part_config(part: TowerConfig, where: str) -> PretrainedConfig:
    values = tower_config(part, where)
    if part.path is None:
        return hf_config(values, f"{where}.config")
    return AutoConfig.for_model(**values)


def _as_config(value: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    return AutoConfig.for_model(**value) if isinstance(value, dict) else value


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def _image_stats(part: TowerConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and deviation: from `preprocessor_config.json` beside the tower, else the family's."""
    if part.path is not None:
        file = Path(part.path) / "preprocessor_config.json"
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            if "image_mean" in content and "image_std" in content:
                return tuple(content["image_mean"]), tuple(content["image_std"])
    return _IMAGE_STATS[tower_config(part, "model.vision")["model_type"]]
