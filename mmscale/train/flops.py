"""Floating-point operations of a training step: what the training needs (for MFU) and what the devices do (for HFU).

A product costs its forward operations once more for the gradient of its weights, if they are trained, and once more for the
gradient of its input, if anything before it is trained. A frozen tower therefore costs its forward pass alone, and a frozen
language model above a trained connector forward and input gradients. Attention costs by the pairs of tokens that see each
other: n (n + 1) / 2 in a document of n tokens, fewer with a sliding window, never across documents; its gradient costs twice
the forward pass. The head is computed at targets only. As in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), the
operations that a training needs leave recomputation out.

The devices do more: attention kernels compute the scores again in the backward pass (FlashAttention-2, Dao 2023,
arXiv:2307.08691, section 3.1: five products where the forward pass has two), checkpointed layers run forward twice, and a pack
without a modality runs one empty input of it. What a kernel computes for pairs that do not see each other is not counted,
nor is what parallel layouts add: the operations of a pack do not depend on how it is divided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mmscale.config.flops import LlmWork, PartWork, audio_work, connector_work, llm_work, matching_work, vision_work
from mmscale.config.schema import Config
from mmscale.config.specs import vision_grid
from mmscale.model.connectors.token_merge import rows_by_round
from mmscale.model.description import MmscaleConfig
from mmscale.types import PackedBatch

PEAK_TFLOPS: Mapping[str, float] = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16 peaks, by a part of the GPU's name, from NVIDIA's data sheets (SXM boards)."""


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations forward and backward. `model`: what the training needs. `hardware`: what the devices do."""

    model: float
    hardware: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.model * times, self.hardware * times)


@dataclass(frozen=True, slots=True)
class FlopModel:
    """Forward and backward operations of everything that a pack is made of.

    token, target     of a position and of a row of logits
    pairs             window (None = the whole document) -> of a pair of tokens that see each other
    inputs            part (`vision`, `audio`) -> of a tower input; the key is absent when the model lacks the part
    """

    token: Flops
    target: Flops
    pairs: Mapping[int | None, Flops]
    inputs: Mapping[str, Flops]

    def pack(self, pack: PackedBatch) -> Flops:
        """Operations of one pack."""
        total = self.token * pack.num_tokens + self.target * pack.num_targets
        for window, flops in self.pairs.items():
            total += flops * seen_pairs(pack.lengths, window)
        for part, flops in self.inputs.items():
            modalities = ("audio",) if part == "audio" else ("image", "video")
            found = sum(len(pack.media[m].data) for m in modalities if m in pack.media)
            total += flops * found if found else Flops(0.0, flops.hardware)
        return total


def seen_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Pairs (query, key) of causal attention in documents of these lengths; a token sees itself and `window - 1` before it.

    Example:
        >>> seen_pairs([3, 2]), seen_pairs([3, 2], window=1)
        (9, 5)
    """
    if window is None:
        return sum(n * (n + 1) // 2 for n in lengths)
    return sum(near * (near + 1) // 2 + (n - near) * near for n in lengths for near in (min(n, window),))


def flop_model(model: MmscaleConfig, trained: Collection[str], *, checkpointed: bool = False) -> FlopModel:
    """The operations of a described model.

    Args:
        trained: names of the parts that are trained, as in `train.parts`.
        checkpointed: layers are computed again in the backward pass (`train.checkpoint_activations`).

    Raises ConfigError like `llm_sizes`.
    """
    llm = llm_work(model.text_config.to_dict(), int(model.text_config.vocab_size))
    is_trained = "llm" in trained
    attention = {window: _attention(pair, checkpointed=checkpointed) for window, pair in llm.pairs.items()}
    inputs = {
        part: _media(tower, connector, f"{part}_connector" in trained, part in trained, checkpointed)
        for part, (tower, connector) in _encoders(model).items()
    }
    head = llm.head * (3 if is_trained else 2)
    return FlopModel(_token(llm, is_trained, checkpointed), Flops(head, head), attention, inputs)


def _token(llm: LlmWork, is_trained: bool, checkpointed: bool) -> Flops:
    """Of one position: something before the language model, or its own embedding, always learns, so gradients pass it whole."""
    needed = llm.token * (3 if is_trained else 2)
    return Flops(needed, needed + (llm.token - llm.last if checkpointed else 0.0))


def _attention(forward: float, *, checkpointed: bool) -> Flops:
    return Flops(3 * forward, (4.5 if checkpointed else 3.5) * forward)


def _media(
    tower: PartWork, connector: PartWork, connector_trained: bool, tower_trained: bool, checkpointed: bool
) -> Flops:
    """Of one tower input."""
    above = connector.forward
    if connector_trained:
        above += connector.first + 2 * connector.linear + 2 * connector.attention
    elif tower_trained:
        above += connector.linear
    if tower_trained:
        above += connector.first
    total = Flops(above + tower.forward, above + tower.forward)
    if tower_trained:
        learning = tower.first + 2 * tower.linear
        again = tower.layers if checkpointed else 0.0
        total += Flops(learning + 2 * tower.attention, learning + 2.5 * tower.attention + again)
    return total


def _encoders(model: MmscaleConfig) -> dict[str, tuple[PartWork, PartWork]]:
    """Tower and connector of each encoder by part."""
    width, specs = int(model.text_config.hidden_size), model.specs
    found: dict[str, tuple[PartWork, PartWork]] = {}
    if specs.image is not None and model.vision_connector is not None:
        raw = model.vision_config.to_dict()
        connector = connector_work(model.vision_connector, int(raw["hidden_size"]), width, specs.image.tokens)
        if model.vision_connector == "token_merge":
            patches = vision_grid(raw).side ** 2
            rounds = rows_by_round(patches, specs.image.tokens)
            connector = replace(connector, matching=matching_work(int(raw["hidden_size"]), patches, rounds))
        found["vision"] = (vision_work(raw, model.vision_select_layer), connector)
    if specs.audio is not None and model.audio_connector is not None:
        raw, audio = model.audio_config.to_dict(), specs.audio
        hidden = int(model.audio_config.hidden_size)
        connector = connector_work(model.audio_connector, hidden, width, audio.tokens)
        found["audio"] = (audio_work(raw, model.audio_select_layer, audio.window_samples, audio.tokens), connector)
    return found


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Peak operations per second of one device: `run.peak_tflops`, else of a known GPU in bf16; None = not known."""
    known = config.run.peak_tflops
    if known is None and device.type == "cuda" and config.train.dtype == "bf16":
        name = torch.cuda.get_device_name(device)
        known = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return None if known is None else known * 1e12
