"""A tiny multimodal model of any language-model family with random mixed packs, for parity tests over grids."""

from __future__ import annotations

from typing import Any

import torch

from mmscale.config.schema import Config
from mmscale.config.specs import media_specs
from mmscale.model.composite import MultimodalLM, build_model
from mmscale.streaming.collate import collate
from mmscale.types import EncodedMedia, EncodedSample, MediaSpecs, PackedBatch

VOCAB = 128
_LLM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "mistral": {"sliding_window": 7},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "phi3": {},
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 9,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "stablelm": {"use_qkv_bias": True},
}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_AUDIO = {
    "model_type": "whisper",
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 8,
    "max_source_positions": 10,
    "num_mel_bins": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
PARTS = ("llm", "vision", "vision_connector", "audio", "audio_connector")


def tiny_config(family: str, **train: Any) -> Config:
    """A run's configuration; every part is trained."""
    llm = {"model_type": family, **_LLM, **FAMILIES[family]}
    settings = {"steps": 9, "global_batch": 4, "lr": 1e-3, "dtype": "fp32", **train}
    return Config.model_validate({
        "model": {
            "llm": {"config": llm},
            "vision": {"config": _VISION, "select_layer": -1},
            "audio": {"config": _AUDIO, "window_s": 0.2, "connector": "linear"},
            "tokenizer": {"path": "unused"},
        },
        "data": {"sources": {"a": {"path": "unused"}}, "seq_len": 256},
        "train": {**settings, "parts": {part: {"tune": "full"} for part in PARTS}},
        "run": {"dir": "unused"},
    })  # fmt: skip


def tiny_model(config: Config, dtype: torch.dtype = torch.float32) -> tuple[MultimodalLM, MediaSpecs]:
    """The model with weights drawn from `train.seed`, the same in every process and for every type."""
    specs = media_specs(config.model, config.data)
    return build_model(config, VOCAB, specs).to(dtype), specs


def tiny_pack(specs: MediaSpecs, seed: int, kind: str = "mixed") -> PackedBatch:
    """A random pack of odd length.

    kind: `mixed` has images, audio and text documents down to one token; `text` no media; `blind` is mixed with targets in one
    short document only, so that most parts have none.
    """
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    lengths = [1, number(30, 60), number(4, 9), number(50, 90), number(10, 20), 1]
    documents = []
    for i, length in enumerate(lengths):
        targets = torch.rand(length, generator=g) < 0.4
        if kind == "blind":
            targets = torch.full((length,), False)
            # not the first tokens: who sees only itself gives queries and keys no gradient, and rounding would be all there is
            targets[-2:] = i == 2
        media: tuple[EncodedMedia, ...] = ()
        if kind != "text" and length > 20:
            media = (*_images(specs, g, number(1, 4)), *_audio(specs, g, 25))
            slots = sorted(m.slot for m in media)
            assert len(set(slots)) == len(slots)
            for item in media:
                targets[item.slot : item.slot + item.num_tokens] = False
        ids = torch.randint(0, VOCAB - 3, (length,), generator=g)
        documents.append(EncodedSample(f"d{i}", ids, targets, media))
    return collate(documents, specs)


def _images(specs: MediaSpecs, g: torch.Generator, count: int) -> list[EncodedMedia]:
    assert specs.image is not None
    p, size = specs.image.tokens, specs.image.size
    return [
        EncodedMedia(
            "image", torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=g), 1 + i * (p + 1), p
        )
        for i in range(count)
    ]


def _audio(specs: MediaSpecs, g: torch.Generator, slot: int) -> list[EncodedMedia]:
    assert specs.audio is not None
    a = specs.audio
    windows = torch.randn((1, a.mel_bins, a.window_samples // a.hop_samples), generator=g)
    return [EncodedMedia("audio", windows, slot, min(a.tokens, 4))]
