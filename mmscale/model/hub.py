"""The composite model as a Hugging Face class: opened by the Auto classes, answers through `generate` with a KV cache.

Parameter names are those of `MultimodalLM`. Shapes: B prompts, S tokens, T = B * S, N images or windows, P rows per tower
input, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmscale.errors import DataError
from mmscale.kernels.placement import media_positions, place_media
from mmscale.model.description import MmscaleConfig
from mmscale.model.encoder import build_audio, build_vision
from mmscale.types import MODALITIES, EncodedMedia, MediaSpecs, Modality


class MmscaleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A composite model for generation; `MmscaleConfig` says what it is made of."""

    config_class = MmscaleConfig
    base_model_prefix = "llm"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["MediaEncoder"]  # type: ignore[misc]

    def __init__(self, config: MmscaleConfig) -> None:
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config, attn_implementation="sdpa")
        self.vision = build_vision(config)
        self.audio = build_audio(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.llm.get_output_embeddings()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        feature_rows: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: int64 [B, S], padded on the left; every media row that is read has its slot
                (`config.media_token_ids`).
            attention_mask: [B, S], 0 on padding.
            pixel_values: [N, 3, S, S], all images in order of their slots, with all their tiles: floats as an image processor
                gives them, or uint8 pixels. `pixel_values_videos`: frames likewise.
            image_rows: int64 [image slots], which of the N * P rows of the images stands in each slot; None = all in order.
            input_features: audio windows [N, ...], a clip's windows side by side. `feature_rows`: int64 [clips], rows of
                each clip; None = every clip is one full window.

        Raises:
            DataError: another number of slots than rows.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise DataError("input_ids or inputs_embeds are expected, found neither; pass one of them")
            media = self._media_rows(pixel_values, pixel_values_videos, input_features, image_rows, feature_rows)
            inputs_embeds = self._embed(input_ids, media)
        return cast(
            CausalLMOutputWithPast,
            self.llm(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
            ),
        )

    def _embed(self, ids_BS: torch.Tensor, media: dict[Modality, torch.Tensor]) -> torch.Tensor:
        """Embeddings [B, S, D] with the rows of each modality in its slots."""
        text_BSD = self.get_input_embeddings()(ids_BS)
        if not media:
            return text_BSD
        text_TD, ids_T = text_BSD.flatten(0, 1), ids_BS.flatten()
        source_T = torch.arange(ids_T.numel())
        first = ids_T.numel()
        for modality, rows_MD in media.items():
            slots = (ids_T == self.config.media_token_ids.get(modality, -1)).nonzero().flatten().cpu()
            if slots.numel() != rows_MD.shape[0]:
                raise DataError(
                    f"{rows_MD.shape[0]} {modality} slots are expected for the given media, found {slots.numel()} in input_ids; "
                    f"write the slots of every item into the prompt"
                )
            source_T[slots] = torch.arange(first, first + rows_MD.shape[0])
            first += rows_MD.shape[0]
        media_MD = torch.cat(list(media.values()))
        positions_M = media_positions(source_T, media_MD.shape[0])
        places = (source_T.to(ids_T.device), positions_M.to(ids_T.device))
        return place_media(text_TD, media_MD, *places).view_as(text_BSD)

    def _media_rows(
        self,
        images: torch.Tensor | None,
        frames: torch.Tensor | None,
        windows: torch.Tensor | None,
        image_rows: torch.Tensor | None,
        clip_rows: torch.Tensor | None,
    ) -> dict[Modality, torch.Tensor]:
        """The rows [M, D] of each modality that stand in the prompt, in the order of their slots."""
        rows: dict[Modality, torch.Tensor] = {}
        parts = ((self.vision, images), (self.vision, frames), (self.audio, windows))
        for modality, (encoder, data) in zip(MODALITIES, parts, strict=True):
            if data is None:
                continue
            if encoder is None:
                raise DataError(
                    f"a model that takes {modality} is expected, this one has no encoder for it; leave it out"
                )
            rows_MD = encoder(data).flatten(0, 1)
            if modality == "image" and image_rows is not None:
                rows_MD = rows_MD[image_rows]
            if modality == "audio" and clip_rows is not None:
                rows_MD = rows_MD[_sounding(clip_rows.tolist(), encoder.rows, data.shape[0]).to(rows_MD.device)]
            rows[modality] = rows_MD
        return rows


def _sounding(clip_rows: list[int], rows_per_window: int, num_windows: int) -> torch.Tensor:
    """The rows, of all windows side by side, that hold sound: the first `clip_rows[i]` of those of clip i."""
    kept, first = [torch.zeros(0, dtype=torch.int64)], 0
    for count in clip_rows:
        kept.append(torch.arange(first, first + count))
        first += -(-count // rows_per_window) * rows_per_window
    if first != num_windows * rows_per_window:
        raise DataError(
            f"feature_rows need {first // rows_per_window} windows, found {num_windows} in input_features; give each clip "
            f"ceil(rows / {rows_per_window}) windows"
        )
    return torch.cat(kept)


def media_inputs(media: Sequence[EncodedMedia], specs: MediaSpecs) -> dict[str, torch.Tensor]:
    """The media arguments of `MmscaleForConditionalGeneration` for all items of a batch, in the order of their slots."""
    by_modality = {m: [item for item in media if item.modality == m] for m in MODALITIES}
    names = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
    inputs = {names[m]: torch.cat([item.data for item in items]) for m, items in by_modality.items() if items}
    if by_modality["image"]:
        rows, first = [], 0
        for item in by_modality["image"]:
            own = np.arange(item.num_tokens) if item.rows is None else item.rows[item.rows >= 0]
            rows.append(first + own)
            first += len(item.data) * specs.rows_per_input("image")
        inputs["image_rows"] = torch.from_numpy(np.concatenate(rows))
    if by_modality["audio"]:
        inputs["feature_rows"] = torch.tensor([item.num_tokens for item in by_modality["audio"]])
    return inputs


def register() -> None:
    """Makes the Auto classes of transformers open exports of type `mmscale`; calling it again changes nothing."""
    AutoConfig.register("mmscale", MmscaleConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MmscaleConfig, MmscaleForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(MmscaleConfig, MmscaleForConditionalGeneration, exist_ok=True)
