"""torch's flash attention for the CPU, segment by segment: fp64, fp32, bf16 and fp16, fewer key/value heads without copies.

Shapes: Q query rows, K key rows, H query heads, G key/value heads, D head size; n and m rows of one kernel call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mmscale.kernels.attention.base import Segment, Segments
from mmscale.kernels.attention.merge import merge_
from mmscale.kernels.dtypes import accumulate_dtype

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_LEAST_QUERIES, _MOST_QUERIES = 16, 256
"""Of one call with a window: fewer cost more in calls than they save, more compute scores that nobody sees."""


class _Rows(NamedTuple):
    start: int
    size: int


class _Call(NamedTuple):
    """One kernel call of some queries: over which keys; `causal` only for squares; `window` = with a mask, else none."""

    k: _Rows
    causal: bool
    window: int | None


class _Piece(NamedTuple):
    """Queries that are finished together, and the calls, over disjoint keys, that make up their result."""

    q: _Rows
    calls: tuple[_Call, ...]


class _Plan(NamedTuple):
    """The pieces, ascending.

    num_queries, num_keys  rows in all calls
    keys_once              no key row is in two calls
    in_order               besides, every piece is one call, whose keys come after those of the piece before: without gaps the
                           pieces cut queries and keys up, as the documents of a whole pack do
    """

    pieces: tuple[_Piece, ...]
    num_queries: int
    num_keys: int
    keys_once: bool
    in_order: bool

    def cuts_up(self, num_queries: int, num_keys: int) -> bool:
        """Whether the pieces, one after the other, are all of so many queries and keys."""
        return self.in_order and (num_queries, num_keys) == (self.num_queries, self.num_keys) and bool(self.pieces)


class CpuAten:
    """See `AttentionBackend`. Queries with keys before their square take two calls, merged."""

    name = "cpu_aten"

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """See `AttentionBackend.refuses`."""
        if device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {device.type}"
        known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return None if dtype in known else f"it takes floating-point numbers, the tensors are {dtype}"

    def forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.forward`."""
        plan = _plan(segments)
        q, k, v = (_heads_first(x) for x in (q_QHD, k_KGD, v_KGD))
        if plan.cuts_up(len(q_QHD), len(k_KGD)):
            return _forward_in_order(plan, q, k, v, scale)
        out = _new(q, q.dtype, full=plan.num_queries == len(q_QHD))
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulate_dtype(q.dtype))
        for piece in plan.pieces:
            part, part_lse = _attend(q.narrow(2, *piece.q), k, v, piece.calls, scale)
            out.narrow(2, *piece.q).copy_(part)
            lse.narrow(2, *piece.q).copy_(part_lse)
        return _rows_first(out), lse[0]

    def backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        segments: Segments, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `AttentionBackend.backward`."""
        plan = _plan(segments)
        once, lse = plan.keys_once, lse_HQ[None]
        dout, q, k, v, out = (_heads_first(x) for x in (dout_QHD, q_QHD, k_KGD, v_KGD, out_QHD))
        if plan.cuts_up(len(q_QHD), len(k_KGD)):
            return _backward_in_order(plan, (dout, q, out, lse), (k, v), scale)
        dtype = q.dtype if once else accumulate_dtype(q.dtype)
        dq = _new(q, dtype, full=once and plan.num_queries == len(q_QHD))
        dk, dv = (_new(x, dtype, full=once and plan.num_keys == len(k_KGD)) for x in (k, v))
        for piece in plan.pieces:
            by_query = [x.narrow(2, *piece.q) for x in (out, lse)]
            dout_n, q_n = (x.narrow(2, *piece.q) for x in (dout, q))
            for call in piece.calls:
                k_m, v_m = k.narrow(2, *call.k), v.narrow(2, *call.k)
                mask = _mask(q_n, k_m, call.window)
                parts = _backward(dout_n, q_n, k_m, v_m, *by_query, 0.0, call.causal, attn_mask=mask, scale=scale)
                for total, rows, part in zip((dq, dk, dv), (piece.q, call.k, call.k), parts, strict=True):
                    if once:
                        total.narrow(2, *rows).copy_(part)
                    else:
                        total.narrow(2, *rows).add_(part)
        return _rows_first(dq), _rows_first(dk), _rows_first(dv)


def _forward_in_order(
    plan: _Plan, q_1HQD: Tensor, k_1GKD: Tensor, v_1GKD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`CpuAten.forward` when the pieces cut everything up: views and results in one operator each, not one per document."""
    q_sizes, k_sizes = _sizes(plan)
    cut = zip(q_1HQD.split(q_sizes, 2), k_1GKD.split(k_sizes, 2), v_1GKD.split(k_sizes, 2), plan.pieces, strict=True)
    results = []
    for q, k, v, piece in cut:
        call = piece.calls[0]
        results.append(_forward(q, k, v, 0.0, call.causal, attn_mask=_mask(q, k, call.window), scale=scale))
    if len(results) == 1:
        out, lse = results[0]
        return _rows_first(out), lse[0]
    return _joined(tuple(out for out, _ in results)), torch.cat([lse for _, lse in results], 2)[0]


