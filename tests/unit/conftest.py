"""A tokenizer of single bytes, tiny configurations, and packs built by hand."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mmscale.config.schema import Config
from mmscale.kernels.placement import media_positions
from mmscale.types import IGNORE, MODALITIES, MediaBatch, PackedBatch

VOCAB = 97
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLM = {"model_type": "llama", **_SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
VISION = {"model_type": "siglip_vision_model", **_SMALL, "intermediate_size": 40, "image_size": 28, "patch_size": 14}
AUDIO = {
    **{
        "model_type": "whisper",
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
    },
    **{"decoder_attention_heads": 2, "decoder_ffn_dim": 8, "max_source_positions": 10, "num_mel_bins": 8},
    **{"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """The folder of a tokenizer in which every byte is a token, with ChatML's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')
    return folder


@pytest.fixture
def tiny_config():
    """Builds a Config: llm, vision, audio are overrides of their Hugging Face configuration, None leaves a part out."""

    def build(llm=None, vision=(), audio=(), vision_keys=(), audio_keys=(), train=()):
        model = {"llm": {"config": {**LLM, **(llm or {})}}, "tokenizer": {"path": "tokenizer"}}
        if vision is not None:
            model["vision"] = {"config": {**VISION, **dict(vision)}, "select_layer": -1, **dict(vision_keys)}
        if audio is not None:
            keys = {"window_s": 0.2, "connector": "linear", **dict(audio_keys)}
            model["audio"] = {"config": {**AUDIO, **dict(audio)}, **keys}
        base = {"steps": 1, "global_batch": 1, "lr": 1e-3, "parts": {"llm": {"tune": "full"}}}
        return Config(
            **{"model": model, "data": {"sources": {"a": {"path": "a"}}, "seq_len": 512}},
            **{"train": {**base, **dict(train)}, "run": {"dir": "run"}},
        )

    return build


@pytest.fixture
def make_pack():
    """Builds a PackedBatch from documents, each a list of ("text", n), ("image", 1), ("video", frames), ("audio", samples)."""
    return _make_pack


def _make_pack(specs, documents, seed, vocab=VOCAB, target_share=0.5):
    g = torch.Generator().manual_seed(seed)
    ids, lengths, slots = [], [], {m: [] for m in MODALITIES}
    for number, document in enumerate(documents):
        start = len(ids)
        for kind, amount in document:
            count = amount
            if kind != "text":
                p = specs.rows_per_input(kind)
                count = specs.audio.num_tokens(amount) if kind == "audio" else amount * p
                slots[kind].append((number, len(ids), count, -(-count // p)))
            ids += torch.randint(0, vocab, (count,), generator=g).tolist()
        lengths.append(len(ids) - start)
    total = len(ids)
    source, media, base = torch.arange(total), {}, total
    for kind in MODALITIES:
        if not slots[kind]:
            continue
        p = specs.rows_per_input(kind)
        for _, slot, count, inputs in slots[kind]:
            source[slot : slot + count] = torch.arange(base, base + count)
            base += inputs * p
        inputs = sum(s[3] for s in slots[kind])
        media[kind] = MediaBatch(_random_inputs(specs, kind, inputs, g), *torch.tensor(slots[kind]).T)
    under_media = source >= total
    labels = torch.full((total,), IGNORE)
    at = 0
    for length in lengths:  # shifted per document; the last position predicts nothing
        for t in range(at, at + length - 1):
            if not under_media[t + 1] and torch.rand((), generator=g) < target_share:
                labels[t] = ids[t + 1]
        at += length
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        labels=labels,
        target_idx=(labels != IGNORE).nonzero().flatten(),
        source_index=source,
        media_positions=media_positions(source, base - total),
        media=media,
        lengths=tuple(lengths),
        ids=tuple(f"d{i}" for i in range(len(lengths))),
        tokens={},
    )


def _random_inputs(specs, kind, count, g):
    if kind in ("image", "video"):
        return torch.randint(0, 256, (count, 3, specs.image.size, specs.image.size), dtype=torch.uint8, generator=g)
    a = specs.audio
    shape = (
        (count, a.mel_bins, a.window_samples // a.hop_samples) if a.features == "log_mel" else (count, a.window_samples)
    )
    return torch.randn(shape, generator=g)
