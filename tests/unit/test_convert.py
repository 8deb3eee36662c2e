"""Exports by names: a stock LLaVA model opened by transformers alone gives our logits; what does not fit is refused."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from mmscale.config.schema import ImageDataConfig
from mmscale.config.specs import media_specs
from mmscale.errors import ConfigError
from mmscale.model.composite import build_model
from mmscale.model.convert import export_plan, to_llava
from mmscale.model.description import describe
from mmscale.model.hub import register
from mmscale.model.towers.vision import normalised

CLIP = {"model_type": "clip_vision_model", "projection_dim": 8}
IDS = {"image": 90, "audio": 92}


def make(config):
    specs = media_specs(config.model, config.data)
    model = build_model(config, 97, specs).eval()
    return model, specs, describe(config.model, 97, specs, media_token_ids=IDS, template="plain")


def write(plan, model, folder):
    """The folder that a plan asks for; both names of a tied head are offered, as a checkpoint may hold both."""
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        target = plan.rename(name)
        if target is not None:
            assert target not in tensors
            tensors[target] = tensor.detach().clone()
    for name, (shape, value) in plan.constants.items():
        assert name not in tensors
        tensors[name] = torch.full(shape, value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan.config.save_pretrained(folder)
    return tensors


COMPOSITIONS = {
    "siglip, llama, layer -1": ({}, {}, {"select_layer": -1}),
    "siglip, mistral, layer -2": ({"model_type": "mistral", "sliding_window": 6}, {}, {"select_layer": -2}),
    "clip, tied qwen2, layer -2": ({"model_type": "qwen2", "tie_word_embeddings": True}, CLIP, {"select_layer": -2}),
    "clip, gemma, cls_patch": ({"model_type": "gemma", "head_dim": 8}, CLIP, {"select_feature": "cls_patch"}),
    "clip, qwen3, no layer": ({"model_type": "qwen3", "head_dim": 8}, CLIP, {"select_layer": None}),
    "siglip, stablelm, layer 1": ({"model_type": "stablelm"}, {}, {"select_layer": 1}),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_stock_llava_opens_the_export_and_gives_equal_logits(name, tiny_config, make_pack, tmp_path, seed):
    llm, vision, keys = COMPOSITIONS[name]
    model, specs, config = make(tiny_config(llm=llm, vision=vision, vision_keys=keys))
    plan = export_plan(config, "llava", drop=("audio",))
    assert plan.target == "llava"
    assert plan.left_out == ("audio",)
    tensors = write(plan, model, tmp_path)
    assert not any("audio" in n for n in tensors)
    assert ("language_model.lm_head.weight" in tensors) == (not config.tie_word_embeddings)
    llava, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    tokens = specs.image.tokens
    pack = make_pack(specs, [[("text", 5), ("image", 1), ("text", 7)]], seed, vocab=90)
    ids = pack.input_ids.clone()
    ids[5 : 5 + tokens] = IDS["image"]
    tower = model.vision.tower
    pixels = normalised(pack.media["image"].data, tower.mean, tower.std, torch.float32)
    with torch.no_grad():
        theirs = llava.eval()(input_ids=ids[None], pixel_values=pixels).logits[0]
        ours = model.logits(pack, torch.arange(pack.num_tokens))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is LlavaForConditionalGeneration


def test_our_own_class_opens_the_other_exports(tiny_config, make_pack, tmp_path, seed):
    model, specs, config = make(tiny_config(vision_keys={"connector": "mlp_downsample"}))
    plan = export_plan(config, "auto")
    assert (plan.target, plan.left_out, plan.constants) == ("mmscale", (), {})
    write(plan, model, tmp_path)
    register()
    opened, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert sorted(opened.state_dict()) == sorted(model.state_dict())


def test_dropping_a_part_leaves_a_working_model(tiny_config, tmp_path):
    model, _, config = make(tiny_config())
    plan = export_plan(config, "mmscale", drop=("audio",))
    tensors = write(plan, model, tmp_path)
    register()
    opened, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert opened.audio is None and opened.vision is not None
    assert opened.config.media_token_ids == {"image": 90}
    assert all(n.startswith(("llm.", "vision.")) for n in tensors)


@pytest.mark.parametrize(
    ("parts", "drop", "reason"),
    [
        ({}, (), "audio part"),
        ({"vision_keys": {"connector": "linear"}}, ("audio",), "not mlp2x_gelu"),
        ({"vision_keys": {"connector": "mlp3x_gelu"}}, ("audio",), "not mlp2x_gelu"),
        ({"vision_keys": {"select_layer": None}}, ("audio",), "final norm"),
        ({"vision": None}, ("audio",), "no vision part"),
        ({}, ("audio", "vision"), "no vision part"),
        ({"llm": {"model_type": "phi"}}, ("audio",), "head has a bias"),
    ],
)
def test_what_does_not_fit_llava_is_refused_with_the_reason(parts, drop, reason, tiny_config):
    _, _, config = make(tiny_config(**parts))
    with pytest.raises(ConfigError, match=reason):
        export_plan(config, "llava", drop=drop)
    assert export_plan(config, "auto", drop=drop).target == "mmscale"


@pytest.mark.parametrize("mode", ["pad", "tiles", "anyres"])
def test_image_modes_without_a_stock_counterpart_do_not_fit_llava(mode, tiny_config):
    config = tiny_config(audio=None)
    data = config.data.model_copy(update={"image": ImageDataConfig(mode=mode)})
    _, _, description = make(config.model_copy(update={"data": data}))
    with pytest.raises(ConfigError, match=f"data.image.mode={mode}, not resize or square"):
        export_plan(description, "llava")
    assert export_plan(description, "auto").target == "mmscale"


def test_dinov2_does_not_fit_llava(tiny_config):
    config = tiny_config()
    config.model.vision.config.clear()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config.model.vision.config.update(model_type="dinov2", **small)
    _, _, description = make(config)
    with pytest.raises(ConfigError, match="dinov2, not CLIP or SigLIP"):
        export_plan(description, "llava", drop=("audio",))


def test_unknown_parts_cannot_be_dropped(tiny_config):
    _, _, config = make(tiny_config())
    with pytest.raises(ConfigError, match="vison"):
        export_plan(config, "auto", drop=("vison",))


def test_names_of_other_parts_have_no_llava_name():
    assert to_llava("audio.connector.0.weight") is None
    assert to_llava("vision.connector.4.weight") is None
    assert to_llava("vision_llm.x") is None
