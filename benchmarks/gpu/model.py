"""The model and the packs of the step benchmarks: a Llama of 1.2 billion parameters that reads a SigLIP tower of 0.4 billion.

Random weights, random pixels and ids; lengths of documents are skewed like those of instruction data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmscale.config.schema import Config
from mmscale.config.specs import media_specs
from mmscale.model.composite import MultimodalLM, build_model
from mmscale.streaming.collate import collate
from mmscale.types import EncodedMedia, EncodedSample, MediaSpecs, PackedBatch


@dataclass(frozen=True, slots=True)
class Size:
    """Of model and packs. `text_tokens`: median of a document beside its picture; `tokens`: of the packs."""

    llm: Mapping[str, Any]
    vision: Mapping[str, Any]
    vocab: int
    text_tokens: int
    tokens: tuple[int, ...]


def _llm(width: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }


def _vision(width: int, inner: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
    }


LARGE = Size(
    _llm(2048, 8192, 16, 32, 8, 131_072),
    _vision(1152, 4304, 27, 16, 384, 14),
    vocab=128_256,
    text_tokens=180,
    tokens=(8192, 32_768, 131_072),
)
TINY = Size(_llm(32, 64, 2, 4, 2, 256), _vision(16, 32, 2, 2, 32, 8), vocab=128, text_tokens=12, tokens=(96, 160))
CONNECTOR = "mlp_downsample"
"""Four patches become one row: 196 rows of an image of 27 x 27 patches."""
TARGETS = 0.6
"""Of a document's text, its end: about 30 % of a pack."""


def run_config(size: Size, dtype: str, train: Mapping[str, Any] | None = None) -> Config:
    """A run that trains every part; `train` holds more keys of its section."""
    parts = {part: {"tune": "full"} for part in ("llm", "vision", "vision_connector")}
    vision = {"config": dict(size.vision), "connector": CONNECTOR, "select_layer": -1}
    return Config.model_validate({
        "model": {"llm": {"config": dict(size.llm)}, "vision": vision, "tokenizer": {"path": "unused"}},
        "data": {"sources": {"invented": {"path": "unused"}}, "seq_len": max(size.tokens)},
        "train": {"steps": 100, "global_batch": 1, "lr": 1e-5, "dtype": dtype, "parts": parts, **(train or {})},
        "run": {"dir": "unused"},
    })  # fmt: skip


def make_model(size: Size, config: Config, device: torch.device) -> MultimodalLM:
    """The model with its random weights made on the device."""
    with torch.device(device):
        return build_model(config, size.vocab, media_specs(config.model, config.data))


def documents(size: Size, specs: MediaSpecs, num_tokens: int, seed: int) -> list[EncodedSample]:
    """Documents of one picture and a text, and some without a picture, in arrival order; together `num_tokens` tokens."""
    assert specs.image is not None, "the model has a tower"
    rng = np.random.default_rng(seed)
    texts = rng.lognormal(np.log(size.text_tokens), 1.0, 4096).astype(np.int64).clip(4, 8 * size.text_tokens)
    found: list[EncodedSample] = []
    left = num_tokens
    while left:
        rows = specs.image.tokens if rng.random() < 0.85 else 0
        if left < rows + 4:
            rows = 0
        length = min(rows + int(texts[len(found) % len(texts)]), left)
        found.append(_document(str(len(found)), rng, length, rows, specs, size.vocab))
        left -= length
    return found


def _document(
    name: str, rng: np.random.Generator, length: int, rows: int, specs: MediaSpecs, vocab: int
) -> EncodedSample:
    assert specs.image is not None, "the model has a tower"
    is_target = torch.zeros(length, dtype=torch.bool)
    is_target[length - round(TARGETS * (length - rows)) :] = True
    media: tuple[EncodedMedia, ...] = ()
    if rows:
        pixels = torch.from_numpy(rng.integers(0, 256, (1, 3, specs.image.size, specs.image.size), dtype=np.uint8))
        media = (EncodedMedia("image", pixels, 0, rows),)
    return EncodedSample(name, torch.from_numpy(rng.integers(0, vocab, length)), is_target, media)


def make_pack(found: list[EncodedSample], specs: MediaSpecs, device: torch.device) -> PackedBatch:
    """All documents as one pack, on the host; in pinned memory for a GPU, as a loader would leave it."""
    pack = collate(found, specs)
    if device.type != "cuda":
        return pack
    media = {m: replace(batch, data=batch.data.pin_memory()) for m, batch in pack.media.items()}
    names = ("input_ids", "position_ids", "labels", "target_idx", "source_index")
    return replace(pack, media=media, **{name: getattr(pack, name).pin_memory() for name in names})
