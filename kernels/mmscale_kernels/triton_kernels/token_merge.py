"""Token merging on packed segments: the plan in four launches (`segments`, `match`, `rank`, `place`), then rows by gathers.

Shapes: T input rows, R output rows, S segments, C width. In a segment of n tokens, i and j count its even tokens (the sources,
ceil(n / 2) of them), d its odd ones (the targets, floor(n / 2)). Arrays per source lie at the start of their segment's part of
a [T] array. One program owns a tile of one segment (or one row); it alone writes what belongs to them, so that no order of
programs changes a result. No sort, no atomics, no matrix of all scores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segments_kernel(
    cu_seqlens, merges, cu_out, ptr, is_valid, num_segments, num_in, num_out, max_len, BLOCK: tl.constexpr
):
    """Borders of the output segments, the last element of `ptr`, and whether the host's numbers fit those on the device."""
    tl.store(cu_out, 0)
    tl.store(ptr + num_out, num_in)
    total = tl.full([], 0, tl.int32)
    longest = tl.full([], 0, tl.int32)
    for first in range(0, num_segments, BLOCK):
        s = first + tl.arange(0, BLOCK)
        is_here = s < num_segments
        n = tl.load(cu_seqlens + s + 1, mask=is_here, other=0) - tl.load(cu_seqlens + s, mask=is_here, other=0)
        merged = tl.minimum(tl.maximum(tl.load(merges + s, mask=is_here, other=0), 0), n // 2)
        kept = n - merged
        tl.store(cu_out + s + 1, total + tl.cumsum(kept, 0), mask=is_here)
        total += tl.sum(kept, 0)
        longest = tl.maximum(longest, tl.max(n, 0))
    fits = (total == num_out) & (longest <= max_len) & (tl.load(cu_seqlens + num_segments) == num_in)
    tl.store(is_valid, fits.to(tl.int32))


@triton.jit
def match_kernel(
    metric,
    cu_seqlens,
    merges,
    score,
    target,
    tiles,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Of every source the target with the highest cosine, the lowest d among equals, and that cosine.

    `WIDEN` multiplies in fp32: the interpreter's product of bf16 is wrong (it multiplies the bit patterns).
    """
    segment = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    start = tl.load(cu_seqlens + segment)
    n = tl.load(cu_seqlens + segment + 1) - start
    num_sources, num_targets = (n + 1) // 2, n // 2
    if (first < num_sources) & (tl.load(merges + segment) > 0):
        i = first + tl.arange(0, BM)
        k = tl.arange(0, BK)
        sources = metric + (start + 2 * i).to(tl.int64)[:, None] * C + k[None, :]
        best = tl.full([BM], float("-inf"), tl.float32)
        best_d = tl.zeros([BM], tl.int32)
        for first_d in range(0, num_targets, BN):
            d = first_d + tl.arange(0, BN)
            targets = metric + (start + 2 * d + 1).to(tl.int64)[:, None] * C + k[None, :]
            dots = tl.zeros([BM, BN], tl.float32)
            squares = tl.zeros([BN], tl.float32)
            for c in range(0, C, BK):
                a = tl.load(sources + c, mask=(i < num_sources)[:, None] & (c + k < C)[None, :], other=0.0)
                b = tl.load(targets + c, mask=(d < num_targets)[:, None] & (c + k < C)[None, :], other=0.0)
                wide = b.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
                if WIDEN:
                    dots = tl.dot(a.to(tl.float32), tl.trans(wide), dots, input_precision="ieee")
                else:
                    dots = tl.dot(a, tl.trans(b), dots, input_precision="ieee")
            cosine = dots * (1.0 / tl.sqrt(tl.maximum(squares, 1e-24)))[None, :]
            # a NaN would win nothing and leave no index to take
            cosine = tl.where((cosine == cosine) & (d < num_targets)[None, :], cosine, float("-inf"))
            highest = tl.max(cosine, 1)
            lowest_d = tl.min(tl.where(cosine == highest[:, None], d[None, :], 2147483647), 1)
            is_better = highest > best
            best_d = tl.where(is_better, lowest_d, best_d)
            best = tl.where(is_better, highest, best)
        squares_a = tl.zeros([BM], tl.float32)
        for c in range(0, C, BK):
            a = tl.load(sources + c, mask=(i < num_sources)[:, None] & (c + k < C)[None, :], other=0.0).to(tl.float32)
            squares_a += tl.sum(a * a, 1)
        best = best * (1.0 / tl.sqrt(tl.maximum(squares_a, 1e-24)))
        best = tl.where(best == best, best, float("-inf"))
        tl.store(score + start + i, best, mask=i < num_sources)
        tl.store(target + start + i, best_d, mask=i < num_sources)


@triton.jit
def rank_kernel(cu_seqlens, merges, score, target, tiles, BM: tl.constexpr, BN: tl.constexpr):
    """Keeps `target` of the sources that merge, -1 for the others: those merge that fewer than r sources beat.

    A higher score beats a lower one and the lower index an equal one: the first r of a stable descending sort.
    """
    segment = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    start = tl.load(cu_seqlens + segment)
    n = tl.load(cu_seqlens + segment + 1) - start
    num_sources = (n + 1) // 2
    r = tl.minimum(tl.load(merges + segment), n // 2)
    if first < num_sources:
        i = first + tl.arange(0, BM)
        mine = tl.load(score + start + i, mask=i < num_sources, other=0.0)
        beaten = tl.zeros([BM], tl.int32)
        for first_j in range(0, num_sources, BN):
            j = first_j + tl.arange(0, BN)
            other = tl.load(score + start + j, mask=j < num_sources, other=float("-inf"))
            is_ahead = (other[None, :] > mine[:, None]) | (
                (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
            )
            beaten += tl.sum((is_ahead & (j < num_sources)[None, :]).to(tl.int32), 1)
        d = tl.load(target + start + i, mask=i < num_sources, other=-1)
        tl.store(target + start + i, tl.where(beaten < r, d, -1), mask=i < num_sources)


@triton.jit
def place_kernel(cu_seqlens, cu_out, target, slot, ptr, lst, tiles, BM: tl.constexpr, BN: tl.constexpr):
    """The plan from the links, by counting: `slot`, `ptr` without its last element, `lst`.

    Source i is token 2i of its segment and target d token 2d + 1. Before it the kept ones are all but the merged sources; the
    inputs that those stand for are themselves and the sources that point at the targets among them.
    """
    segment = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    start = tl.load(cu_seqlens + segment)
    n = tl.load(cu_seqlens + segment + 1) - start
    num_sources = (n + 1) // 2
    if first < num_sources:
        i = first + tl.arange(0, BM)
        out = tl.load(cu_out + segment)
        d = tl.load(target + start + i, mask=i < num_sources, other=-1)
        gone_i = tl.zeros([BM], tl.int32)  # merged sources before source i
        below_i = tl.zeros([BM], tl.int32)  # sources that point below target i
        early_i = tl.zeros([BM], tl.int32)  # sources of target i that stand before it
        gone_d = tl.zeros([BM], tl.int32)  # merged sources before target d
        below_d = tl.zeros([BM], tl.int32)  # sources that point below target d
        rank_d = tl.zeros([BM], tl.int32)  # sources of target d before source i
        for first_j in range(0, num_sources, BN):
            j = first_j + tl.arange(0, BN)
            to = tl.load(target + start + j, mask=j < num_sources, other=-1)[None, :]
            is_merged = to >= 0
            j = j[None, :]
            gone_i += tl.sum((is_merged & (j < i[:, None])).to(tl.int32), 1)
            below_i += tl.sum((is_merged & (to < i[:, None])).to(tl.int32), 1)
            early_i += tl.sum(((to == i[:, None]) & (j <= i[:, None])).to(tl.int32), 1)
            gone_d += tl.sum((is_merged & (j <= d[:, None])).to(tl.int32), 1)
            below_d += tl.sum((is_merged & (to < d[:, None])).to(tl.int32), 1)
            rank_d += tl.sum((is_merged & (to == d[:, None]) & (j < i[:, None])).to(tl.int32), 1)
        goes = d >= 0
        is_source, is_target = i < num_sources, i < n // 2
        row_i = 2 * i - gone_i
        begin_i = start + row_i + below_i
        begin_d = start + 2 * d + 1 - gone_d + below_d
        tl.store(slot + start + 2 * i, out + tl.where(goes, 2 * d + 1 - gone_d, row_i), mask=is_source)
        tl.store(ptr + out + row_i, begin_i, mask=is_source & (d < 0))
        at = tl.where(goes, begin_d + rank_d + (i > d).to(tl.int32), begin_i)
        tl.store(lst + at, start + 2 * i, mask=is_source)
        # target i: one token later, behind source i where that one is kept
        row_t = row_i + 1 - goes.to(tl.int32)
        begin_t = start + row_t + below_i
        tl.store(slot + start + 2 * i + 1, out + row_t, mask=is_target)
        tl.store(ptr + out + row_t, begin_t, mask=is_target)
        tl.store(lst + begin_t + early_i, start + 2 * i + 1, mask=is_target)


@triton.jit
def merge_kernel(
    x,
    sizes,
    ptr,
    lst,
    rows,
    totals,
    C: tl.constexpr,
    BC: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    IS_MEAN: tl.constexpr,
):
    """Output row o: the sum over its inputs of size times row, over the sum of their sizes when `IS_MEAN`; order of `lst`."""
    o = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.full([], 0.0, tl.float32)
    summed = tl.zeros([BC], tl.float32)
    for at in range(tl.load(ptr + o), tl.load(ptr + o + 1)):
        t = tl.load(lst + at).to(tl.int64)
        row = tl.load(x + t * C + c, mask=c < C, other=0.0).to(tl.float32)
        if HAS_SIZES:
            size = tl.load(sizes + t)
            summed += size * row
            total += size
        else:
            summed += row
            total += 1.0
    if IS_MEAN:
        summed = summed / total
        if tl.program_id(1) == 0:
            tl.store(totals + o, total)
    tl.store(rows + o * C + c, summed.to(rows.dtype.element_ty), mask=c < C)


@triton.jit
def spread_kernel(
    rows,
    sizes,
    totals,
    slot,
    x,
    C: tl.constexpr,
    BC: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    IS_MEAN: tl.constexpr,
):
    """Input row t: its output row, times the share of its size in that row when `IS_MEAN`; the adjoint of `merge_kernel`."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    o = tl.load(slot + t).to(tl.int64)
    row = tl.load(rows + o * C + c, mask=c < C, other=0.0)
    if IS_MEAN:
        share = 1.0 / tl.load(totals + o)
        if HAS_SIZES:
            share = share * tl.load(sizes + t)
        row = (row.to(tl.float32) * share).to(x.dtype.element_ty)
    tl.store(x + t * C + c, row, mask=c < C)
