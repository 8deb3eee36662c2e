"""One sample to one document: media decoded, text tokenised, targets marked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from mmscale.errors import BadSampleError
from mmscale.streaming.chat import ChatEncoding, ChatTemplate, encode_chat
from mmscale.streaming.decode.audio import decode_audio, planned_samples
from mmscale.streaming.decode.image import check_image_size, decode_image
from mmscale.streaming.media import Lengths
from mmscale.streaming.plan import TOO_LONG
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import MODALITIES, EncodedMedia, EncodedSample, MediaBytes, MediaSpecs, Modality, Sample


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

    def planned_tokens(self, modality: Modality, lengths: Lengths) -> int:
        """Tokens of a media item from what its header says.

        Raises:
            BadSampleError: `modality`, the model takes none; or the item is known to be unusable without decoding it.
        """
        if modality == "image" and self.specs.image:
            if not lengths.width:
                raise BadSampleError("decode_image", "the header cannot be read")
            check_image_size(lengths.width, lengths.height, self.max_pixels)
            return self.specs.image.tokens
        if modality == "audio" and self.specs.audio:
            return self.specs.audio.num_tokens(
                planned_samples(lengths.audio_samples, lengths.rate_hz, self.specs.audio)
            )
        raise BadSampleError("modality", f"the model takes no {modality}")

    def encode(self, sample: Sample) -> EncodedSample:
        """The document of `sample`. Raises BadSampleError when it cannot be used."""
        decoded = [self._decode(item) for item in sample.media]
        tokens = media_counts((m.modality, n) for m, (_, n) in zip(sample.media, decoded, strict=True))
        chat = encode_chat(self.template, self.tokenizer, sample.turns, tokens)
        by_modality = {
            m: [d for item, d in zip(sample.media, decoded, strict=True) if item.modality == m] for m in MODALITIES
        }
        media = tuple(EncodedMedia(m, by_modality[m][i][0], slot, by_modality[m][i][1]) for m, i, slot in chat.slots)
        length = self.kept_tokens(len(chat.input_ids), media_end(chat, tokens))
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

    def _decode(self, item: MediaBytes) -> tuple[torch.Tensor, int]:
        """Tower inputs of a media item and its number of tokens."""
        if item.modality == "image" and self.specs.image:
            return decode_image(item.data, self.specs.image, self.max_pixels)[None], self.specs.image.tokens
        if item.modality == "audio" and self.specs.audio:
            windows, num_samples = decode_audio(item.data, self.specs.audio)
            return windows, self.specs.audio.num_tokens(num_samples)
        raise BadSampleError("modality", f"the model takes no {item.modality}")


def media_counts(items: Iterable[tuple[Modality, int]]) -> dict[Modality, list[int]]:
    """Token counts by modality, in the order of the items."""
    counts: dict[Modality, list[int]] = {}
    for modality, tokens in items:
        counts.setdefault(modality, []).append(tokens)
    return counts


def media_end(chat: ChatEncoding, media_tokens: Mapping[Modality, Sequence[int]]) -> int:
    """The position behind the last media token of a conversation, 0 without media."""
    return max((slot + media_tokens[modality][i] for modality, i, slot in chat.slots), default=0)
