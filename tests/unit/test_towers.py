"""Towers equal transformers' hidden states, run no unused layer, keep no unused parameter; weights from folders."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPModel,
    LlamaConfig,
    SiglipModel,
    WhisperForConditionalGeneration,
)

from mmscale.config.specs import media_specs
from mmscale.errors import ConfigError
from mmscale.model.composite import build_model
from mmscale.model.description import describe, hf_config
from mmscale.model.encoder import build_audio, build_vision
from mmscale.model.llm.load import load_llm
from mmscale.model.towers.build import kept_layers
from mmscale.model.towers.vision import normalised

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
VISION = {
    "clip_vision_model": {**SMALL, "intermediate_size": 40},
    "siglip_vision_model": {**SMALL, "intermediate_size": 40},
    "dinov2": {**SMALL, "mlp_ratio": 2},
    "dinov2_with_registers": {**SMALL, "mlp_ratio": 2, "num_register_tokens": 3},
}
PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 4}
WAV2VEC2 = {
    **{
        "model_type": "wav2vec2",
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    },
    **{"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}


def replace_config(section, values):
    section.config.clear()
    section.config.update(values)


def description_of(config):
    return describe(config.model, 97, media_specs(config.model, config.data))


def save_full(kind, values, folder, seed):
    torch.manual_seed(seed)
    model = AutoModel.from_config(hf_config({"model_type": kind, **values}, "test")).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("layer", [None, 0, 1, -2, -1])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_vision_features_equal_hidden_states(kind, layer, feature, tiny_config, tmp_path, seed):
    full = save_full(kind, VISION[kind], tmp_path, seed)
    config = tiny_config(audio=None, vision_keys={"config": None, "path": str(tmp_path)})
    section = config.model.vision.model_copy(update={"select_layer": layer, "select_feature": feature})
    config = config.model_copy(update={"model": config.model.model_copy(update={"vision": section})})
    encoder = build_vision(description_of(config), str(tmp_path))
    layers = [m for n, m in encoder.tower.named_modules() if n.endswith((".layers", ".layer"))]
    assert [len(x) for x in layers] == [kept_layers(layer, 3, "")]
    calls = []
    for module in layers[0]:
        module.register_forward_hook(lambda *_: calls.append(1))
    pixels = torch.randn(2, 3, 28, 28)
    got = encoder.tower(pixels)
    assert len(calls) == kept_layers(layer, 3, ""), "layers above the selected one are not run"
    with torch.no_grad():
        out = full(pixels, output_hidden_states=True)
    expected = out.last_hidden_state if layer is None else out.hidden_states[layer]
    expected = expected[:, PREFIX[kind] :] if feature == "patch" else expected
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert encoder(pixels).shape[1] == encoder.rows
    encoder(pixels).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("composite", [CLIPModel, SiglipModel])
def test_text_half_of_a_composite_checkpoint_is_dropped(composite, tiny_config, tmp_path, seed):
    torch.manual_seed(seed)
    half = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    full = composite(
        composite.config_class(
            vision_config={**half, "image_size": 28, "patch_size": 14},
            text_config={**half, "vocab_size": 30, "max_position_embeddings": 8, "projection_size": 32},
        )
    ).eval()
    full.save_pretrained(tmp_path)
    config = tiny_config(audio=None, vision_keys={"config": None, "path": str(tmp_path), "select_layer": -2})
    tower = build_vision(description_of(config), str(tmp_path)).tower
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        states = full.vision_model(pixels, output_hidden_states=True).hidden_states
    drop = 1 if composite is CLIPModel else 0
    torch.testing.assert_close(tower(pixels), states[-2][:, drop:], atol=1e-6, rtol=1e-5)
    assert not any("text" in n for n, _ in tower.named_parameters())


def test_uint8_pixels_are_normalised_with_the_folders_numbers(tiny_config, tmp_path, seed):
    save_full("siglip_vision_model", VISION["siglip_vision_model"], tmp_path, seed)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    tower = build_vision(
        description_of(tiny_config(vision_keys={"config": None, "path": str(tmp_path)})), str(tmp_path)
    ).tower
    pixels = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    floats = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(tower(pixels), tower(floats), atol=1e-5, rtol=1e-5)


def test_normalised_pixels_are_exact_in_fp32_and_rounded_once_in_bf16():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    exact = (pixels.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[
        :, None, None
    ]
    values = normalised(pixels, mean, std, torch.float32)
    assert values.shape == pixels.shape and values.dtype == torch.float32
    assert (values - exact).abs().max() < 4e-7  # of values up to 2.3: two units in the last place
    assert torch.equal(normalised(pixels, mean, std, torch.bfloat16), values.bfloat16())
    assert normalised(pixels[:0], mean, std, torch.bfloat16).shape == (0, 3, 1, 256)


@pytest.mark.parametrize("layer", [None, 0, 1, -2, -1])
def test_whisper_features_equal_hidden_states(layer, tiny_config, tmp_path, seed):
    torch.manual_seed(seed)
    config = tiny_config(vision=None)
    full = WhisperForConditionalGeneration(hf_config(config.model.audio.config, "test")).eval()
    full.save_pretrained(tmp_path)
    config = tiny_config(vision=None, audio_keys={"config": None, "path": str(tmp_path), "select_layer": layer})
    tower = build_audio(description_of(config), str(tmp_path)).tower
    windows = torch.randn(3, 8, 20)
    raw = []
    encoder = full.get_encoder()
    encoder.layers[-1].register_forward_hook(lambda _m, _a, out: raw.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        out = encoder(windows, output_hidden_states=True)
    # transformers puts the final norm into the last hidden state; "no norm" is what the last layer gave.
    expected = {None: out.last_hidden_state, -1: raw[0]}.get(layer, out.hidden_states[layer or 0])
    torch.testing.assert_close(tower(windows), expected, atol=1e-6, rtol=1e-5)
    assert not any("decoder" in n for n, _ in tower.named_parameters())


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("layer", [None, 1, -1])
def test_wav2vec2_features_equal_hidden_states(stable, layer, tiny_config, tmp_path, seed):
    norms = {"feat_extract_norm": "layer", "conv_bias": True} if stable else {"feat_extract_norm": "group"}
    values = {**WAV2VEC2, "do_stable_layer_norm": stable, **norms}
    full = save_full("wav2vec2", {k: v for k, v in values.items() if k != "model_type"}, tmp_path, seed)
    keys = {"config": None, "path": str(tmp_path), "features": "waveform", "window_s": 0.02, "select_layer": layer}
    encoder = build_audio(description_of(tiny_config(vision=None, audio_keys=keys)), str(tmp_path)).train()
    waves = torch.randn(2, 320)
    with torch.no_grad():
        out = full(waves, output_hidden_states=True)
    expected = out.last_hidden_state if layer is None else out.hidden_states[layer]
    got = encoder.tower(waves)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert got.shape[1] == encoder.rows
    assert torch.equal(got, encoder.tower(waves)), "no randomness in training"
    encoder(waves).sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("layer", [4, -5])
def test_layers_that_do_not_exist_are_refused(layer):
    with pytest.raises(ConfigError, match="from -4 to 3"):
        kept_layers(layer, 3, "model.vision")


def test_missing_tower_weights_are_refused(tiny_config, tmp_path, seed):
    from safetensors.torch import load_file, save_file

    save_full("siglip_vision_model", VISION["siglip_vision_model"], tmp_path, seed)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(n for n in tensors if "layers.0.mlp.fc1.weight" in n)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="fc1"):
        build_vision(description_of(tiny_config(vision_keys={"config": None, "path": str(tmp_path)})), str(tmp_path))


def test_towers_attend_with_sdpa(tiny_config):
    config = tiny_config()
    model = build_model(config, 97, media_specs(config.model, config.data))
    for tower in (model.vision.tower, model.audio.tower):
        assert tower.model.config._attn_implementation == "sdpa"
    assert model.llm.config._attn_implementation == "mmscale_packed"


@pytest.mark.parametrize("tied", [False, True])
def test_language_model_from_a_folder_grows_by_the_mean_row(tied, tiny_config, tmp_path, seed):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    full = AutoModelForCausalLM.from_config(
        LlamaConfig(**small, vocab_size=50, tie_word_embeddings=tied, pad_token_id=3)
    )
    full.save_pretrained(tmp_path)
    config = tiny_config(vision=None, audio=None)
    section = config.model.llm.model_copy(update={"config": None, "path": str(tmp_path)})
    model = config.model.model_copy(update={"llm": section})
    specs = media_specs(model, config.data)
    grown = load_llm(describe(model, 64, specs).text_config, str(tmp_path))
    for mine, old in (
        (grown.get_input_embeddings().weight, full.get_input_embeddings().weight),
        (grown.get_output_embeddings().weight, full.get_output_embeddings().weight),
    ):
        assert mine.shape == (64, 16)
        assert torch.equal(mine[:50], old)
        torch.testing.assert_close(mine[50:], old.mean(0).expand(14, -1))
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied
    assert grown.get_input_embeddings().padding_idx is None, "the padding token may be the end token"
    kept = load_llm(describe(model, 40, specs).text_config, str(tmp_path))
    assert kept.config.vocab_size == 50, "a checkpoint keeps its rows"


def test_a_folder_that_is_no_model_is_refused(tiny_config, tmp_path):
    config = tiny_config(vision=None, audio=None)
    section = config.model.llm.model_copy(update={"config": None, "path": str(tmp_path / "none")})
    model = config.model.model_copy(update={"llm": section})
    with pytest.raises(ConfigError, match=r"model\.llm\.path"):
        describe(model, 64, media_specs(model, config.data))
