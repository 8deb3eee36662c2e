"""The peer of the step benchmarks: a padded training loop as one writes it with transformers.

The same shards, encoder, towers, weights, optimizer and clipping as ours; documents side by side in rows of [B, S], padded
to the longest, Hugging Face's own sdpa attention with an attention mask, its own loss.

Shapes: B documents, S tokens of the longest, N images, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers.trainer_pt_utils import LengthGroupedSampler

from mmscale.config.schema import Config
from mmscale.model.composite import MultimodalLM, build_model
from mmscale.model.llm.load import load_llm
from mmscale.streaming.encode import Encoder
from mmscale.streaming.lengths import sample_lengths
from mmscale.streaming.shards import ShardSet
from mmscale.train.optim import build_optimizer, param_groups
from mmscale.types import IGNORE, EncodedSample


@dataclass(frozen=True)
class PaddedBatch:
    """`input_ids`, `attention_mask`, `labels` (not shifted) int64 [B, S]; `images` uint8 [N, 3, side, side], `is_image` bool
    [B, S]; `num_tokens` without padding."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor
    is_image: torch.Tensor
    num_tokens: int

    @property
    def num_targets(self) -> int:
        """Loss terms: the first token of a row is nobody's target."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def pad(documents: Sequence[EncodedSample], pad_id: int) -> PaddedBatch:
    """The batch of some documents, padded on the right."""
    rows = [d.input_ids for d in documents]
    labels = [torch.where(d.is_target, d.input_ids, IGNORE) for d in documents]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    is_image = torch.zeros_like(input_ids, dtype=torch.bool)
    for b, document in enumerate(documents):
        for item in document.media:
            is_image[b, item.slot : item.slot + item.num_tokens] = True
    images = [item.data for d in documents for item in d.media]
    return PaddedBatch(
        input_ids=input_ids,
        attention_mask=mask,
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        images=torch.cat(images) if images else torch.empty(0),
        is_image=is_image,
        num_tokens=sum(len(r) for r in rows),
    )


class PaddedTrainer:
    """Trains a `MultimodalLM` on padded batches; one micro-batch per optimizer step."""

    def __init__(
        self, config: Config, vocab_size: int, shards: ShardSet, encoder: Encoder, device: torch.device
    ) -> None:
        self._train, self._device = config.train, device
        self._shards, self._encoder = shards, encoder
        self.model = _with_sdpa(build_model(config, vocab_size, encoder.specs)).to(device)
        self._optimizer = build_optimizer(param_groups(self.model, config.train), config.train)

    def lengths(self) -> list[int]:
        """Tokens of each row of the shards."""
        return [int(n) for n in sample_lengths(self._shards, self._encoder).tokens]

    def batches(self, size: int, *, group_by_length: bool) -> list[list[int]]:
        """The rows of each batch of one epoch, in arrival order or as `group_by_length` of transformers orders them."""
        lengths = self.lengths()
        order = list(range(len(lengths)))
        if group_by_length:
            generator = torch.Generator().manual_seed(self._train.seed)
            order = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
        return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]

    def read(self, rows: Sequence[int]) -> PaddedBatch:
        """The batch of some rows of the shards."""
        return pad([self._encoder.encode(self._shards.read(row)) for row in rows], self._encoder.tokenizer.pad_id)

    def loss(self, batch: PaddedBatch) -> torch.Tensor:
        """The mean of the token losses."""
        ids, is_image = batch.input_ids.to(self._device), batch.is_image.to(self._device)
        embeds_BSD = self.model.llm.get_input_embeddings()(ids)
        if len(batch.images):
            assert self.model.vision is not None, "the model of the benchmark has a vision tower"
            rows_MD = self.model.vision(batch.images.to(self._device)).flatten(0, 1)
            embeds_BSD = embeds_BSD.masked_scatter(is_image[..., None], rows_MD.to(embeds_BSD.dtype))
        out = self.model.llm(
            inputs_embeds=embeds_BSD,
            attention_mask=batch.attention_mask.to(self._device),
            labels=batch.labels.to(self._device),
            use_cache=False,
        )
        return out.loss

    def step(self, rows: Sequence[int]) -> int:
        """One optimizer step on some rows; gives the tokens that were no padding."""
        batch = self.read(rows)
        with self.autocast():
            loss = self.loss(batch)
        loss.backward()
        loss.item()
        norm = clip_grad_norm_(self.model.parameters(), self._train.clip)
        norm.item()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return batch.num_tokens

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 where the run's configuration says so."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._train.dtype == "bf16")


def _with_sdpa(model: MultimodalLM) -> MultimodalLM:
    """The model with Hugging Face's own attention in the language model, same weights."""
    llm = load_llm(model.llm.config, attention="sdpa")
    llm.load_state_dict(model.llm.state_dict())
    model.llm = llm.train()
    return model
