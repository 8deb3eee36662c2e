"""The composite model: packs equal documents, zero rows, label counts, one gradient for every parameter."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mmscale.config.specs import media_specs
from mmscale.errors import ConfigError
from mmscale.model.batch import ModelBatch
from mmscale.model.composite import build_model, skeleton

FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": None},
    "gemma": {"head_dim": 8},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"sliding_window": 7},
    "stablelm": {},
}
DOCUMENTS = [
    [("text", 3), ("image", 1), ("text", 9)],
    [("text", 1)],
    [("audio", 3300), ("text", 4), ("image", 1), ("text", 2)],
    [("text", 23)],
]


def build(config, vocab=97):
    specs = media_specs(config.model, config.data)
    return build_model(config, vocab, specs), specs


def all_logits(model, pack):
    with torch.no_grad():
        return model.logits(pack, torch.arange(pack.num_tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_each_document_alone(family, tiny_config, make_pack, seed):
    model, specs = build(tiny_config(llm={"model_type": family, **FAMILIES[family]}))
    pack = make_pack(specs, DOCUMENTS, seed)
    logits = all_logits(model, pack)
    # A pack of one document goes through plain Hugging Face attention as the reference.
    model.llm.set_attn_implementation("eager" if family == "gpt_oss" else "sdpa")  # torch's own knows no sinks
    rows, start = {"image": 0, "audio": 0}, 0
    for document in DOCUMENTS:
        kinds = [k for k, _ in document if k != "text"]
        alone = make_pack(specs, [document], seed)
        end = start + alone.num_tokens
        media = {}
        for kind in kinds:
            n = alone.media[kind].data.shape[0]
            media[kind] = replace(alone.media[kind], data=pack.media[kind].data[rows[kind] : rows[kind] + n])
            rows[kind] += n
        alone = replace(alone, input_ids=pack.input_ids[start:end], media=media)
        got = all_logits_without_pack(model, alone)
        torch.testing.assert_close(logits[start:end], got, atol=1e-5, rtol=1e-5)
        start = end


def all_logits_without_pack(model, pack):
    with torch.no_grad():
        embeds = model._embed(ModelBatch.of(pack))
        return model.llm(inputs_embeds=embeds[None], position_ids=pack.position_ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt_oss"])
def test_changing_one_document_leaves_the_others_bit_identical(family, tiny_config, make_pack, seed):
    model, specs = build(tiny_config(llm={"model_type": family, **FAMILIES[family]}))
    pack = make_pack(specs, DOCUMENTS, seed)
    before = all_logits(model, pack)
    changed = pack.input_ids.clone()
    start, end = pack.cu_seqlens[2], pack.cu_seqlens[3]
    changed[start:end] = (changed[start:end] + 1) % 97
    pixels = pack.media["image"].data.clone()
    pixels[1] = 255 - pixels[1]
    media = {**pack.media, "image": replace(pack.media["image"], data=pixels)}
    after = all_logits(model, replace(pack, input_ids=changed, media=media))
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])


def test_loss_is_the_sum_over_targets_in_fp32(tiny_config, make_pack, seed):
    model, specs = build(tiny_config())
    pack = make_pack(specs, DOCUMENTS, seed)
    loss = model(pack)
    assert loss.dtype == torch.float32
    logits = all_logits(model, pack).double()
    expected = F.cross_entropy(logits, pack.labels, ignore_index=-100, reduction="sum")
    assert pack.num_targets > 1
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert model.logits(pack).shape == (pack.num_targets, 97), "only target rows reach the head"


@pytest.mark.parametrize(
    "documents", [DOCUMENTS, [[("text", 6)]], [[("text", 3), ("image", 1)]], [[("video", 3), ("text", 2)]]]
)
@pytest.mark.parametrize("target_share", [0.0, 0.9])
def test_every_parameter_always_gets_a_gradient(documents, target_share, tiny_config, make_pack, seed):
    model, specs = build(tiny_config(audio_keys={"connector": "mlp2x_gelu"}))
    pack = make_pack(specs, documents, seed, target_share=target_share)
    loss = model(pack)
    loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trainable.items() if p.grad is None] == []
    fixed = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["audio.tower.model.embed_positions.weight"], "Whisper's table of positions is not trained"
    if target_share == 0.0:
        assert loss.item() == 0.0
        assert all(p.grad.abs().max() == 0 for p in trainable.values())
    if all(kind != "audio" for d in documents for kind, _ in d):
        assert all(p.grad.abs().max() == 0 for n, p in trainable.items() if n.startswith("audio."))


def test_absent_modality_does_not_change_the_loss(tiny_config, make_pack, seed):
    full, specs = build(tiny_config())
    text_only, _ = build(tiny_config(vision=None, audio=None))
    text_only.llm.load_state_dict(full.llm.state_dict())
    pack = make_pack(specs, [[("text", 12)], [("text", 5)]], seed, target_share=1.0)
    assert full(pack).item() == text_only(pack).item() != 0


def test_media_without_an_encoder_is_refused(tiny_config, make_pack, seed):
    _, specs = build(tiny_config())
    model, _ = build(tiny_config(vision=None))
    with pytest.raises(ConfigError, match=r"model\.vision"):
        model(make_pack(specs, DOCUMENTS, seed))


def test_image_and_video_rows_follow_each_other(tiny_config, make_pack, seed):
    model, specs = build(tiny_config())
    pack = make_pack(specs, [[("video", 2), ("text", 1), ("image", 1), ("text", 2)]], seed)
    embeds = model._embed(ModelBatch.of(pack))
    video = model.vision(pack.media["video"].data).flatten(0, 1)
    image = model.vision(pack.media["image"].data).flatten(0, 1)
    torch.testing.assert_close(embeds[: 2 * 4], video)
    torch.testing.assert_close(embeds[9:13], image)


def test_parts_are_disjoint_complete_and_have_exact_prefixes(tiny_config):
    model, _ = build(tiny_config())
    parts, prefixes = model.parts(), model.part_prefixes()
    assert list(parts) == ["llm", "vision", "vision_connector", "audio", "audio_connector"] == list(prefixes)
    names = []
    for part, module in parts.items():
        names += [prefixes[part] + n for n, _ in module.named_parameters()]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_weights_follow_the_seed_and_leave_the_global_state_alone(tiny_config):
    state = torch.get_rng_state()
    first, _ = build(tiny_config())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second, _ = build(tiny_config())
    other, _ = build(tiny_config(train={"seed": 1}))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    name = "llm.lm_head.weight"
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("family", ["llama", "stablelm", "mixtral"])
def test_activation_checkpointing_gives_equal_gradients(family, tiny_config, make_pack, seed):
    llm = {"model_type": family, **FAMILIES[family]}
    plain, specs = build(tiny_config(llm=llm))
    saving, _ = build(tiny_config(llm=llm, train={"checkpoint_activations": True}))
    packs = [make_pack(specs, DOCUMENTS, seed), make_pack(specs, DOCUMENTS[::-1], seed)]
    runs = []
    for model in (plain, saving):
        calls = []
        for layers in (model.llm.model.layers, model.vision.tower.model.encoder.layers, model.audio.tower.model.layers):
            layers[0].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sum(model(pack) for pack in packs).backward()  # the first pack is recomputed after the second one's forward
        runs.append(len(calls))
    assert runs == [6, 12], "each checkpointed layer runs once more in the backward pass"
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["autocast", "module"])
def test_bf16_runs_and_is_near_fp32(mode, tiny_config, make_pack, seed):
    model, specs = build(tiny_config())
    pack = make_pack(specs, DOCUMENTS, seed)
    reference = model(pack).item()
    if mode == "module":
        model = model.to(torch.bfloat16)
        loss = model(pack)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pack)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference, rel=0.02)


def test_skeleton_on_the_meta_device_has_the_same_names_and_shapes(tiny_config):
    model, _ = build(tiny_config())
    with torch.device("meta"):
        empty = skeleton(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    shapes = [{n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, empty)]
    assert shapes[0] == shapes[1]


def test_tied_embeddings_stay_tied(tiny_config, make_pack, seed):
    model, specs = build(tiny_config(llm={"tie_word_embeddings": True}))
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    model(make_pack(specs, DOCUMENTS, seed)).backward()


@pytest.mark.parametrize(
    ("llm", "reason"),
    [
        ({"model_type": "gemma2"}, "soft-cap"),
        ({"model_type": "gpt2", "num_key_value_heads": None}, "not known"),
        ({"attention_dropout": 0.1}, "attention dropout"),
        ({"hiden_size": 3}, "hidden_size"),
        ({"model_type": "nonsense"}, "model_type"),
    ],
)
def test_models_that_would_be_wrong_are_refused_when_built(llm, reason, tiny_config):
    config = tiny_config(llm=llm)
    if llm.get("model_type") == "gpt2":
        config.model.llm.config.clear()
        config.model.llm.config.update(model_type="gpt2", n_layer=1, n_head=2, n_embd=8)
    with pytest.raises(ConfigError, match=reason):
        build(config)
