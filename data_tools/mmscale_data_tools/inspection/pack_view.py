"""One packed batch as a person reads it: documents, and in each the runs of text, targets and media."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np

from mmscale.types import IGNORE, MODALITIES, MediaBatch, Modality, PackedBatch

if TYPE_CHECKING:
    import torch

Kind = Literal["text", "target", "image", "video", "audio", "filler"]
"""What a token is: given, to be predicted, a row of a medium, or the stand-in of a sample that failed."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one kind: `start` in the pack, how many, their `text` (media: none).

    `media`: the tower inputs of the item, [inputs, ...] as `MediaBatch.data`; None for text.
    """

    kind: Kind
    start: int
    num_tokens: int
    text: str = ""
    media: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a pack; `fault` says why it is filler, empty when it is not."""

    id: str
    start: int
    num_tokens: int
    runs: tuple[Run, ...]
    fault: str = ""

    def count(self, kind: Kind) -> int:
        """Tokens of a kind."""
        return sum(run.num_tokens for run in self.runs if run.kind == kind)


@dataclass(frozen=True, slots=True)
class PackView:
    """A pack with its documents in order. `seq_len`: the tokens that it could hold."""

    name: str
    seq_len: int
    documents: tuple[Document, ...]

    @property
    def num_tokens(self) -> int:
        """T, with filler."""
        return sum(document.num_tokens for document in self.documents)

    def count(self, kind: Kind) -> int:
        """Tokens of a kind in all documents."""
        return sum(document.count(kind) for document in self.documents)

    @property
    def title(self) -> str:
        """What stands above the picture: fill and tokens by kind."""
        kinds = ", ".join(f"{self.count(kind):,} {name}" for kind, name in LEGEND.items() if self.count(kind))
        fill = f"{self.num_tokens:,} of {self.seq_len:,} tokens ({self.num_tokens / self.seq_len:.1%})"
        return f"{self.name}: {len(self.documents)} documents, {fill}: {kinds}"


LEGEND: dict[Kind, str] = {
    "text": "text",
    "target": "target tokens",
    "image": "image",
    "video": "video",
    "audio": "audio",
    "filler": "filler",
}


def view_pack(pack: PackedBatch, name: str, seq_len: int, decode: Callable[[Sequence[int]], str]) -> PackView:
    """The pack as it is trained: nothing here knows more than the batch itself.

    Args:
        pack: what the collator gave.
        name: shown in the title.
        seq_len: tokens that a pack can hold.
        decode: token ids to text.
    """
    faults = {skip.id: f"{skip.reason}: {skip.detail}" for skip in pack.skipped}
    kinds, items = _kinds(pack)
    ids = pack.input_ids.numpy()
    documents = []
    bounds = pack.cu_seqlens.tolist()
    for s, (lo, hi) in enumerate(pairwise(bounds)):
        if pack.ids[s] in faults:
            runs: tuple[Run, ...] = (Run("filler", lo, hi - lo),)
        else:
            runs = tuple(_runs(lo, hi, kinds, items, ids, decode))
        documents.append(Document(pack.ids[s], lo, hi - lo, runs, faults.get(pack.ids[s], "")))
    return PackView(name, seq_len, tuple(documents))


_CODES: list[Kind] = ["text", "target", *MODALITIES]
_MediaAt = dict[int, tuple[Modality, int, "torch.Tensor"]]


def _kinds(pack: PackedBatch) -> tuple[np.ndarray, _MediaAt]:
    """The kind of each token, int8 [T] index into _CODES, and the media items by their first token."""
    kinds = np.zeros(pack.num_tokens, np.int8)
    # labels[t] is the token at t + 1, so the token that a reader sees as a target stands one further on
    kinds[1:][pack.labels.numpy()[:-1] != IGNORE] = _CODES.index("target")
    items: _MediaAt = {}
    for modality, batch in pack.media.items():
        for slot, num_tokens, inputs in _split_items(batch):
            kinds[slot : slot + num_tokens] = _CODES.index(modality)
            items[slot] = modality, num_tokens, inputs
    return kinds, items


def _split_items(batch: MediaBatch) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first token, tokens, tower inputs) of each item."""
    inputs = batch.data.split(batch.num_inputs.tolist())
    yield from zip(batch.slot.tolist(), batch.num_tokens.tolist(), inputs, strict=True)


def _runs(
    lo: int, hi: int, kinds: np.ndarray, items: _MediaAt, ids: np.ndarray, decode: Callable[[Sequence[int]], str]
) -> Iterator[Run]:
    position = lo
    while position < hi:
        if position in items:
            modality, num_tokens, data = items[position]
            yield Run(modality, position, num_tokens, media=data)
        else:
            other = np.flatnonzero(kinds[position:hi] != kinds[position])
            num_tokens = int(other[0]) if len(other) else hi - position
            text = decode(ids[position : position + num_tokens].tolist())
            yield Run(_CODES[kinds[position]], position, num_tokens, text)
        position += num_tokens
