"""The Hugging Face class: round trip, names, generation equal in a batch, alone and packed."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mmscale.config.schema import ImageDataConfig, VideoDataConfig
from mmscale.config.specs import media_specs
from mmscale.errors import DataError
from mmscale.kernels.placement import media_positions
from mmscale.model.composite import build_model
from mmscale.model.description import describe
from mmscale.model.hub import MmscaleForConditionalGeneration, media_inputs, register
from mmscale.streaming.collate import collate
from mmscale.types import MODALITIES, EncodedMedia, EncodedSample, MediaBatch, PackedBatch

IDS = {"image": 90, "video": 91, "audio": 92}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": list(IDS.values())}


@pytest.fixture
def pair(tiny_config, tmp_path, request):
    """A training model and the same weights saved and reopened through an Auto class."""
    config = tiny_config(llm=getattr(request, "param", {}), audio_keys={"connector": "mlp2x_gelu"})
    specs = media_specs(config.model, config.data)
    ours = build_model(config, 97, specs).eval()
    hub = MmscaleForConditionalGeneration(describe(config.model, 97, specs, media_token_ids=IDS, template="plain"))
    hub.load_state_dict(ours.state_dict())
    hub.save_pretrained(tmp_path)
    register()
    register()
    opened, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return ours, opened.eval(), specs, tmp_path


PROMPTS = [
    [5, 6, ("image", 1), 7, 8, 9],
    [10, ("audio", 4400), 11],
    [12],
    [("image", 2), 13, ("audio", 1000), ("video", 2), 14],
]


def fill(prompt, specs, g):
    """(ids, inputs by modality, rows of each clip) of a prompt in the small notation above."""
    ids, media, clips = [], {"image": [], "video": [], "audio": []}, []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
            continue
        kind, amount = item
        rows = specs.audio.num_tokens(amount) if kind == "audio" else amount * specs.image.tokens
        ids += [IDS[kind]] * rows
        if kind == "audio":
            clips.append(rows)
            media[kind].append(torch.randn(-(-rows // specs.audio.tokens), 8, 20, generator=g))
        else:
            media[kind].append(torch.randint(0, 256, (amount, 3, 28, 28), dtype=torch.uint8, generator=g))
    return ids, media, clips


def inputs_of(filled):
    width = max(len(ids) for ids, _, _ in filled)
    arguments = {
        "input_ids": torch.tensor([[0] * (width - len(ids)) + ids for ids, _, _ in filled]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _, _ in filled]),
    }
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos"), ("audio", "input_features")):
        data = [x for _, media, _ in filled for x in media[kind]]
        if data:
            arguments[name] = torch.cat(data)
    clips = [c for _, _, rows in filled for c in rows]
    return {**arguments, "feature_rows": torch.tensor(clips)} if clips else arguments


def answers(model, filled, tokens):
    arguments = inputs_of(filled)
    with torch.no_grad():
        out = model.generate(**arguments, max_new_tokens=tokens, **GREEDY)
    return out[:, arguments["input_ids"].shape[1] :].tolist()


def pack_argmax(model, specs, filled, tokens):
    """Greedy answers of the training model: one pack of all prompts, run anew for every token."""
    made = [[] for _ in filled]
    for _ in range(tokens):
        documents = [ids + new for (ids, _, _), new in zip(filled, made, strict=True)]
        pack = pack_by_hand(specs, documents, filled)
        last = torch.tensor(pack.lengths).cumsum(0) - 1
        with torch.no_grad():
            logits = model.logits(pack, last)
        logits[:, list(IDS.values())] = -torch.inf
        chosen = logits.argmax(-1).tolist()
        for new, token in zip(made, chosen, strict=True):
            new.append(token)
    return made


def pack_by_hand(specs, documents, filled):
    flat = torch.tensor([t for d in documents for t in d])
    source, base, media = torch.arange(flat.numel()), flat.numel(), {}
    for kind in MODALITIES:
        data = [x for _, m, _ in filled for x in m[kind]]
        if not data:
            continue
        p = specs.rows_per_input(kind)
        slots = [i for i, t in enumerate(flat.tolist()) if t == IDS[kind]]
        counts = [r for _, _, rows in filled for r in rows] if kind == "audio" else [x.shape[0] * p for x in data]
        for item, count in zip(data, counts, strict=True):
            for row in range(count):
                source[slots.pop(0)] = base + row
            base += item.shape[0] * p
        assert not slots
        media[kind] = MediaBatch(torch.cat(data), *[torch.zeros(0)] * 4)
    lengths = tuple(len(d) for d in documents)
    return PackedBatch(
        input_ids=flat,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        labels=torch.full_like(flat, -100),
        target_idx=torch.zeros(0, dtype=torch.int64),
        source_index=source,
        media_positions=media_positions(source, base - flat.numel()),
        media=media,
        lengths=lengths,
        ids=("x",) * len(lengths),
        tokens={},
    )


@pytest.mark.parametrize("pair", [{}, {"model_type": "mistral", "sliding_window": 6}], indirect=True)
def test_batched_generation_equals_one_by_one_and_the_packed_model(pair, seed):
    ours, opened, specs, _ = pair
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # sharper logits, so that no two are within rounding of each other
        opened.llm.lm_head.weight.mul_(50)
        ours.llm.lm_head.weight.copy_(opened.llm.lm_head.weight)
    filled = [fill(p, specs, g) for p in PROMPTS]
    batched = answers(opened, filled, 5)
    assert batched == [answers(opened, [f], 5)[0] for f in filled]
    assert batched == pack_argmax(ours, specs, filled, 5)
    assert len({tuple(b) for b in batched}) > 1, "the prompts must matter"


def test_logits_equal_the_training_model(pair, seed):
    ours, opened, specs, _ = pair
    filled = [fill(PROMPTS[3], specs, torch.Generator().manual_seed(seed))]
    pack = pack_by_hand(specs, [f[0] for f in filled], filled)
    with torch.no_grad():
        mine = ours.logits(pack, torch.arange(pack.num_tokens))
        theirs = opened(**inputs_of(filled)).logits[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_image_rows_choose_among_the_rows_of_the_tiles(pair, seed):
    """One image of three inputs, of whose 12 rows 5 stand in the prompt; the gap between them is an ordinary token."""
    ours, opened, specs, _ = pair
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=g)
    rows = np.array([4, 0, -1, 11, 5, 1, -1])
    ids = torch.tensor([8, *(7 if row < 0 else IDS["image"] for row in rows), 9])
    item = EncodedMedia("image", pixels, slot=1, num_tokens=len(rows), rows=rows)
    pack = collate([EncodedSample("d", ids, torch.zeros(len(ids), dtype=torch.bool), (item,))], specs)
    inputs = {"input_ids": ids[None], **media_inputs([item], specs)}
    assert inputs["image_rows"].tolist() == [4, 0, 11, 5, 1]
    with torch.no_grad():
        torch.testing.assert_close(
            ours.logits(pack, torch.arange(len(ids))), opened(**inputs).logits[0], atol=1e-5, rtol=1e-5
        )
    with pytest.raises(DataError, match="5 image slots are expected"):
        opened(**{**inputs, "input_ids": ids[None, 2:]})


def test_media_inputs_number_the_rows_of_a_batch(pair):
    _, _, specs, _ = pair
    image = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    items = [EncodedMedia("image", image, 0, 3, np.array([7, -1, 0])), EncodedMedia("image", image[:1], 0, 4)]
    items += [EncodedMedia("video", image, 0, 8), EncodedMedia("audio", torch.zeros(2, 8, 20), 0, 13)]
    inputs = media_inputs(items, specs)
    assert inputs["image_rows"].tolist() == [7, 0, 8, 9, 10, 11] and len(inputs["pixel_values"]) == 3
    assert len(inputs["pixel_values_videos"]) == 2 and inputs["feature_rows"].tolist() == [13]
    assert media_inputs([], specs) == {}


def test_normalised_floats_equal_pixels(pair, seed):
    _, opened, _, _ = pair
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    floats = (pixels.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(opened.vision(pixels), opened.vision(floats), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pair", [{"tie_word_embeddings": True}], indirect=True)
def test_tied_weights_survive_the_round_trip(pair):
    from safetensors import safe_open

    ours, opened, _, folder = pair
    assert opened.llm.lm_head.weight is opened.llm.model.embed_tokens.weight
    assert torch.equal(opened.llm.lm_head.weight, ours.llm.lm_head.weight)
    with safe_open(folder / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert "llm.lm_head.weight" not in names
    assert names | {"llm.lm_head.weight"} == set(ours.state_dict())


def test_config_round_trip_and_auto_classes(pair):
    _, opened, specs, folder = pair
    config = AutoConfig.from_pretrained(folder)
    assert config.specs == specs
    assert config.media_token_ids == IDS
    assert config.template == "plain"
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(opened) is MmscaleForConditionalGeneration
    stored = json.loads((folder / "config.json").read_text())
    assert stored["architectures"] == ["MmscaleForConditionalGeneration"]
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_every_field_of_the_specs_survives(tiny_config, tmp_path):
    config = tiny_config()
    image = ImageDataConfig(mode="anyres", fill=(1, 2, 3), anyres={"grids": [[28, 56], [56, 28]], "merge": "spatial"})
    data = config.data.model_copy(update={"image": image, "video": VideoDataConfig(mode="fps", frames=3, fps=0.5)})
    specs = media_specs(config.model, data)
    description = describe(config.model, 97, specs)
    description.save_pretrained(tmp_path)
    register()
    assert AutoConfig.from_pretrained(tmp_path).specs == specs == description.specs


def test_exports_of_older_versions_open(pair):
    _, _, specs, folder = pair
    stored = json.loads((folder / "config.json").read_text())
    del stored["video_spec"]
    stored["image_spec"] = {key: stored["image_spec"][key] for key in ("size", "tokens", "mode", "fill")}
    (folder / "config.json").write_text(json.dumps(stored))
    opened = AutoConfig.from_pretrained(folder).specs
    assert (opened.image.size, opened.image.tokens) == (specs.image.size, specs.image.tokens)
    assert opened.audio == specs.audio and opened.video is None


def test_wrong_counts_are_refused(pair):
    _, opened, specs, _ = pair
    pixels = torch.zeros(1, 3, 28, 28)
    with pytest.raises(DataError, match="4 image slots are expected for the given media, found 3"):
        opened(input_ids=torch.tensor([[90, 90, 90, 1]]), pixel_values=pixels)
    with pytest.raises(DataError, match="feature_rows need 2 windows, found 1"):
        opened(
            input_ids=torch.tensor([[92] * 15]), input_features=torch.zeros(1, 8, 20), feature_rows=torch.tensor([15])
        )
