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
from mmscale.config.schema import ImageDataConfig, VideoDataConfig
from mmscale.config.specs import connector_stride, extra_tokens, grid_rows, media_specs, tower_config, vision_grid
from mmscale.errors import ConfigError
from mmscale.types import NEWLINE_TOKEN, AudioSpec, ImageSpec, VideoSpec


def specs_of(config, **image):
    return media_specs(config.model, config.data.model_copy(update={"image": ImageDataConfig(**image)}))


@pytest.mark.parametrize(
    "hf", [CLIPVisionConfig, SiglipVisionConfig, Dinov2Config, Dinov2WithRegistersConfig, WhisperConfig, Wav2Vec2Config]
)
def test_defaults_are_those_of_transformers(hf):
    table = {**specs._VISION_DEFAULTS, **specs._AUDIO_DEFAULTS}[hf.model_type]
    for key, value in table.items():
        theirs = getattr(hf(), key)
        assert (tuple(theirs) if isinstance(theirs, list) else theirs) == value, key


@pytest.mark.parametrize(
    ("size", "patch", "connector", "side"),
    [
        (28, 14, "linear", 2),
        (42, 14, "mlp_downsample", 2),
        (70, 14, "mlp_downsample_3x3", 2),
        (112, 14, "mlp_downsample_3x3", 3),
        (30, 14, "mlp2x_gelu", 2),
    ],
)
def test_image_rows_by_connector(size, patch, connector, side, tiny_config):
    config = tiny_config(vision={"image_size": size, "patch_size": patch}, vision_keys={"connector": connector})
    assert specs_of(config, mode="pad", fill=(1, 2, 3)).image == ImageSpec(size, side * side, "pad", (1, 2, 3), side)


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
    assert media_specs(model, config.data).image.tokens == 16
    assert tower_config(section, "model.vision")["model_type"] == "clip_vision_model"


def test_keys_absent_in_json_have_transformers_defaults(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {"image_size": 32}}))
    config = tiny_config()
    section = config.model.vision.model_copy(update={"config": None, "path": str(tmp_path)})
    assert media_specs(config.model.model_copy(update={"vision": section}), config.data).image.tokens == 4


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
        media_specs(config.model.model_copy(update={"vision": section}), config.data)


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
        media_specs(config.model, config.data)


def test_tiles_and_anyres_reach_the_spec(tiny_config):
    config = tiny_config(vision={"image_size": 42}, vision_keys={"connector": "mlp_downsample"})
    tiles = specs_of(config, mode="tiles", tiles={"min": 2, "max": 4, "thumbnail": False}).image
    assert (tiles.mode, tiles.min_tiles, tiles.max_tiles, tiles.thumbnail) == ("tiles", 2, 4, False)
    default = specs_of(config, mode="anyres").image
    assert default.grids == ((42, 84), (84, 42), (84, 84), (126, 42), (42, 126)) and default.side == 2
    assert (default.tokens, default.merge) == (4, "spatial_unpad")
    own = specs_of(config, mode="anyres", anyres={"grids": [[42, 42]], "merge": "flat"}).image
    assert (own.grids, own.merge) == (((42, 42),), "flat")


def test_settings_of_tiles_and_anyres_that_cannot_work_are_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"tiles\.min=3 must be at most data\.image\.tiles\.max=2"):
        specs_of(tiny_config(), mode="tiles", tiles={"min": 3, "max": 2})
    with pytest.raises(ConfigError, match=r"multiples of the tower's 28 pixels are expected, found \[28, 40\]"):
        specs_of(tiny_config(), mode="anyres", anyres={"grids": [[28, 56], [28, 40]]})
    kept = tiny_config(vision={"model_type": "clip_vision_model"}, vision_keys={"select_feature": "cls_patch"})
    for merge in ("spatial", "spatial_unpad"):
        with pytest.raises(ConfigError, match=f"merge={merge}.*select_feature=patch"):
            specs_of(kept, mode="anyres", anyres={"merge": merge})
    assert specs_of(kept, mode="anyres", anyres={"merge": "flat"}).image.tokens == 5
    assert specs_of(kept, mode="tiles").image.side == 0


@pytest.mark.parametrize(
    ("image", "tokens"),
    [
        ({}, ()),
        ({"mode": "anyres"}, (NEWLINE_TOKEN,)),
        ({"mode": "anyres", "anyres": {"merge": "spatial"}}, ()),
        ({"mode": "tiles"}, ()),
    ],
)
def test_only_lines_need_a_newline_token(image, tokens, tiny_config):
    assert extra_tokens(tiny_config().data.model_copy(update={"image": ImageDataConfig(**image)})) == tokens


def test_video_follows_the_data_section(tiny_config):
    config = tiny_config()
    data = config.data.model_copy(update={"video": VideoDataConfig(mode="fps", frames=5, fps=2.0, max_s=9.0)})
    assert media_specs(config.model, data).video == VideoSpec(5, "fps", 2.0, 9.0)
    assert media_specs(tiny_config(vision=None).model, data).video is None
