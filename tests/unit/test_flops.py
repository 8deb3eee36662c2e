"""The operations of a step by formula against torch's count of what the real model runs, forward and backward."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.flops import FORMULAS
from mmscale.config.schema import AudioConfig, Config, DataConfig, ModelConfig
from mmscale.config.specs import media_specs
from mmscale.model.batch import ModelBatch
from mmscale.model.composite import build_model
from mmscale.model.description import describe
from mmscale.model.towers.audio import AudioTower
from mmscale.train.flops import flop_model, peak_flops, seen_pairs
from mmscale.types import MediaSpecs

aten = torch.ops.aten
VOCAB = 97
DATA = DataConfig.model_validate({"sources": {"a": {"path": "a"}}, "seq_len": 512})
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 12, "num_key_value_heads": 1},
    "phi3": {"sliding_window": 9, "pad_token_id": 0},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11, "num_key_value_heads": 2},
    "mistral": {"sliding_window": 6, "num_key_value_heads": 2},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 7,
        "num_key_value_heads": 1,
    },
    "phi": {},
    "stablelm": {"num_key_value_heads": 4},
}
VISION = [
    {"model_type": "siglip_vision_model", "intermediate_size": 40, "image_size": 28, "patch_size": 14},
    {"model_type": "clip_vision_model", "intermediate_size": 56, "image_size": 42, "patch_size": 14},
    {"model_type": "dinov2", "image_size": 42, "patch_size": 14, "mlp_ratio": 3},
    {"model_type": "dinov2", "image_size": 28, "patch_size": 14, "use_swiglu_ffn": True},
    {"model_type": "dinov2_with_registers", "image_size": 28, "patch_size": 7, "num_register_tokens": 3},
]
CONNECTORS = [
    "linear",
    "mlp2x_gelu",
    "mlp3x_gelu",
    "mlp_downsample",
    "mlp_downsample_3x3",
    "pixel_shuffle",
    "patch_merger",
    "token_merge",
]
WHISPER = {
    "model_type": "whisper", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 8, "max_source_positions": 10, "num_mel_bins": 8, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAV2VEC2 = {
    "model_type": "wav2vec2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "conv_dim": [16, 24], "conv_kernel": [10, 4], "conv_stride": [5, 4], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2,
}  # fmt: skip


def random_run(rng, family, *, has_vision, has_audio, checkpointed):
    """A random configuration (layers, sizes, towers, connectors, frozen parts), and the names of its trained parts."""
    llm = {"model_type": family, "hidden_size": rng.choice([32, 64]), "intermediate_size": rng.choice([40, 72])}
    llm |= {"num_hidden_layers": rng.choice([1, 2, 3]), "num_attention_heads": 4, **FAMILIES[family]}
    model = {"llm": {"config": llm}, "tokenizer": {"path": "tokenizer"}}
    encoders = []
    if has_vision:
        encoders.append("vision")
        tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **rng.choice(VISION)}
        layer = rng.choice([None, -1, -2, 1])
        model["vision"] = {"config": tower, "connector": rng.choice(CONNECTORS), "select_layer": layer}
        if model["vision"]["connector"] == "token_merge":
            model["vision"]["token_merge"] = {"ratio": rng.choice([0.3, 0.6, 1.0])}
    if has_audio:
        encoders.append("audio")
        keys = {
            "window_s": 0.2,
            "connector": rng.choice(["linear", "mlp2x_gelu"]),
            "select_layer": rng.choice([None, 1]),
        }
        tower, features = rng.choice([(WHISPER, "log_mel"), (WAV2VEC2, "waveform")])
        model["audio"] = {"config": tower, "features": features, **keys}
    names = ["llm", *encoders, *(f"{name}_connector" for name in encoders)]
    trained = [name for name in names if rng.random() < 0.6] or [names[-1]]
    parts = {name: {"tune": "full" if name in trained else "frozen"} for name in names}
    train = {
        "steps": 1,
        "global_batch": 1,
        "lr": 1e-3,
        "dtype": "fp32",
        "parts": parts,
        "checkpoint_activations": checkpointed,
    }
    return Config.model_validate({"model": model, "data": DATA, "train": train, "run": {"dir": "run"}}), trained


def random_documents(rng, config, *, all_media):
    """Documents for `make_pack`; some packs lack a modality of the model, unless `all_media`."""
    kinds = ["image", "video"] if config.model.vision is not None else []
    kinds += ["audio"] if config.model.audio is not None else []
    documents = []
    for number in range(rng.randint(2, 5)):
        document = [("text", rng.randint(1, 30))]
        for kind in kinds:
            if (all_media and number == 0) or rng.random() < 0.2:
                document.append((kind, {"image": 1, "video": 2, "audio": rng.randint(500, 6000)}[kind]))
        documents.append([*document, ("text", rng.randint(2, 20))])
    return documents


def prepared(config, trained):
    specs = media_specs(config.model, config.data)
    model = build_model(config, VOCAB, specs)
    for name, part in model.parts().items():
        for param in part.parameters():
            param.requires_grad_(name in trained and param.requires_grad)
    return model, specs


def count(model, batch, formulas=FORMULAS):
    """(operations of forward and backward as torch counts them, those of the attention's gradient among them)."""
    with FlopCounterMode(display=False, custom_mapping=dict(formulas)) as counter:
        model(batch).backward()
    by_operator = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), by_operator.get(aten._scaled_dot_product_flash_attention_for_cpu_backward, 0)


def name_of(config, trained):
    model = config.model
    vision = model.vision and (model.vision.config["model_type"], model.vision.connector, model.vision.select_layer)
    audio = model.audio and model.audio.config["model_type"]
    again = "checkpointed" if config.train.checkpoint_activations else ""
    return f"{model.llm.config['model_type']} {vision} {audio}, trained {trained} {again}"


