"""One sample to one document: media decoded, text tokenised, targets marked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.errors import BadSampleError
from mmscale.streaming.chat import ChatEncoding, ChatTemplate, encode_chat
from mmscale.streaming.decode.audio import decode_audio, planned_samples
from mmscale.streaming.decode.image import check_image_size, open_pixels
from mmscale.streaming.decode.resize import to_inputs
from mmscale.streaming.decode.tiling import NEWLINE, image_layout
from mmscale.streaming.decode.video import decode_video, planned_frames
from mmscale.streaming.media import Lengths
from mmscale.streaming.plan import TOO_LONG
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import (
    MODALITIES,
    NEWLINE_TOKEN,
    EncodedMedia,
    EncodedSample,
    MediaBytes,
    MediaSpecs,
    Modality,
    Sample,
    Turn,
)


class PlannedMedia(NamedTuple):
    """What a media item takes up, known from its header: `tokens` of the document, `inputs` of the tower."""

    tokens: int
    inputs: int


@dataclass(frozen=True)
class Encoder:
    """How the samples of one source become documents. Travels to worker processes.

    `max_tokens`, `on_long`: `data.seq_len` and what happens to longer samples; `max_pixels`: `data.image.max_pixels`.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate
    specs: MediaSpecs
    max_tokens: int
    on_long: Literal["drop", "truncate", "error"]
    max_pixels: int

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that give every sample the same length, before the rule for long ones is applied."""
        parts = [self.tokenizer.fingerprint, self.template.fingerprint, asdict(self.specs), self.max_pixels]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def planned(self, modality: Modality, header: Lengths) -> PlannedMedia:
        """Tokens and tower inputs of a media item from what its header says.

        Raises:
            BadSampleError: `modality`, the model takes none; or the item is known to be unusable without decoding it.
        """
        if modality == "image" and self.specs.image:
            if not header.width:
                raise BadSampleError("decode_image", "the header cannot be read")
            check_image_size(header.width, header.height, self.max_pixels)
            layout = image_layout(self.specs.image, header.width, header.height)
            return PlannedMedia(layout.num_tokens, layout.num_inputs)
        if modality == "video" and self.specs.video and self.specs.image:
            frames = planned_frames(header, self.specs.video)
            check_image_size(header.width, header.height, self.max_pixels)
            return PlannedMedia(frames * self.specs.image.tokens, frames)
        if modality == "audio" and self.specs.audio:
            samples = planned_samples(header.audio_samples, header.rate_hz, self.specs.audio)
            return PlannedMedia(self.specs.audio.num_tokens(samples), -(-samples // self.specs.audio.window_samples))
        raise BadSampleError("modality", f"the model takes no {modality}")

    def encode(self, sample: Sample) -> EncodedSample:
        """The document of `sample`. Raises BadSampleError when it cannot be used."""
        decoded = [decode_media(item, self.specs, self.max_pixels) for item in sample.media]
        chat, media = encode_turns(self.template, self.tokenizer, sample.turns, decoded)
        end = max((item.slot + item.num_tokens for item in media), default=0)
        length = self.kept_tokens(len(chat.input_ids), end)
        if not length:
            raise BadSampleError(TOO_LONG, f"{len(chat.input_ids)} tokens, a pack has {self.max_tokens}")
        input_ids, is_target = torch.from_numpy(chat.input_ids[:length]), torch.from_numpy(chat.is_target[:length])
        return EncodedSample(sample.id, input_ids, is_target, media)

    def kept_tokens(self, tokens: int, end_of_media: int) -> int:
        """Tokens of a document under the rule for long ones; 0 = left out.

        Only text behind the last media item is ever cut: a sample with media beyond `max_tokens` is left out.
        """
        if tokens <= self.max_tokens:
            return tokens
        return self.max_tokens if self.on_long == "truncate" and end_of_media <= self.max_tokens else 0

    def filler(self, id: str, length: int) -> EncodedSample:
        """A document of `length` tokens without targets and media, in the place of a sample that failed."""
        input_ids = torch.full((length,), self.tokenizer.pad_id, dtype=torch.int64)
        return EncodedSample(id, input_ids, torch.zeros(length, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class DecodedMedia:
    """A media item ready for its tower; the fields are those of `EncodedMedia`, its place is not known yet."""

    modality: Modality
    data: torch.Tensor
    num_tokens: int
    rows: NDArray[np.int64] | None = None


def decode_media(item: MediaBytes, specs: MediaSpecs, max_pixels: int) -> DecodedMedia:
    """Tower inputs of a media item and the tokens that they give. Raises BadSampleError when it cannot be used."""
    if item.modality == "image" and specs.image:
        pixels = open_pixels(item.data, max_pixels)
        layout = image_layout(specs.image, width=pixels.shape[1], height=pixels.shape[0])
        return DecodedMedia("image", to_inputs(pixels, specs.image), layout.num_tokens, layout.rows)
    if item.modality == "video" and specs.video and specs.image:
        frames = decode_video(item.data, specs.video, specs.image, max_pixels)
        return DecodedMedia("video", frames, len(frames) * specs.image.tokens)
    if item.modality == "audio" and specs.audio:
        windows, num_samples = decode_audio(item.data, specs.audio)
        return DecodedMedia("audio", windows, specs.audio.num_tokens(num_samples))
    raise BadSampleError("modality", f"the model takes no {item.modality}")


def encode_turns(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    turns: Sequence[Turn],
    decoded: Sequence[DecodedMedia],
    generation_prompt: bool = False,
) -> tuple[ChatEncoding, tuple[EncodedMedia, ...]]:
    """A conversation with the slots of its media, and the media in slot order; newline tokens have their own id.

    Raises:
        BadSampleError: as `encode_chat` does.
        ConfigError: the tokenizer lacks a special token of the template or the newline token.
    """
    tokens = media_counts((item.modality, item.num_tokens) for item in decoded)
    chat = encode_chat(template, tokenizer, turns, tokens, generation_prompt=generation_prompt)
    by_modality = {m: [item for item in decoded if item.modality == m] for m in MODALITIES}
    placed = []
    for modality, i, slot in chat.slots:
        item = by_modality[modality][i]
        if item.rows is not None and (item.rows == NEWLINE).any():
            chat.input_ids[slot + np.flatnonzero(item.rows == NEWLINE)] = tokenizer.special_id(NEWLINE_TOKEN)
        placed.append(EncodedMedia(modality, item.data, slot, item.num_tokens, item.rows))
    return chat, tuple(placed)


def media_counts(items: Iterable[tuple[Modality, int]]) -> dict[Modality, list[int]]:
    """Token counts by modality, in the order of the items."""
    counts: dict[Modality, list[int]] = {}
    for modality, tokens in items:
        counts.setdefault(modality, []).append(tokens)
    return counts


def media_end(chat: ChatEncoding, media_tokens: Mapping[Modality, Sequence[int]]) -> int:
    """The position behind the last media token of a conversation, 0 without media."""
    return max((slot + media_tokens[modality][i] for modality, i, slot in chat.slots), default=0)
