"""Answers from an exported model: a batch of conversations in, greedy answers out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mmscale.errors import BadSampleError, ConfigError, DataError
from mmscale.model.hub import media_inputs, register
from mmscale.streaming.chat import ChatTemplate, load_template
from mmscale.streaming.decode.image import open_image
from mmscale.streaming.encode import decode_media, encode_turns
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import EncodedMedia, MediaSpecs, Sample

CHAT_FILE = "chat.yaml"
"""The chat template that an export of mmscale's own class carries."""

MAX_PIXELS = 64_000_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, None: "auto"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer: its text, and its token ids without the end token."""

    text: str
    ids: tuple[int, ...]


class Prompts(Protocol):
    """Turns conversations into the inputs of a model's `generate`."""

    def build(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` [B, S], padded on the left, and the media inputs of the model."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        ...


class OwnPrompts:
    """Prompts of mmscale's own export, by the code that made the training data."""

    def __init__(self, folder: Path, specs: MediaSpecs) -> None:
        self._tokenizer = TextTokenizer.load(folder, pad_to_multiple=1)
        self._template: ChatTemplate = load_template(folder / CHAT_FILE)
        self._specs = specs

    def build(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """See `Prompts.build`. Raises DataError naming the sample and what is wrong with it."""
        texts: list[NDArray[np.int64]] = []
        media: list[EncodedMedia] = []
        for sample in samples:
            try:
                decoded = [decode_media(item, self._specs, MAX_PIXELS) for item in sample.media]
                chat, placed = encode_turns(
                    self._template, self._tokenizer, sample.turns, decoded, generation_prompt=True
                )
            except BadSampleError as error:
                raise _unreadable(sample, error) from error
            texts.append(chat.input_ids)
            media += placed
        return {**_pad_left(texts, self._tokenizer.pad_id), **media_inputs(media, self._specs)}

    def decode(self, ids: Sequence[int]) -> str:
        """See `Prompts.decode`."""
        return self._tokenizer.decode(ids)


class ProcessorPrompts:
    """Prompts of a stock LLaVA folder, by its own Hugging Face processor."""

    def __init__(self, folder: Path) -> None:
        self._processor = AutoProcessor.from_pretrained(folder)

    def build(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """See `Prompts.build`. Raises DataError for media other than images."""
        texts, images = [], []
        for sample in samples:
            try:
                images += self._images(sample)
            except BadSampleError as error:
                raise _unreadable(sample, error) from error
            messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
            texts.append(self._processor.apply_chat_template(messages, add_generation_prompt=True))
        inputs = self._processor(
            text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt"
        )
        return {k: v for k, v in inputs.items() if k != "token_type_ids"}

    def decode(self, ids: Sequence[int]) -> str:
        """See `Prompts.decode`."""
        return self._processor.tokenizer.decode(ids)

    def _images(self, sample: Sample) -> list[Image.Image]:
        """The pictures of a sample, upright and in RGB as in training."""
        other = [item.modality for item in sample.media if item.modality != "image"]
        if other:
            raise BadSampleError("modality", f"a LLaVA export takes images only, the sample has {other[0]}")
        tags = sum(turn.text.count(self._processor.image_token) for turn in sample.turns)
        if tags != len(sample.media):
            raise BadSampleError(
                "media_count", f"{tags} {self._processor.image_token} tags for {len(sample.media)} images"
            )
        return [open_image(item.data, MAX_PIXELS) for item in sample.media]


class Generator:
    """An exported model that answers; open one with `mmscale.load(folder)`. `model` is the Hugging Face model itself."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self.model = model.eval()
        self._prompts = prompts

    @classmethod
    def from_folder(cls, path: str | Path, device: str = "cpu", dtype: str | None = None) -> Generator:
        """See `mmscale.load`."""
        folder = Path(path)
        kind = _model_type(folder)
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype: expected fp32, bf16 or None, found {dtype!r}")
        register()
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=_DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
        model, loading = loaded
        bad = {name: sorted(keys)[:3] for name, keys in loading.items() if keys}
        if bad:
            raise ConfigError(f"{folder}: expected weights that fit config.json, found {bad}; export the model again")
        prompts = OwnPrompts(folder, model.config.specs) if kind == "mmscale" else ProcessorPrompts(folder)
        return cls(model.to(device), prompts)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The model's inputs for the conversations of `samples`, each ending where its answer starts."""
        return {k: v.to(self.model.device) for k, v in self._prompts.build(samples).items()}

    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 64) -> list[Answer]:
        """Greedy answers to conversations that end with a user turn, all in one batch.

        Raises:
            DataError: a sample that the model cannot read; the text names it.
        """
        inputs = self.inputs(samples)
        with torch.no_grad():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        ends = self.model.generation_config.eos_token_id
        stops = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            length = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            answers.append(Answer(self._prompts.decode(ids[:length]), tuple(ids[:length])))
        return answers


def _unreadable(sample: Sample, error: BadSampleError) -> DataError:
    return DataError(
        f"{sample.id}: expected a conversation that the model can read, found {error}; correct it or leave it out"
    )


def _pad_left(rows: Sequence[Any], pad_id: int) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = torch.as_tensor(row)
        attention_mask[i, longest - len(row) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _model_type(folder: Path) -> str:
    try:
        config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: expected a folder written by mmscale consolidate, found no readable config.json: {error}"
        ) from error
    if kind not in ("mmscale", "llava"):
        raise ConfigError(
            f"{folder}: expected a model of type mmscale or llava, found {kind!r}; export it with mmscale consolidate"
        )
    return str(kind)
