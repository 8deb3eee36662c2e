"""Which part of a whole parameter a rank holds, and the pieces of whole tensors that a checkpoint is written in.

Tensor parallelism cuts a parameter along one dimension. A rank's part is a list of pieces: one for a plain cut, several for a
fused projection (its queries, its keys, its values).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` rows along the cut dimension, from `start` in the whole and from `local_start` in the rank's part."""

    start: int
    local_start: int
    length: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One rank's part of a parameter of shape `whole`, cut along `dim`.

    `is_writer`: of the ranks of a tensor-parallel group that hold the same pieces (replicated key/value heads), the one that
    writes them into checkpoints.
    """

    whole: torch.Size
    dim: int
    pieces: tuple[Piece, ...]
    is_writer: bool = True

    @property
    def local(self) -> torch.Size:
        """Shape of this rank's part."""
        size = list(self.whole)
        size[self.dim] = sum(piece.length for piece in self.pieces)
        return torch.Size(size)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a contiguous copy."""
        parts = [whole.narrow(self.dim, piece.start, piece.length) for piece in self.pieces]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a whole tensor of shape `whole`: `value` stands at `offsets`."""

    value: Tensor
    offsets: tuple[int, ...]
    whole: torch.Size


def chunks(local: Tensor, layout: ShardLayout | None, first_row: int = 0) -> Iterator[Chunk]:
    """Where rows of a rank's part stand in the whole tensor; nothing from a rank that is not the writer.

    Args:
        local: rows `first_row : first_row + len(local)` (along dimension 0) of the rank's part; a scalar is whole.
        layout: None = the rank's part is the whole tensor, of which `local` must then be all rows.
    """
    if layout is None:
        yield Chunk(local, (0,) * local.dim(), local.shape)
        return
    if not layout.is_writer:
        return
    for piece in layout.pieces:
        if layout.dim == 0:
            begin, end = (
                max(piece.local_start, first_row),
                min(piece.local_start + piece.length, first_row + len(local)),
            )
            if begin < end:
                offsets = (piece.start + begin - piece.local_start, *(0,) * (local.dim() - 1))
                yield Chunk(local[begin - first_row : end - first_row], offsets, layout.whole)
        elif len(local):
            offsets = tuple(first_row if d == 0 else piece.start if d == layout.dim else 0 for d in range(local.dim()))
            yield Chunk(local.narrow(layout.dim, piece.local_start, piece.length), offsets, layout.whole)


def whole_layout(shape: torch.Size) -> ShardLayout:
    """The layout of a parameter that every tensor-parallel rank holds whole, for `chunks` of some of its rows."""
    return ShardLayout(shape, 0, (Piece(0, 0, shape[0] if shape else 1),))