def _backward_in_order(
    plan: _Plan, by_query: tuple[Tensor, ...], by_key: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`CpuAten.backward` likewise, of (dout, q, out, log-sum-exp) and (k, v)."""
    q_sizes, k_sizes = _sizes(plan)
    queries, keys = [x.split(q_sizes, 2) for x in by_query], [x.split(k_sizes, 2) for x in by_key]
    parts = []
    for dout, q, out, lse, k, v, piece in zip(*queries, *keys, plan.pieces, strict=True):
        call = piece.calls[0]
        mask = _mask(q, k, call.window)
        parts.append(_backward(dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=mask, scale=scale))
    if len(parts) == 1:
        dq, dk, dv = (_rows_first(x) for x in parts[0])
    else:
        dq, dk, dv = (_joined(x) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _joined(parts_1HnD: tuple[Tensor, ...]) -> Tensor:
    """[n + n + ..., H, D], row after row in memory, as the kernel writes its results."""
    return torch.cat([part.transpose(1, 2) for part in parts_1HnD], 1).squeeze(0)


def _sizes(plan: _Plan) -> tuple[list[int], list[int]]:
    """Rows of each piece: queries and keys."""
    return [piece.q.size for piece in plan.pieces], [piece.calls[0].k.size for piece in plan.pieces]


def _attend(
    q_1HnD: Tensor, k_1GKD: Tensor, v_1GKD: Tensor, calls: tuple[_Call, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """(out [1, H, n, D], log-sum-exp [1, H, n]) of the queries of one piece."""
    results = []
    for call in calls:
        k, v = k_1GKD.narrow(2, *call.k), v_1GKD.narrow(2, *call.k)
        results.append(_forward(q_1HnD, k, v, 0.0, call.causal, attn_mask=_mask(q_1HnD, k, call.window), scale=scale))
    out, lse = results[0]
    for part, part_lse in results[1:]:
        out = out.to(lse.dtype)
        merge_(_rows_first(out), lse[0], _rows_first(part), part_lse[0])
    return out, lse


def _heads_first(x_nHD: Tensor) -> Tensor:
    """The view [1, H, n, D]; the kernel wants the values of one head side by side."""
    x = x_nHD if x_nHD.stride(-1) == 1 else x_nHD.contiguous()
    return x.transpose(0, 1).unsqueeze(0)


def _rows_first(x_1HnD: Tensor) -> Tensor:
    return x_1HnD.squeeze(0).transpose(0, 1)


def _new(like_1HnD: Tensor, dtype: torch.dtype, *, full: bool) -> Tensor:
    """A new tensor of that shape, row after row in memory; zeros unless every row will be written (`full`)."""
    _, heads, num_rows, size = like_1HnD.shape
    make = torch.empty if full else torch.zeros
    return _heads_first(make(num_rows, heads, size, dtype=dtype))


def _mask(q_1HnD: Tensor, k_1GmD: Tensor, window: int | None) -> Tensor | None:
    """0 where a query sees a key, else -inf [n, m]; the last query is at the last key."""
    if window is None:
        return None
    num_q, num_k = q_1HnD.shape[2], k_1GmD.shape[2]
    at_n1 = torch.arange(num_k - num_q, num_k)[:, None]
    key_m = torch.arange(num_k)
    seen = (key_m <= at_n1) & (key_m > at_n1 - window)
    return torch.zeros(num_q, num_k, dtype=q_1HnD.dtype).masked_fill_(~seen, -torch.inf)


@lru_cache(maxsize=64)
def _plan(segments: Segments) -> _Plan:
    pieces = tuple(piece for row in segments.rows for piece in _pieces(row, segments))
    keys = [call.k for piece in pieces for call in piece.calls]
    ascending, keys = keys == sorted(keys), sorted(keys)
    apart = all(a.start + a.size <= b.start for a, b in pairwise(keys))
    once = apart and all(len(piece.calls) == 1 for piece in pieces)
    return _Plan(
        pieces, sum(piece.q.size for piece in pieces), sum(rows.size for rows in keys), once, once and ascending
    )


def _pieces(row: Segment, segments: Segments) -> Iterator[_Piece]:
    """The pieces of one segment: one, or with a window that matters one for every few queries."""
    num_q, num_k = row.q_end - row.q_start, row.k_end - row.k_start
    shift = num_k - num_q  # query i of the segment is at key i + shift
    if not segments.causal:
        yield _Piece(_Rows(row.q_start, num_q), (_Call(_Rows(row.k_start, num_k), False, None),))
    elif segments.window is None or segments.window >= num_k:
        before = (_Call(_Rows(row.k_start, shift), False, None),) if shift else ()
        square = _Call(_Rows(row.k_start + shift, num_q), True, None)
        yield _Piece(_Rows(row.q_start, num_q), (*before, square))
    else:
        step = max(_LEAST_QUERIES, min(segments.window, _MOST_QUERIES))
        for start in range(0, num_q, step):
            end = min(start + step, num_q)
            first = max(0, start + shift - segments.window + 1)
            keys = _Rows(row.k_start + first, end + shift - first)
            yield _Piece(_Rows(row.q_start + start, end - start), (_Call(keys, False, segments.window),))
