"""The composite model as a Hugging Face class: opened by the Auto classes, answers through `generate` with a KV cache.

Parameter names are those of `MultimodalLM`. Shapes: B prompts, S tokens, T = B * S, N images or windows, P rows per tower
input, D width.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

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
from mmscale.kernels.placement import place_media
from mmscale.model.description import MmscaleConfig
from mmscale.model.encoder import MediaEncoder, build_audio, build_vision


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
        feature_rows: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits.

        Args:
            input_ids: int64 [B, S], padded on the left; every media row has its slot (`config.media_token_ids`).
            attention_mask: [B, S], 0 on padding.
            pixel_values: [N, 3, S, S], all images in order of their slots: floats as an image processor gives them, or
                uint8 pixels. `pixel_values_videos`: frames likewise.
            input_features: audio windows [N, ...], a clip's windows side by side. `feature_rows`: int64 [clips], rows of
                each clip; None = every clip is one full window.

        Raises:
            DataError: another number of slots than rows.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise DataError("input_ids or inputs_embeds are expected, found neither; pass one of them")
            inputs_embeds = self._embed(input_ids, pixel_values, pixel_values_videos, input_features, feature_rows)
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

    def _embed(
        self,
        ids_BS: torch.Tensor,
        images: torch.Tensor | None,
        frames: torch.Tensor | None,
        windows: torch.Tensor | None,
        clip_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        text_BSD = self.get_input_embeddings()(ids_BS)
        text_TD, ids_T = text_BSD.flatten(0, 1), ids_BS.flatten()
        source_T = torch.arange(ids_T.numel(), device=ids_T.device)
        media, first = [], ids_T.numel()
        for modality, encoder, data in (
            ("image", self.vision, images),
            ("video", self.vision, frames),
            ("audio", self.audio, windows),
        ):
            if data is None:
                continue
            rows = self._rows(encoder, modality, data, clip_rows if modality == "audio" else None)
            slots = (ids_T == self.config.media_token_ids.get(modality, -1)).nonzero().flatten()
            if slots.numel() != rows.shape[0]:
                raise DataError(
                    f"{rows.shape[0]} {modality} slots are expected for the given media, found {slots.numel()} in input_ids; "
                    f"write the slots of every item into the prompt"
                )
            source_T[slots] = torch.arange(first, first + rows.shape[0], device=ids_T.device)
            media.append(rows)
            first += rows.shape[0]
        media_MD = torch.cat(media) if media else text_TD.new_zeros(0, text_TD.shape[1])
        return place_media(text_TD, media_MD, source_T).view_as(text_BSD)

    def _rows(
        self, encoder: MediaEncoder | None, modality: str, data: torch.Tensor, clip_rows: torch.Tensor | None
    ) -> torch.Tensor:
        """The rows [M, D] that stand in the prompt: all of an image's, of a clip those that hold sound."""
        if encoder is None:
            raise DataError(f"a model that takes {modality} is expected, this one has no encoder for it; leave it out")
        rows_NPD = encoder(data)
        rows_MD = rows_NPD.flatten(0, 1)
        if clip_rows is None:
            return rows_MD
        kept, first = [], 0
        for count in clip_rows.tolist():
            kept.append(torch.arange(first, first + count, device=rows_MD.device))
            first += -(-count // encoder.rows) * encoder.rows
        if first != rows_MD.shape[0]:
            raise DataError(
                f"feature_rows need {first // encoder.rows} windows, found {data.shape[0]} in input_features; give each clip "
                f"ceil(rows / {encoder.rows}) windows"
            )
        return rows_MD[torch.cat(kept)] if kept else rows_MD


def register() -> None:
    """Makes the Auto classes of transformers open exports of type `mmscale`; calling it again changes nothing."""
    AutoConfig.register("mmscale", MmscaleConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MmscaleConfig, MmscaleForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(MmscaleConfig, MmscaleForConditionalGeneration, exist_ok=True)
