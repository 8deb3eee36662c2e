"""What a model takes as media, known from its configuration alone: sizes, rows per input, prefix tokens.

The one owner of these numbers: the data side plans with them, the model is checked against them. Tower configurations are
Hugging Face's JSON; where a key is absent the default of Hugging Face's class holds (table below). Nothing is imported
from transformers here.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from mmscale.config.schema import (
    AnyresConfig,
    AudioConfig,
    DataConfig,
    ImageDataConfig,
    ModelConfig,
    TilesConfig,
    TokenMergeConfig,
    TowerConfig,
    VisionConfig,
)
from mmscale.errors import ConfigError
from mmscale.registry import nearest
from mmscale.types import NEWLINE_TOKEN, AudioSpec, ImageSpec, MediaSpecs, VideoSpec

_HALF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Composite checkpoints, of which the image half is used."""

_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"image_size": 224, "patch_size": 32, "num_hidden_layers": 12, "hidden_size": 768},
    "siglip_vision_model": {"image_size": 224, "patch_size": 16, "num_hidden_layers": 12, "hidden_size": 768},
    "dinov2": {"image_size": 224, "patch_size": 14, "num_hidden_layers": 12, "hidden_size": 768},
    "dinov2_with_registers": {
        **{"image_size": 224, "patch_size": 16, "num_hidden_layers": 12, "hidden_size": 768},
        **{"num_register_tokens": 4},
    },
}
_AUDIO_DEFAULTS: dict[str, dict[str, Any]] = {
    "whisper": {"num_mel_bins": 80, "max_source_positions": 1500, "encoder_layers": 4, "d_model": 384},
    "wav2vec2": {
        **{"conv_stride": (5, 2, 2, 2, 2, 2, 2), "conv_kernel": (10, 3, 3, 3, 3, 2, 2), "num_hidden_layers": 12},
        **{"hidden_size": 768, "add_adapter": False},
    },
}
_WHISPER_HOP, _WHISPER_FFT, _WHISPER_RATE_HZ, _WHISPER_CONV_STRIDE = 160, 400, 16_000, 2

