"""Media sizes from a model's configuration: equal to what transformers builds, refused when they do not fit."""

import json

import pytest
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from mmscale.config import specs
from mmscale.config.schema import ImageDataConfig
from mmscale.config.specs import connector_stride, grid_rows, media_specs, tower_config, vision_grid
from mmscale.errors import ConfigError
from mmscale.types import AudioSpec, ImageSpec


def specs_of(config, **image):
    return media_specs(config.model, ImageDataConfig(**image))


@pytest.mark.parametrize(
    "hf", [CLIPVisionConfig, SiglipVisionConfig, Dinov2Config, Dinov2WithRegistersConfig, WhisperConfig, Wav2Vec2Config]
)
def test_defaults_are_those_of_transformers(hf):
    table = {**specs._VISION_DEFAULTS, **specs._AUDIO_DEFAULTS}[hf.model_type]
    for key, value in table.items():
        theirs = getattr(hf(), key)
        assert (tuple(theirs) if isinstance(theirs, list) else theirs) == value, key


@pytest.mark.parametrize(
    ("size", "patch", "connector", "rows"),
    [
        (28, 14, "linear", 4),
        (42, 14, "mlp_downsample", 4),
        (70, 14, "mlp_downsample_3x3", 4),
        (30, 14, "mlp2x_gelu", 4),
    ],
)
def test_image_rows_by_connector(size, patch, connector, rows, tiny_config):
    config = tiny_config(vision={"image_size": size, "patch_size": patch}, vision_keys={"connector": connector})
    assert specs_of(config, mode="pad", fill=(1, 2, 3)).image == ImageSpec(size, rows, "pad", (1, 2, 3))


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("clip_vision_model", 1), ("siglip_vision_model", 0), ("dinov2", 1), ("dinov2_with_registers", 5)],
)
def test_prefix_tokens_come_from_the_family(kind, prefix):
    config = {"model_type": kind, "image_size": 28, "patch_size": 14, "num_register_tokens": 4 if prefix == 5 else 0}
    assert vision_grid(config).prefix == prefix


def test_class_tokens_are_rows_when_kept(tiny_config):
    config = tiny_config(vision={"model_type": "clip_vision_model"}, vision_keys={"select_feature": "cls_patch"})
    assert specs_of(config).image.tokens == 5
    folded = {"select_feature": "cls_patch", "connector": "mlp_downsample"}
    with pytest.raises(ConfigError, match="select_feature"):
        specs_of(tiny_config(vision={"model_type": "clip_vision_model"}, vision_keys=folded))
    assert specs_of(tiny_config(vision_keys={"select_feature": "cls_patch"})).image.tokens == 4, (
        "SigLIP has no class token"
    )


def test_composite_folder_gives_its_image_half(tiny_config, tmp_path):
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    CLIPConfig(vision_config=vision, text_config={"hidden_size": 8}).save_pretrained(tmp_path)
    config = tiny_config()
    section = config.model.vision.model_copy(update={"config": None, "path": str(tmp_path)})
    model = config.model.model_copy(update={"vision": section})
    assert media_specs(model, ImageDataConfig()).image.tokens == 16
    assert tower_config(section, "model.vision")["model_type"] == "clip_vision_model"


def test_keys_absent_in_json_have_transformers_defaults(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"image_size": 32}}))
    config = tiny_config()
    section = config.model.vision.model_copy(update={"config": None, "path": str(tmp_path)})
    assert media_specs(config.model.model_copy(update={"vision": section}), ImageDataConfig()).image.tokens == 4


def test_whisper(tiny_config):
    spec = specs_of(tiny_config()).audio
    assert spec == AudioSpec(16000, 3200, 10, "log_mel", mel_bins=8, hop_samples=160, fft_samples=400)
    for keys, word in (
        ({"window_s": 1.0}, "window_s=0.2"),
        ({"rate_hz": 8000}, "16000"),
        ({"features": "waveform"}, "log_mel"),
    ):
        with pytest.raises(ConfigError, match=word):
            specs_of(tiny_config(audio_keys=keys))
    with pytest.raises(ConfigError, match="no grid"):
        specs_of(tiny_config(audio_keys={"connector": "mlp_downsample"}))


def test_wav2vec2(tiny_config):
    config = tiny_config(audio_keys={"features": "waveform", "window_s": 0.1})
    config.model.audio.config.clear()
    config.model.audio.config.update(model_type="wav2vec2", conv_kernel=[10, 3], conv_stride=[5, 2], conv_dim=[8, 8])
    spec = specs_of(config).audio
    assert (spec.window_samples, spec.tokens, spec.features) == (1600, 159, "waveform")
    config.model.audio.config.update(add_adapter=True)
    with pytest.raises(ConfigError, match="adapter"):
        specs_of(config)
    short = tiny_config(audio_keys={"features": "waveform", "window_s": 0.0005})
    short.model.audio.config.clear()
    short.model.audio.config.update(model_type="wav2vec2")
    with pytest.raises(ConfigError, match="window_s"):
        specs_of(short)


def test_absent_parts_are_none(tiny_config):
    got = specs_of(tiny_config(vision=None, audio=None))
    assert got.image is None and got.audio is None


@pytest.mark.parametrize(
    ("vision", "keys", "word"),
    [
        ({"model_type": "vit"}, {}, "siglip_vision_model"),
        ({"image_size": [28, 56]}, {}, "image_size"),
        ({}, {"connector": "mlp2x_relu"}, "mlp_downsample_3x3"),
        ({}, {"connector": "mlp02x_gelu"}, "mlpNx_gelu"),
        ({}, {"connector": "mlp2x_gelu_"}, "mlpNx_gelu"),
    ],
)
def test_what_is_unknown_is_refused_with_the_list(vision, keys, word, tiny_config):
    with pytest.raises(ConfigError, match=word):
        specs_of(tiny_config(vision=vision, vision_keys=keys))


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_folder_is_refused_by_name(content, tiny_config, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    config = tiny_config()
    section = config.model.vision.model_copy(update={"config": None, "path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"config\.json"):
        media_specs(config.model.model_copy(update={"vision": section}), ImageDataConfig())


def test_strides_and_rows():
    assert [
        connector_stride(n) for n in ("linear", "mlp4x_gelu", "mlp_downsample_2x2_fix", "mlp_downsample_3x3_fix")
    ] == [*(1, 1, 2, 3)]
    assert grid_rows(5, 4, 2) == 6
    assert grid_rows(1, 1, 3) == 1


def test_wav2vec2_that_would_explode_on_silence_is_refused(tiny_config):
    keys = {"config": {"model_type": "wav2vec2", "feat_extract_norm": "layer"}, "features": "waveform", "window_s": 1.0}
    config = tiny_config(vision=None, audio_keys=keys)
    with pytest.raises(ConfigError, match="conv_bias=true"):
        media_specs(config.model, config.data.image)