@pytest.mark.parametrize("number", range(20))
def test_what_the_devices_do_is_what_torch_counts(number, seed, make_pack):
    """Random models on random packs, of which some lack a modality and some layers run twice."""
    rng = random.Random(seed + number)
    media = {"has_vision": number % 4 != 0, "has_audio": number % 3 == 0}
    config, trained = random_run(rng, list(FAMILIES)[number % len(FAMILIES)], **media, checkpointed=rng.random() < 0.5)
    model, specs = prepared(config, trained)
    flops = flop_model(model.config, trained, checkpointed=config.train.checkpoint_activations)
    pack = make_pack(specs, random_documents(rng, config, all_media=False), seed + number, VOCAB)
    (counted, _), found = count(model, pack), flops.pack(pack)
    print(f"{name_of(config, trained)}: counted {counted:.0f}, by formula {found.hardware:.0f}")
    assert found.hardware == pytest.approx(counted, rel=0.01)
    assert found.model <= found.hardware


@pytest.mark.parametrize("number", range(8))
def test_what_the_training_needs_is_that_without_what_is_done_twice(number, seed, make_pack):
    """Nothing checkpointed, no empty input: only the scores are computed twice, one product of the five of the gradient."""
    rng = random.Random(seed + number)
    family = list(FAMILIES)[rng.randrange(len(FAMILIES))]
    config, trained = random_run(rng, family, has_vision=number % 2 == 0, has_audio=number % 3 == 0, checkpointed=False)
    model, specs = prepared(config, trained)
    pack = make_pack(specs, random_documents(rng, config, all_media=True), seed + number, VOCAB)
    total, attention = count(model, pack)
    found = flop_model(model.config, trained).pack(pack)
    print(f"{name_of(config, trained)}: needed {total - attention / 5:.0f}, by formula {found.model:.0f}")
    assert found.model == pytest.approx(total - attention / 5, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss"])
def test_torch_alone_counts_the_same_where_attention_is_written_out(family, seed, make_pack):
    """No formula for attention in the counter: the kernel `math` multiplies whole squares, which its bmm show."""
    rng = random.Random(seed)
    config, trained = random_run(rng, family, has_vision=False, has_audio=False, checkpointed=False)
    model, specs = prepared(config, trained)
    pack = make_pack(specs, [[("text", rng.randint(5, 40))] for _ in range(4)], seed, VOCAB)
    others = {op: FORMULAS[op] for op in (aten._grouped_mm, torch.ops.mmscale.linear_cross_entropy)}
    counted, _ = count(model, ModelBatch.of(pack, "math"), others)
    flops = flop_model(model.config, trained)
    squares = sum(n * n for n in pack.lengths)
    beyond = sum(f.hardware * (squares - seen_pairs(pack.lengths, w)) for w, f in flops.pairs.items())
    assert flops.pack(pack).hardware + beyond == pytest.approx(counted, rel=0.01)


def test_a_frozen_wav2vec2_runs_no_backward_pass():
    model = {"llm": {"config": {"model_type": "llama", "hidden_size": 32}}, "tokenizer": {"path": "tokenizer"}}
    section = AudioConfig.model_validate({"config": WAV2VEC2, "features": "waveform", "window_s": 0.2})
    config = ModelConfig.model_validate({**model, "audio": section})
    specs = MediaSpecs(audio=media_specs(config, DATA).audio)
    tower = AudioTower(describe(config, VOCAB, specs), specs.audio).train().requires_grad_(False)
    assert not tower(torch.randn(1, specs.audio.window_samples)).requires_grad


def test_pairs_are_those_of_a_mask(seed):
    rng = random.Random(seed)
    for _ in range(30):
        lengths, window = [rng.randint(0, 20) for _ in range(5)], rng.choice([None, 1, 2, 7, 19, 50])
        mask = sum(
            sum(k <= q and (window is None or k > q - window) for q in range(n) for k in range(n)) for n in lengths
        )
        assert seen_pairs(lengths, window) == mask


def test_frozen_parts_cost_less_and_checkpointing_costs_the_devices_only():
    rng = random.Random(1)
    config, _ = random_run(rng, "llama", has_vision=True, has_audio=False, checkpointed=False)
    described = describe(config.model, VOCAB, media_specs(config.model, config.data))
    everything = flop_model(described, ["llm", "vision", "vision_connector"])
    nothing_of_the_tower = flop_model(described, ["llm", "vision_connector"]).inputs["vision"]
    assert nothing_of_the_tower.model < everything.inputs["vision"].model
    connector = flop_model(described, ["vision_connector"])
    assert connector.token.model == pytest.approx(everything.token.model * 2 / 3)
    assert connector.target.model == pytest.approx(everything.target.model * 2 / 3)
    assert connector.pairs == everything.pairs, "gradients pass a frozen language model"
    assert connector.inputs["vision"] == nothing_of_the_tower
    again = flop_model(described, ["llm", "vision", "vision_connector"], checkpointed=True)
    assert again.token.model == everything.token.model
    assert again.token.hardware > everything.token.hardware
    assert again.inputs["vision"].hardware > everything.inputs["vision"].hardware


def test_the_peak_is_what_the_config_says_and_else_unknown_on_a_cpu():
    config, _ = random_run(random.Random(1), "llama", has_vision=False, has_audio=False, checkpointed=False)
    assert peak_flops(config, torch.device("cpu")) is None
    said = config.model_copy(update={"run": config.run.model_copy(update={"peak_tflops": 2.5})})
    assert peak_flops(said, torch.device("cpu")) == 2.5e12