_STRIDES = {
    "linear": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3": 3,
    "mlp_downsample_3x3_fix": 3,
    "pixel_shuffle": 2,
    "patch_merger": 2,
    "token_merge": 1,
}
_ANYRES_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""The grids of LLaVA-NeXT in its order, (lines, columns) of tiles."""
_MLP = re.compile(r"mlp([1-9])x_gelu")


@dataclass(frozen=True, slots=True)
class VisionGrid:
    """What a vision tower gives for one image: `size` pixels per side, `side` x `side` patches after `prefix` tokens.

    `prefix` counts the class and register tokens that the tower puts before the patches.
    """

    size: int
    side: int
    prefix: int


def connector_stride(name: str) -> int:
    """Patches per side that a connector folds into one row. Raises ConfigError for an unknown connector.

    Example:
        >>> connector_stride("mlp2x_gelu"), connector_stride("mlp_downsample_3x3")
        (1, 3)
    """
    if mlp_depth(name) is not None:
        return 1
    if name not in _STRIDES:
        known = [*_STRIDES, "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"]
        raise ConfigError(
            f"a known connector is expected, found '{name}'; {nearest(name, known)}; "
            f"all: {', '.join(sorted(_STRIDES))}, mlpNx_gelu (N = 1 to 9)"
        )
    return _STRIDES[name]


def mlp_depth(name: str) -> int | None:
    """N of the connector name `mlpNx_gelu` (1 to 9), None for any other name."""
    match = _MLP.fullmatch(name)
    return int(match.group(1)) if match else None


def grid_rows(height: int, width: int, stride: int) -> int:
    """Connector rows of a grid of patches; odd grids are padded at the end.

    Example:
        >>> grid_rows(27, 28, 2)
        196
    """
    return -(-height // stride) * -(-width // stride)


def merged_rows(patches: int, merge: TokenMergeConfig) -> int:
    """Rows of `patches` patches that the connector `token_merge` leaves: `tokens`, or `ratio` of them rounded up.

    Example:
        >>> merged_rows(729, TokenMergeConfig(ratio=0.5)), merged_rows(729, TokenMergeConfig(tokens=64))
        (365, 64)
    """
    if merge.tokens is not None:
        return merge.tokens
    return math.ceil(Fraction(str(merge.ratio)) * patches)  # exact: 0.1 of 30 rows is 3 and not 4


def media_specs(model: ModelConfig, data: DataConfig) -> MediaSpecs:
    """The media that `model` takes and the connector rows of each, from its configuration.

    Raises:
        ConfigError: an unknown tower or connector, a `config.json` that cannot be read, or settings that do not fit the
            tower; the text names the key.
    """
    return MediaSpecs(
        image=None if model.vision is None else _image_spec(model.vision, data.image),
        video=None
        if model.vision is None
        else VideoSpec(data.video.frames, data.video.mode, data.video.fps, data.video.max_s),
        audio=None if model.audio is None else _audio_spec(model.audio),
    )


def extra_tokens(data: DataConfig) -> tuple[str, ...]:
    """The special tokens that the data needs in the tokenizer besides those of media and templates.

    Example:
        >>> extra_tokens(DataConfig(sources={"a": {"path": "a"}}, seq_len=64, image={"mode": "anyres"}))
        ('<image_newline>',)
    """
    has_lines = data.image.mode == "anyres" and data.image.anyres.merge == "spatial_unpad"
    return (NEWLINE_TOKEN,) if has_lines else ()


def tower_config(part: TowerConfig, where: str) -> dict[str, Any]:
    """The Hugging Face configuration of a tower with the defaults of the keys read here; composites give their image half.

    Args:
        part: the tower's section.
        where: its key (`model.vision`), for the error text.
    """
    raw = dict(part.config) if part.config is not None else read_hf_config(part.path or "", where)
    kind = raw.get("model_type")
    if kind in _HALF and where.endswith("vision"):
        raw = {**raw.get("vision_config", {}), "model_type": _HALF[kind]}
        kind = raw["model_type"]
    table = _VISION_DEFAULTS if where.endswith("vision") else _AUDIO_DEFAULTS
    if kind not in table:
        known = sorted([*table, *(_HALF if table is _VISION_DEFAULTS else ())])
        raise ConfigError(
            f"{where}: a tower with `model_type` in {known} is expected, found {kind!r}"
            + (f" in {part.path}/config.json" if part.path else "")
            + "; choose one of these towers"
        )
    return {**table[kind], **{k: v for k, v in raw.items() if v is not None}}


def vision_grid(config: dict[str, Any]) -> VisionGrid:
    """Image size, patch grid and prefix tokens of a vision tower's configuration (from `tower_config`)."""
    size, patch = (_one_number(config[key], key) for key in ("image_size", "patch_size"))
    kind = config["model_type"]
    prefix = 0 if kind == "siglip_vision_model" else 1 + int(config.get("num_register_tokens", 0))
    return VisionGrid(size=size, side=size // patch, prefix=prefix)


def _image_spec(part: VisionConfig, image: ImageDataConfig) -> ImageSpec:
    grid = vision_grid(tower_config(part, "model.vision"))
    stride = connector_stride(part.connector)
    side, rows = -(-grid.side // stride), grid_rows(grid.side, grid.side, stride)
    if part.select_feature == "cls_patch" and grid.prefix:
        if stride > 1 or part.connector == "token_merge":
            raise ConfigError(
                f"model.vision.connector={part.connector} takes a grid of patches, which class tokens are not part of; "
                f"found select_feature=cls_patch; set select_feature=patch or a connector without down-sampling"
            )
        side, rows = 0, rows + grid.prefix
    merge = _token_merge(part, rows)
    if merge is not None:
        side, rows = 0, merged_rows(rows, merge)
    spec = ImageSpec(size=grid.size, tokens=rows, mode=image.mode, fill=image.fill, side=side)
    if image.mode == "tiles":
        return _with_tiles(spec, image.tiles)
    if image.mode != "anyres":
        return spec
    if merge is not None and image.anyres.merge != "flat":
        raise ConfigError(
            f"data.image.anyres.merge={image.anyres.merge} joins the tiles' grids of patches, which merged rows no longer form; "
            f"found model.vision.connector=token_merge; set data.image.anyres.merge=flat, or a connector that keeps the grid"
        )
    return _with_grids(spec, image.anyres)


def _token_merge(part: VisionConfig, patches: int) -> TokenMergeConfig | None:
    """The settings of the connector `token_merge`, None with another one. Raises ConfigError when they do not belong together."""
    merge = part.token_merge
    if part.connector != "token_merge":
        if merge is not None:
            raise ConfigError(
                f"model.vision.token_merge belongs to model.vision.connector=token_merge, found connector={part.connector}; "
                f"remove the key or set the connector"
            )
        return None
    if merge is None or (merge.ratio is None) == (merge.tokens is None):
        found = "none" if merge is None or merge.ratio is None else f"ratio={merge.ratio:g} and tokens={merge.tokens}"
        raise ConfigError(
            f"model.vision.connector=token_merge: exactly one of model.vision.token_merge.ratio and .tokens is expected, "
            f"found {found}; set one of them"
        )
    if merge.tokens is not None and merge.tokens > patches:
        raise ConfigError(
            f"model.vision.token_merge.tokens: at most the tower's {patches} rows per image are expected, "
            f"found {merge.tokens}; lower it"
        )
    return merge


def _with_tiles(spec: ImageSpec, tiles: TilesConfig) -> ImageSpec:
    if tiles.min > tiles.max:
        raise ConfigError(
            f"data.image.tiles.min={tiles.min} must be at most data.image.tiles.max={tiles.max}; change one of them"
        )
    return replace(spec, min_tiles=tiles.min, max_tiles=tiles.max, thumbnail=tiles.thumbnail)


def _with_grids(spec: ImageSpec, anyres: AnyresConfig) -> ImageSpec:
    size = spec.size
    for grid in anyres.grids or ():
        if any(pixels % size for pixels in grid):
            raise ConfigError(
                f"data.image.anyres.grids: multiples of the tower's {size} pixels are expected, found {list(grid)}; "
                f"correct it, or remove the key for the grids of LLaVA-NeXT"
            )
    if anyres.merge != "flat" and not spec.side:
        raise ConfigError(
            f"data.image.anyres.merge={anyres.merge} joins the tiles' grids of patches, which class tokens are not part of; "
            f"found model.vision.select_feature=cls_patch; set select_feature=patch, or merge=flat"
        )
    grids = anyres.grids or tuple((lines * size, columns * size) for lines, columns in _ANYRES_TILES)
    return replace(spec, grids=grids, merge=anyres.merge)


def _audio_spec(part: AudioConfig) -> AudioSpec:
    config = tower_config(part, "model.audio")
    if connector_stride(part.connector) != 1 or part.connector == "token_merge":
        raise ConfigError(
            f"model.audio.connector: a connector without down-sampling is expected (sound has no grid), "
            f"found {part.connector}; set linear or mlpNx_gelu"
        )
    expected = "log_mel" if config["model_type"] == "whisper" else "waveform"
    if part.features != expected:
        raise ConfigError(
            f"model.audio.features={part.features} does not fit a {config['model_type']} tower; set {expected}"
        )
    return _whisper_spec(part, config) if expected == "log_mel" else _wav2vec2_spec(part, config)


def _whisper_spec(part: AudioConfig, config: dict[str, Any]) -> AudioSpec:
    tokens = int(config["max_source_positions"])
    window = tokens * _WHISPER_CONV_STRIDE * _WHISPER_HOP
    if part.rate_hz != _WHISPER_RATE_HZ:
        raise ConfigError(
            f"model.audio.rate_hz: {_WHISPER_RATE_HZ} Hz is expected by Whisper, found {part.rate_hz}; remove the key"
        )
    if abs(part.window_s * part.rate_hz - window) > 0.5:
        raise ConfigError(
            f"model.audio.window_s: {window / part.rate_hz:g} s is expected (max_source_positions={tokens} x 20 ms), "
            f"found {part.window_s:g} s; set window_s={window / part.rate_hz:g}"
        )
    return AudioSpec(
        rate_hz=part.rate_hz,
        window_samples=window,
        tokens=tokens,
        features="log_mel",
        mel_bins=int(config["num_mel_bins"]),
        hop_samples=_WHISPER_HOP,
        fft_samples=_WHISPER_FFT,
    )


def _wav2vec2_spec(part: AudioConfig, config: dict[str, Any]) -> AudioSpec:
    if config["add_adapter"]:
        raise ConfigError(
            "model.audio: a wav2vec2 tower without adapter is expected, found add_adapter=true; set it false"
        )
    if config.get("feat_extract_norm") == "layer" and not config.get("conv_bias"):
        raise ConfigError(
            "model.audio: a wav2vec2 tower with layer norms in its convolutions needs conv_bias=true, found false: on the exact "
            "silence behind a short clip its gradient explodes; set conv_bias=true or feat_extract_norm=group"
        )
    window = round(part.window_s * part.rate_hz)
    tokens = window
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        tokens = (tokens - kernel) // stride + 1
    if tokens < 1:
        raise ConfigError(
            f"model.audio.window_s={part.window_s:g} is shorter than one output of the tower's convolutions; lengthen it"
        )
    return AudioSpec(rate_hz=part.rate_hz, window_samples=window, tokens=tokens, features="waveform")


def _one_number(value: Any, key: str) -> int:
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(values) != 1 or not isinstance(next(iter(values)), int):
        raise ConfigError(
            f"model.vision: one integer is expected for {key} (square images), found {value!r}; use another tower"
        )
    return int(next(iter(values)))


def read_hf_config(folder: str, where: str) -> dict[str, Any]:
    """The `config.json` of a Hugging Face folder; `where` is the key that names it. Raises ConfigError."""
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}.path: a folder with a Hugging Face config.json is expected, found {path}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where}.path: a JSON object is expected in {path}, found {type(content).__name__}; use another folder"
        )
    return content
