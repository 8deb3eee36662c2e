"""Token merging in packed segments: similar tokens of one image or frame become one row, their mean weighted by size.

Bipartite soft matching (Bolya et al. 2023, arXiv:2210.09461): the even tokens of a segment are sources, the odd ones targets;
every source looks for the target of highest cosine, and the r sources with the highest ones merge into theirs. Here segments
have any lengths and r of their own, kept tokens stay in their order, equal scores go to the lower index, a row of zeros has
cosine 0, and nothing depends on an order of threads.

Shapes: T rows in, R rows out, S segments, C width; A sources and B targets of the longest segment, N = A + B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.kernels.dispatch import OnDeviceOf, is_interpreted, use_triton

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST = 1e-24
"""Floor of a squared norm."""
_SCORES = 1 << 24
"""Scores that the reference holds at a time."""
_WRONG_NUMBERS = (
    "token_merge.plan_merges: num_out = T - sum(min(merges, length // 2)), max_len >= the longest segment and cu_seqlens[-1] = T "
    "are expected, found other numbers; compute them from the same lengths and merges"
)


class MergePlan(NamedTuple):
    """Which input rows make up which output row. All int32, on the device of the metric.

    slot            [T], the output row of every input row
    ptr             [R + 1], the inputs of output row o are `inputs[ptr[o] : ptr[o + 1]]`
    inputs          [T], input rows by output row, in their order
    cu_seqlens      [S + 1], borders of the segments of the output
    """

    slot: Tensor
    ptr: Tensor
    inputs: Tensor
    cu_seqlens: Tensor


def plan_merges(metric_TC: Tensor, cu_seqlens: Tensor, merges: Tensor, max_len: int, num_out: int) -> MergePlan:
    """Which rows merge: of each segment the `min(merges, length // 2)` sources that are most like a target.

    No gradient passes. The same input gives the same plan, to the bit. On a GPU nothing waits for it.

    Args:
        metric_TC: [T, C] of a floating type: what cosines are taken of. bf16 is matched with bf16 products, fp32 with fp32 ones.
        cu_seqlens: int32 [S + 1], borders of the segments, from 0 to T; each segment holds at least one row.
        merges: int32 [S], wished merges per segment; at or below 0 = none.
        max_len: length of the longest segment, or more.
        num_out: R, the rows that are left: T - sum(min(merges, length // 2)).

    Raises:
        ValueError: shapes or types other than these.
        RuntimeError: `max_len` or `num_out` does not fit the tensors (on a GPU as a failed assertion of the device).

    Cost:
        products of T * max_len / 4 pairs of rows; memory 16 bytes per row. The reference holds up to 2^24 scores.
    """
    _check_plan(metric_TC, cu_seqlens, merges)
    metric_TC = metric_TC.detach()
    if use_triton(metric_TC, cu_seqlens, merges) and metric_TC.dtype in _TYPES:
        return MergePlan(*_plan_op(metric_TC, cu_seqlens, merges, max_len, num_out))
    with torch.no_grad(), torch.autocast(metric_TC.device.type, enabled=False):
        return _plan_reference(metric_TC, cu_seqlens, merges, max_len, num_out)


def merge(x_TC: Tensor, plan: MergePlan, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows [R, C] of a plan, each the mean of its inputs weighted by `sizes`, and their sizes [R], the sums.

    Sums are fp32 (fp64 for fp64) in the order of the inputs. The gradient of an input is that of its row times its share
    of the size. The sizes have none.

    Args:
        x_TC: [T, C] of a floating type, which the rows keep.
        plan: from `plan_merges`.
        sizes: [T] floating, above 0: the tokens that each row stands for; None = 1 each.

    Raises:
        ValueError: shapes that do not fit the plan, or sizes that require a gradient.
    """
    _check_rows(x_TC, plan.slot.numel(), "x_TC")
    if sizes is not None and (sizes.requires_grad or sizes.shape != plan.slot.shape):
        raise ValueError(
            f"token_merge.merge: sizes [{plan.slot.numel()}] without gradient are expected, found {tuple(sizes.shape)}, "
            f"requires_grad={sizes.requires_grad}; detach them"
        )
    if use_triton(x_TC, plan.slot, sizes) and x_TC.dtype in _TYPES:
        rows_RC, totals = _merge_op(x_TC, None if sizes is None else sizes.float(), plan.slot, plan.ptr, plan.inputs)
        return rows_RC, totals.detach()
    return _merge_reference(x_TC, plan, sizes)


def unmerge(rows_RC: Tensor, plan: MergePlan) -> Tensor:
    """[T, C]: every input row gets the output row that it went into. The gradient of a row is the sum over its inputs.

    Raises:
        ValueError: rows that do not fit the plan.
    """
    _check_rows(rows_RC, plan.ptr.numel() - 1, "rows_RC")
    if use_triton(rows_RC, plan.slot) and rows_RC.dtype in _TYPES:
        return _unmerge_op(rows_RC, plan.slot, plan.ptr, plan.inputs)
    return rows_RC.index_select(0, plan.slot)


def _check_plan(metric_TC: Tensor, cu_seqlens: Tensor, merges: Tensor) -> None:
    shapes_fit = metric_TC.dim() == 2 and cu_seqlens.dim() == 1 and merges.shape == (cu_seqlens.numel() - 1,)
    types_fit = metric_TC.is_floating_point() and cu_seqlens.dtype == merges.dtype == torch.int32
    if not (shapes_fit and types_fit):
        found = ", ".join(
            f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (metric_TC, cu_seqlens, merges)
        )
        raise ValueError(
            "token_merge.plan_merges: a floating metric [T, C], int32 cu_seqlens [S + 1] and int32 merges [S] are expected, "
            f"found {found}; correct the call"
        )


def _check_rows(rows: Tensor, expected: int, name: str) -> None:
    if rows.dim() != 2 or rows.shape[0] != expected or not rows.is_floating_point():
        raise ValueError(
            f"token_merge: floating {name} of {expected} rows are expected by the plan, found {rows.dtype} {tuple(rows.shape)}; "
            "use the plan with the rows that it was made for"
        )


# ---------------------------------------------------------------------------------------------------------- torch reference


def _plan_reference(metric_TC: Tensor, cu_seqlens: Tensor, merges: Tensor, max_len: int, num_out: int) -> MergePlan:
    num_in, device = metric_TC.shape[0], metric_TC.device
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    r_S = torch.minimum(merges.long().clamp_min(0), lengths // 2)
    cu_out = F.pad((lengths - r_S).cumsum(0), (1, 0))
    fits = (cu_out[-1] == num_out) & (lengths <= max_len).all() & (cu_seqlens[-1] == num_in)
    torch._assert_async(fits, _WRONG_NUMBERS)
    half = (max_len + 1) // 2
    i_A = torch.arange(half, device=device)
    score_SA, target_SA = _match_reference(metric_TC, starts, lengths, max_len)
    order_SA = score_SA.argsort(dim=1, descending=True, stable=True)
    is_merged_SA = torch.zeros_like(order_SA, dtype=torch.bool).scatter(1, order_SA, i_A < r_S[:, None])
    # pairs (source i, target i): the places of those kept, then that of its target for a source that merges
    kept_SA2 = torch.stack([~is_merged_SA, torch.ones_like(is_merged_SA)], 2).long()
    rows_SA2 = (kept_SA2.flatten(1).cumsum(1).view_as(kept_SA2) - kept_SA2) + cu_out[:-1, None, None]
    sources_SA = torch.where(is_merged_SA, rows_SA2[..., 1].gather(1, target_SA), rows_SA2[..., 0])
    slot_SN = torch.stack([sources_SA, rows_SA2[..., 1]], 2).flatten(1)
    if num_in == len(merges) * max_len:  # all of one length
        slot = slot_SN[:, :max_len].reshape(-1)
    else:
        t = torch.arange(num_in, device=device)
        s = torch.searchsorted(cu_seqlens[1:].long(), t, right=True)
        slot = slot_SN[s, t - starts[s]]
    inputs = slot.argsort(stable=True)
    ptr = torch.searchsorted(slot[inputs], torch.arange(num_out + 1, device=device), out_int32=True)
    return MergePlan(slot.int(), ptr, inputs.int(), cu_out.int())


def _match_reference(metric_TC: Tensor, starts: Tensor, lengths: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """Highest cosine [S, A] of every source (-inf beyond the segment) and its target, in chunks of sources."""
    num_segments, sources, targets = len(starts), (max_len + 1) // 2, max_len // 2
    metric_TC = metric_TC if metric_TC.dtype == torch.float64 else metric_TC.float()
    score_SA = metric_TC.new_full((num_segments, sources), float("-inf"))
    target_SA = starts.new_zeros(num_segments, sources)
    if not metric_TC.shape[0] or not targets:
        return score_SA, target_SA
    if metric_TC.shape[0] == num_segments * max_len:
        metric_SNC = metric_TC.view(num_segments, max_len, -1)
    else:
        at_SN = starts[:, None] + torch.arange(max_len, device=starts.device)
        metric_SNC = metric_TC[at_SN.clamp_max(metric_TC.shape[0] - 1)]
    scale_SN = metric_SNC.square().sum(2).clamp_min(_LEAST).rsqrt()
    is_there_SN = torch.arange(max_len, device=starts.device) < lengths[:, None]
    targets_SCB = metric_SNC[:, 1::2].transpose(1, 2)
    step = max(1, _SCORES // (num_segments * targets))
    for first in range(0, sources, step):
        tokens = slice(2 * first, 2 * (first + step), 2)
        cosine_SAB = metric_SNC[:, tokens] @ targets_SCB * scale_SN[:, None, 1::2]
        cosine_SAB = torch.where(cosine_SAB.isnan() | ~is_there_SN[:, None, 1::2], float("-inf"), cosine_SAB)
        best_SA, d_SA = cosine_SAB.max(2)
        best_SA = best_SA * scale_SN[:, tokens]
        score_SA[:, first : first + step] = torch.where(
            best_SA.isnan() | ~is_there_SN[:, tokens], float("-inf"), best_SA
        )
        target_SA[:, first : first + step] = d_SA
    return score_SA, target_SA


def _merge_reference(x_TC: Tensor, plan: MergePlan, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x_TC.dtype, torch.float32)
    num_out, slot = plan.ptr.numel() - 1, plan.slot.long()
    weight_T = torch.ones(len(slot), dtype=wide, device=x_TC.device) if sizes is None else sizes.to(wide)
    totals = weight_T.new_zeros(num_out).scatter_add(0, slot, weight_T)
    share_T = weight_T / totals[slot]
    rows_RC = weight_T.new_zeros(num_out, x_TC.shape[1])
    rows_RC = rows_RC.scatter_add(0, slot[:, None].expand_as(x_TC), x_TC.to(wide) * share_T[:, None])
    return rows_RC.to(x_TC.dtype), totals


# ----------------------------------------------------------------------------------------------------------------- launches


@torch.library.custom_op("mmscale::plan_merges", mutates_args=())
def _plan_op(
    metric: Tensor, cu_seqlens: Tensor, merges: Tensor, max_len: int, num_out: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mmscale.kernels.triton_kernels import token_merge as kernels

    metric, cu_seqlens, merges = metric.contiguous(), cu_seqlens.contiguous(), merges.contiguous()
    (num_in, width), num_segments = metric.shape, merges.numel()
    slot, inputs, target = (cu_seqlens.new_empty(num_in) for _ in range(3))
    ptr, cu_out = cu_seqlens.new_empty(num_out + 1), cu_seqlens.new_empty(num_segments + 1)
    score, is_valid = metric.new_empty(num_in, dtype=torch.float32), cu_seqlens.new_empty(1)
    OnDeviceOf(metric, kernels.segments_kernel)[(1,)](
        cu_seqlens, merges, cu_out, ptr, is_valid, num_segments, num_in, num_out, max_len, BLOCK=256
    )
    torch._assert_async(is_valid, _WRONG_NUMBERS)
    if num_in and max_len > 0:
        options = match_options(width, max_len, metric.dtype)
        tiles = -(-((max_len + 1) // 2) // options["BM"])
        OnDeviceOf(metric, kernels.match_kernel)[(tiles * num_segments,)](
            metric, cu_seqlens, merges, score, target, tiles, C=width, WIDEN=is_interpreted(), **options
        )
        tiles = -(-((max_len + 1) // 2) // 64)
        grid = (tiles * num_segments,)
        OnDeviceOf(metric, kernels.rank_kernel)[grid](cu_seqlens, merges, score, target, tiles, BM=64, BN=32)
        OnDeviceOf(metric, kernels.place_kernel)[grid](
            cu_seqlens, cu_out, target, slot, ptr, inputs, tiles, BM=64, BN=32
        )
    return slot, ptr, inputs, cu_out


@_plan_op.register_fake
def _(
    metric: Tensor, cu_seqlens: Tensor, merges: Tensor, max_len: int, num_out: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_in = metric.shape[0]
    return tuple(cu_seqlens.new_empty(n) for n in (num_in, num_out + 1, num_in, cu_seqlens.shape[0]))  # type: ignore[return-value]


def match_options(width: int, max_len: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and warps of `match_kernel`: large tiles for long segments, whose targets are then read less often."""
    bytes_each = 4 if dtype == torch.float32 else 2
    depth = min(128 // bytes_each, max(16, 1 << (width - 1).bit_length()))
    if bytes_each == 4:  # without tensor cores the operands lie in registers
        return {"BM": 32, "BN": 32, "BK": depth, "num_warps": 4, "num_stages": 3}
    if max_len >= 2048:
        return {"BM": 128, "BN": 128, "BK": depth, "num_warps": 8, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": depth, "num_warps": 4, "num_stages": 3}


def row_options(width: int) -> dict[str, int]:
    """Columns per program of the kernels that move rows, and warps: 8 numbers (16 bytes of bf16) per thread."""
    block = min(512, max(32, 1 << (width - 1).bit_length()))
    return {"BC": block, "num_warps": max(1, block // 256)}


def _sum_rows(x: Tensor, sizes: Tensor | None, ptr: Tensor, inputs: Tensor, *, is_mean: bool) -> tuple[Tensor, Tensor]:
    from mmscale.kernels.triton_kernels import token_merge as kernels

    x, width, num_out = x.contiguous(), x.shape[1], ptr.numel() - 1
    rows, totals = x.new_empty(num_out, width), x.new_empty(num_out, dtype=torch.float32)
    if num_out and width:
        options = row_options(width)
        OnDeviceOf(x, kernels.merge_kernel)[(num_out, -(-width // options["BC"]))](
            x, sizes.contiguous() if sizes is not None else totals, ptr, inputs, rows, totals,
            C=width, HAS_SIZES=sizes is not None, IS_MEAN=is_mean, **options,
        )  # fmt: skip
    return rows, totals


def _spread_rows(rows: Tensor, sizes: Tensor | None, totals: Tensor | None, slot: Tensor) -> Tensor:
    from mmscale.kernels.triton_kernels import token_merge as kernels

    rows, width = rows.contiguous(), rows.shape[1]
    x = rows.new_empty(slot.numel(), width)
    if slot.numel() and width:
        options = row_options(width)
        OnDeviceOf(rows, kernels.spread_kernel)[(slot.numel(), -(-width // options["BC"]))](
            rows, sizes.contiguous() if sizes is not None else rows, totals if totals is not None else rows, slot, x,
            C=width, HAS_SIZES=sizes is not None, IS_MEAN=totals is not None, **options,
        )  # fmt: skip
    return x


@torch.library.custom_op("mmscale::merge_rows", mutates_args=())
def _merge_op(x: Tensor, sizes: Tensor | None, slot: Tensor, ptr: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    return _sum_rows(x, sizes, ptr, inputs, is_mean=True)


@_merge_op.register_fake
def _(x: Tensor, sizes: Tensor | None, slot: Tensor, ptr: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    num_out = ptr.shape[0] - 1
    return x.new_empty(num_out, x.shape[1]), x.new_empty(num_out, dtype=torch.float32)


@torch.library.custom_op("mmscale::merge_rows_backward", mutates_args=())
def _merge_backward_op(grad: Tensor, sizes: Tensor | None, totals: Tensor, slot: Tensor) -> Tensor:
    return _spread_rows(grad, sizes, totals, slot)


@_merge_backward_op.register_fake
def _(grad: Tensor, sizes: Tensor | None, totals: Tensor, slot: Tensor) -> Tensor:
    return grad.new_empty(slot.shape[0], grad.shape[1])


@torch.library.custom_op("mmscale::unmerge_rows", mutates_args=())
def _unmerge_op(rows: Tensor, slot: Tensor, ptr: Tensor, inputs: Tensor) -> Tensor:
    return _spread_rows(rows, None, None, slot)


@_unmerge_op.register_fake
def _(rows: Tensor, slot: Tensor, ptr: Tensor, inputs: Tensor) -> Tensor:
    return rows.new_empty(slot.shape[0], rows.shape[1])


@torch.library.custom_op("mmscale::unmerge_rows_backward", mutates_args=())
def _unmerge_backward_op(grad: Tensor, ptr: Tensor, inputs: Tensor) -> Tensor:
    return _sum_rows(grad, None, ptr, inputs, is_mean=False)[0]


@_unmerge_backward_op.register_fake
def _(grad: Tensor, ptr: Tensor, inputs: Tensor) -> Tensor:
    return grad.new_empty(ptr.shape[0] - 1, grad.shape[1])


def _save_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, sizes, slot, _, _ = inputs
    ctx.save_for_backward(sizes, output[1], slot)


def _merge_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    sizes, totals, slot = ctx.saved_tensors
    return _merge_backward_op(grad, sizes, totals, slot), None, None, None, None


def _save_unmerge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ptr, members = inputs
    ctx.save_for_backward(ptr, members)


def _unmerge_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unmerge_backward_op(grad, *ctx.saved_tensors), None, None, None


def _no_second_gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "token_merge: first derivatives only are expected of the Triton kernels, found a backward pass through a backward pass; "
        "set MMSCALE_KERNELS=torch"
    )


_merge_op.register_autograd(_merge_gradients, setup_context=_save_merge)
_unmerge_op.register_autograd(_unmerge_gradients, setup_context=_save_unmerge)
_merge_backward_op.register_autograd(_no_second_gradients)
_unmerge_backward_op.register_autograd(_no_second_gradients)
