"""Media placement: the rows of a pack, each from the text embeddings or from the media features, in one pass.

Where each row comes from and where each media row goes is known on the host before the step, so nothing here looks for masked
positions: every pass is a copy of rows, forward and backward, without a device-to-host sync and without atomics. `masked_scatter`
counts the mask and its backward calls `nonzero`, a sync; it also holds a mask and an index as wide as the rows.

Two variants: `embed_and_place` looks the text up as well, so that a text row is read and written once; `place_media` follows
any other embedding (scaled, or divided over the vocabulary). On CUDA they run as Triton kernels (`dispatch.py`), elsewhere as
the torch code below, which is exact in any type.

Shapes: T tokens, M media rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.kernels.dispatch import OnDeviceOf, use_triton

_INTEGERS = (torch.int32, torch.int64)
_SORTED_ROWS = 3073
"""Rows from which CUDA's gradient of an embedding sorts and adds up in fp32. With fewer it adds in the type of the gradient (5e-3
off in bf16), and beyond 1024 without a barrier that it needs (pytorch#187687, #199569)."""


def embed_and_place(
    weight_VD: Tensor,
    ids_T: Tensor,
    media_MD: Tensor,
    source_index_T: Tensor,
    media_positions_M: Tensor,
    padding_idx: int | None = None,
) -> Tensor:
    """The embedded pack [T, D] in the type of `weight_VD`: a media row, or the embedding of the position's id.

    Args:
        weight_VD: embedding table [V, D]. Only ids of text rows add to its gradient, always in the same order.
        ids_T: int32 or int64 [T], 0 to V - 1. Those under media are not used.
        media_MD: [M, D], M may be 0; cast to the type of the table.
        source_index_T, media_positions_M: as in `place_media`.
        padding_idx: a row of the table without a gradient; None = there is none.

    Raises:
        ValueError: shapes or types that do not fit each other.
        RuntimeError: a second derivative is asked for.

    Cost:
        reads and writes T x D once, no transient copy; backward likewise, and a table's gradient [V + 1, D] unless it is frozen.
    """
    _check(weight_VD, media_MD, source_index_T, media_positions_M)
    if ids_T.shape != source_index_T.shape or ids_T.dtype not in _INTEGERS:
        raise ValueError(
            f"ids_T: int32 or int64 {list(source_index_T.shape)} as source_index_T is expected, found {ids_T.dtype} "
            f"{list(ids_T.shape)}; pass the ids of the same positions"
        )
    return _embed_and_place(weight_VD, ids_T, media_MD, source_index_T, media_positions_M, padding_idx)


def place_media(text_TD: Tensor, media_MD: Tensor, source_index_T: Tensor, media_positions_M: Tensor) -> Tensor:
    """The embedded pack [T, D] in the type of `text_TD`: row t is row `source_index_T[t]` of `cat([text_TD, media_MD])`.

    Args:
        text_TD: text embeddings [T, D]; the rows under media are not used and get a zero gradient.
        media_MD: media features [M, D], M may be 0; cast to the type of `text_TD`. Rows that are not used get a zero gradient.
        source_index_T: int32 or int64 [T]: t for a text row, T + m for media row m, which stands at one position at most.
        media_positions_M: int32 or int64 [M], its inverse, see `media_positions`.

    Raises:
        ValueError: shapes or types that do not fit each other.
        RuntimeError: a second derivative is asked for.

    Cost:
        reads and writes T x D once, no transient copy; backward likewise.
    """
    _check(text_TD, media_MD, source_index_T, media_positions_M)
    if text_TD.shape[0] != source_index_T.shape[0]:
        raise ValueError(
            f"text_TD: a row for each of the {source_index_T.shape[0]} positions is expected, found {text_TD.shape[0]}; pass "
            "the embeddings of the same positions"
        )
    return _place_media(text_TD, media_MD, source_index_T, media_positions_M)


def media_positions(source_index_T: Tensor, num_media: int) -> Tensor:
    """Where each media row stands in a pack, int32 [M], -1 = nowhere: what `place_media` wants, built on the host.

    Args:
        source_index_T: int64 [T] on the CPU: t for a text row, T + m for media row m.
        num_media: M.

    Raises:
        ValueError: a media row beyond M, or one that stands at two positions: its gradient would be a sum.

    Example:
        >>> media_positions(torch.tensor([0, 5, 4, 3]), 3).tolist()
        [2, 1, -1]
    """
    num_tokens = source_index_T.shape[0]
    at = torch.nonzero(source_index_T >= num_tokens).flatten()
    rows = source_index_T[at] - num_tokens
    if at.numel() and int(rows.max()) >= num_media:
        raise ValueError(
            f"source_index_T: media rows 0 to {num_media - 1} are expected, found {int(rows.max())}; the encoder and the "
            "index disagree on the rows per input"
        )
    positions_M = torch.full((num_media,), -1, dtype=torch.int32)
    positions_M[rows] = at.to(torch.int32)
    taken_twice = rows[positions_M[rows] != at]
    if taken_twice.numel():
        raise ValueError(
            f"source_index_T: each media row at one position is expected, found row {int(taken_twice[0])} at two; repeat the row"
        )
    return positions_M


def _check(like: Tensor, media_MD: Tensor, source_index_T: Tensor, media_positions_M: Tensor) -> None:
    if like.dim() != 2 or media_MD.dim() != 2 or like.shape[1] != media_MD.shape[1]:
        raise ValueError(
            f"text and media rows of one width are expected, found {list(like.shape)} and {list(media_MD.shape)}; let the "
            "connector give rows of the language model's width"
        )
    if media_positions_M.shape != media_MD.shape[:1] or source_index_T.dim() != 1:
        raise ValueError(
            f"source_index_T [T] and media_positions_M [{media_MD.shape[0]}] are expected, one position for each media row, found "
            f"{list(source_index_T.shape)} and {list(media_positions_M.shape)}; the encoder and the index disagree on the rows"
        )
    if source_index_T.dtype not in _INTEGERS or media_positions_M.dtype not in _INTEGERS:
        raise ValueError(
            f"int32 or int64 indices are expected, found {source_index_T.dtype} and {media_positions_M.dtype}; convert them"
        )


@torch.library.custom_op("mmscale::embed_and_place", mutates_args=())
def _embed_and_place(
    weight_VD: Tensor, ids_T: Tensor, media_MD: Tensor, source_T: Tensor, positions_M: Tensor, padding_idx: int | None
) -> Tensor:
    if use_triton(weight_VD, ids_T, media_MD, source_T, positions_M):
        return _place_rows(weight_VD, ids_T, media_MD, source_T)
    num_tokens = ids_T.shape[0]
    rows = weight_VD.new_empty(num_tokens + 1, weight_VD.shape[1])
    torch.index_select(weight_VD, 0, ids_T, out=rows[:num_tokens])
    return _put_media(rows, media_MD, positions_M)


@_embed_and_place.register_fake
def _(
    weight_VD: Tensor, ids_T: Tensor, media_MD: Tensor, source_T: Tensor, positions_M: Tensor, padding_idx: int | None
) -> Tensor:
    return weight_VD.new_empty(ids_T.shape[0], weight_VD.shape[1])


@torch.library.custom_op("mmscale::place_media", mutates_args=())
def _place_media(text_TD: Tensor, media_MD: Tensor, source_T: Tensor, positions_M: Tensor) -> Tensor:
    if use_triton(text_TD, media_MD, source_T, positions_M):
        return _place_rows(text_TD, None, media_MD, source_T)
    num_tokens = text_TD.shape[0]
    rows = text_TD.new_empty(num_tokens + 1, text_TD.shape[1])
    rows[:num_tokens] = text_TD
    return _put_media(rows, media_MD, positions_M)


@_place_media.register_fake
def _(text_TD: Tensor, media_MD: Tensor, source_T: Tensor, positions_M: Tensor) -> Tensor:
    return torch.empty_like(text_TD, memory_format=torch.contiguous_format)


def _put_media(rows: Tensor, media_MD: Tensor, positions_M: Tensor) -> Tensor:
    """The first T of the T + 1 rows, with media in their places; what stands nowhere goes to the last row."""
    num_tokens = rows.shape[0] - 1
    places_M = torch.where(positions_M < 0, num_tokens, positions_M.long())
    rows.index_copy_(0, places_M, media_MD.to(rows.dtype))
    return rows[:num_tokens]


def _zero_rows(rows: Tensor, is_zero: Tensor) -> Tensor:
    """`rows` with zeros where `is_zero`, in place."""
    if rows.is_cpu:  # where a list of rows costs no sync, it is ten times as fast as a mask
        return rows.index_fill_(0, torch.nonzero(is_zero).flatten(), 0)
    return rows.masked_fill_(is_zero[:, None], 0)


@torch.library.custom_op("mmscale::media_rows_grad", mutates_args=())
def _media_rows_grad(grad_TD: Tensor, positions_M: Tensor, dtype: torch.dtype) -> Tensor:
    """[M, D]: the gradient at each media row's position, 0 for rows that stand nowhere."""
    if use_triton(grad_TD, positions_M):
        from mmscale.kernels.triton_kernels.placement import gather_rows

        out_MD = grad_TD.new_empty(positions_M.shape[0], grad_TD.shape[1], dtype=dtype)
        _launch(gather_rows, out_MD, grad_TD.contiguous(), positions_M.contiguous(), out_MD)
        return out_MD
    if not grad_TD.shape[0]:
        return grad_TD.new_zeros(positions_M.shape[0], grad_TD.shape[1], dtype=dtype)
    rows_MD = grad_TD.index_select(0, positions_M.clamp_min(0).long())
    return _zero_rows(rows_MD, positions_M < 0).to(dtype)


@_media_rows_grad.register_fake
def _(grad_TD: Tensor, positions_M: Tensor, dtype: torch.dtype) -> Tensor:
    return grad_TD.new_empty(positions_M.shape[0], grad_TD.shape[1], dtype=dtype)


@torch.library.custom_op("mmscale::text_rows_grad", mutates_args=())
def _text_rows_grad(grad_TD: Tensor, source_T: Tensor) -> Tensor:
    """[T, D]: the gradient of text rows, 0 under media."""
    num_tokens = source_T.shape[0]
    if use_triton(grad_TD, source_T):
        from mmscale.kernels.triton_kernels.placement import keep_text_rows

        out_TD = torch.empty_like(grad_TD, memory_format=torch.contiguous_format)
        _launch(keep_text_rows, out_TD, grad_TD.contiguous(), source_T.contiguous(), out_TD, num_tokens)
        return out_TD
    return _zero_rows(grad_TD.clone(memory_format=torch.contiguous_format), source_T >= num_tokens)


@_text_rows_grad.register_fake
def _(grad_TD: Tensor, source_T: Tensor) -> Tensor:
    return torch.empty_like(grad_TD, memory_format=torch.contiguous_format)


@torch.library.custom_op("mmscale::embedding_grad", mutates_args=())
def _embedding_grad(grad_TD: Tensor, ids_T: Tensor, source_T: Tensor, num_rows: int, padding_idx: int | None) -> Tensor:
    """[V, D]: per id the sum over its text rows. Positions without a gradient of their own go to row V, which is dropped."""
    has_none_T = source_T >= ids_T.shape[0]
    if padding_idx is not None:
        has_none_T |= ids_T == padding_idx
    rows_T = torch.where(has_none_T, num_rows, ids_T)
    missing = _SORTED_ROWS - rows_T.shape[0]
    if not grad_TD.is_cuda:  # it would add in the type of the gradient
        wide_TD = grad_TD.to(torch.promote_types(grad_TD.dtype, torch.float32))
    elif missing > 0:
        wide_TD, rows_T = F.pad(grad_TD, (0, 0, 0, missing)), F.pad(rows_T, (0, missing), value=num_rows)
    else:
        wide_TD = grad_TD
    sums = torch.ops.aten.embedding_dense_backward(wide_TD, rows_T, num_rows + 1, num_rows, False)
    return sums[:num_rows].to(grad_TD.dtype)


@_embedding_grad.register_fake
def _(grad_TD: Tensor, ids_T: Tensor, source_T: Tensor, num_rows: int, padding_idx: int | None) -> Tensor:
    return grad_TD.new_empty(num_rows, grad_TD.shape[1])


def _place_rows(text: Tensor, ids_T: Tensor | None, media_MD: Tensor, source_T: Tensor) -> Tensor:
    from mmscale.kernels.triton_kernels.placement import place_rows

    num_tokens = source_T.shape[0]
    out_TD = text.new_empty(num_tokens, text.shape[1])
    ids_T = None if ids_T is None else ids_T.contiguous()
    inputs = (text.contiguous(), ids_T, media_MD.contiguous(), source_T.contiguous())
    _launch(place_rows, out_TD, *inputs, out_TD, num_tokens)
    return out_TD


def _launch(kernel: Any, out: Tensor, *args: Tensor | int | None) -> None:
    """A program per row of `out` and block of its columns."""
    num_rows, width = out.shape
    if out.numel():
        block = block_columns(width)
        grid = (num_rows, -(-width // block))
        OnDeviceOf(out, kernel)[grid](*args, WIDTH=width, BLOCK=block, num_warps=num_warps(block))


def block_columns(width: int) -> int:
    """Columns per program, a power of two: the whole row when it is short, else the widest block that idles on at most 1/4."""
    if width <= 512:
        return 1 << (width - 1).bit_length()
    fitting = [block for block in (4096, 2048, 1024) if -width % block * 4 <= width]
    return fitting[0] if fitting else 512


def num_warps(block: int) -> int:
    """Warps that copy `block` columns: at 4 of them each thread has four 16-byte loads of bf16 in flight."""
    return min(4, max(1, block // 1024))


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight_VD, ids_T, media_MD, source_T, positions_M, padding_idx = inputs
    ctx.save_for_backward(ids_T, source_T, positions_M)
    ctx.facts = (weight_VD.shape[0], padding_idx, media_MD.dtype)


def _lookup_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    ids_T, source_T, positions_M = ctx.saved_tensors
    num_rows, padding_idx, dtype = ctx.facts
    weight_grad = media_grad = None
    if ctx.needs_input_grad[0]:
        weight_grad = _embedding_grad(grad_TD, ids_T, source_T, num_rows, padding_idx)
    if ctx.needs_input_grad[2]:
        media_grad = _media_rows_grad(grad_TD, positions_M, dtype)
    return weight_grad, None, media_grad, None, None, None


def _save_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, media_MD, source_T, positions_M = inputs
    ctx.save_for_backward(source_T, positions_M)
    ctx.dtype = media_MD.dtype


def _place_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    source_T, positions_M = ctx.saved_tensors
    text_grad = _text_rows_grad(grad_TD, source_T) if ctx.needs_input_grad[0] else None
    media_grad = _media_rows_grad(grad_TD, positions_M, ctx.dtype) if ctx.needs_input_grad[1] else None
    return text_grad, media_grad, None, None


def _refuse(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "media placement: first derivatives are expected, found a second one; take create_graph=True away"
    )


_embed_and_place.register_autograd(_lookup_backward, setup_context=_save_lookup)
_place_media.register_autograd(_place_backward, setup_context=_save_place)
for _op in (_media_rows_grad, _text_rows_grad, _embedding_grad):
    _op.register_autograd(_refuse)
