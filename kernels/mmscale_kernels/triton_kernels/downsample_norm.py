"""Space-to-depth with LayerNorm: forward, backward, and the gradients of weight and bias by themselves.

A row is what is normalised at once: a cell of S x S patches (D = S * S * C numbers), or with PER_TOKEN one patch of a cell
(D = C; the S * S rows of a cell follow each other). Patches beyond the grid are zeros. As whole cells they are part of the
statistics; as rows of their own they give zeros. Either way row r is `y[r * D : r * D + D]`.

Sizes: h x w patches of C channels in an image, out_h x out_w cells. Patch p of image i is at `(i * x_rows + p) * X_STRIDE`:
the row stride is a constant, since as a runtime number that 16 does not divide it costs the wide loads.
Sums are fp32 and their order is fixed.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(row, lane, h, w, out_h, out_w, C: tl.constexpr, S: tl.constexpr, PER_TOKEN: tl.constexpr):
    """(image, patch in the image, whether it is inside the grid) of the numbers `lane` of `row`; both broadcast."""
    if PER_TOKEN:
        cell = row // (S * S)
        place = row % (S * S) + lane // C
    else:
        cell = row
        place = lane // C
    image = cell // (out_h * out_w)
    in_image = (cell % (out_h * out_w)).to(tl.int32)
    place = place.to(tl.int32)
    line = in_image // out_w * S + place // S
    column = in_image % out_w * S + place % S
    return image, line * w + column, (line < h) & (column < w)


@triton.jit
def forward(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, h, w, out_h, out_w, x_rows, eps,
    C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, X_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: reads it once, keeps it in registers, writes it with its mean and 1 / standard deviation."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    in_row = lane < D
    image, patch, inside = _locate(row, lane, h, w, out_h, out_w, C, S, PER_TOKEN)
    at = x_ptr + image * x_rows * X_STRIDE + (patch * X_STRIDE + lane % C)
    x = tl.load(at, mask=in_row & inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / D
    centred = tl.where(in_row, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + lane, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + lane, mask=in_row, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    if PER_TOKEN:
        y = tl.where(inside, y, 0.0)
    tl.store(y_ptr + row * D + lane, y.to(y_ptr.dtype.element_ty), mask=in_row)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_row(
    row, lane, weight, dy_ptr, x_ptr, mean_ptr, rstd_ptr, dx_ptr, h, w, out_h, out_w, x_rows,
    C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, X_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Writes dx of one row; gives what the sums are made of, (dy, normalised x), zeros beyond the row."""
    in_row = lane < D
    image, patch, inside = _locate(row, lane, h, w, out_h, out_w, C, S, PER_TOKEN)
    used = in_row & inside
    channel = lane % C
    x = tl.load(x_ptr + image * x_rows * X_STRIDE + (patch * X_STRIDE + channel), mask=used, other=0.0).to(tl.float32)
    # a patch beyond the grid that is a row of its own gave a constant
    dy = tl.load(dy_ptr + row * D + lane, mask=used if PER_TOKEN else in_row, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normal = tl.where(in_row, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    g = dy * weight
    dx = (g - tl.sum(g, 0) / D - normal * (tl.sum(g * normal, 0) / D)) * rstd
    to = dx_ptr + image * (h * w) * C + (patch * C + channel)
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=used)
    return dy, normal


@triton.jit
def backward(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, h, w, out_h, out_w, x_rows,
    C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, X_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx alone, [images, h * w, C], each number written once. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + lane, mask=lane < D, other=0.0).to(tl.float32)
    _backward_row(
        row, lane, weight, dy_ptr, x_ptr, mean_ptr, rstd_ptr, dx_ptr, h, w, out_h, out_w, x_rows, C, S, D, X_STRIDE, PER_TOKEN
    )  # fmt: skip


@triton.jit
def backward_with_sums(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, h, w, out_h, out_w, x_rows,
    C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, X_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, and the gradients of weight and bias as sums over the rows of each program.

    Program p of n takes the rows p, p + n, ...: neighbours at any time. It writes row p of dweight and dbias, [n, D] fp32 each.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    in_row = lane < D
    weight = tl.load(weight_ptr + lane, mask=in_row, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + index
        dy, normal = _backward_row(
            row, lane, weight, dy_ptr, x_ptr, mean_ptr, rstd_ptr, dx_ptr, h, w, out_h, out_w, x_rows, C, S, D, X_STRIDE, PER_TOKEN
        )  # fmt: skip
        dweight += dy * normal
        dbias += dy
    partial = program.to(tl.int64) * D + lane
    tl.store(dweight_ptr + partial, dweight, mask=in_row)
    tl.store(dbias_ptr + partial, dbias, mask=in_row)


@triton.jit
def parameter_gradients(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, rows, h, w, out_h, out_w, x_rows,
    C: tl.constexpr, S: tl.constexpr, D: tl.constexpr, X_STRIDE: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over rows for COLUMNS of the numbers of a row: for rows too wide for `backward_with_sums`, and for a frozen tower.

    Program (p, c) of n x ceil(D / COLUMNS) takes the groups p, p + n, ... of ROWS rows and writes its columns of row p of dweight
    and dbias, [n, D] fp32 each.
    """
    program = tl.program_id(0)
    lane = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_row = lane < D
    dweight = tl.zeros([COLUMNS], tl.float32)
    dbias = tl.zeros([COLUMNS], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        exists = row < rows
        image, patch, inside = _locate(row[:, None], lane[None, :], h, w, out_h, out_w, C, S, PER_TOKEN)
        valid = exists[:, None] & in_row[None, :]
        at = x_ptr + image * x_rows * X_STRIDE + (patch * X_STRIDE + (lane % C)[None, :])
        x = tl.load(at, mask=valid & inside, other=0.0).to(tl.float32)
        wanted = valid & inside if PER_TOKEN else valid
        dy = tl.load(dy_ptr + row[:, None] * D + lane[None, :], mask=wanted, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
        dweight += tl.sum(dy * (x - mean[:, None]) * rstd[:, None], 0)
        dbias += tl.sum(dy, 0)
    partial = program.to(tl.int64) * D + lane
    tl.store(dweight_ptr + partial, dweight, mask=in_row)
    tl.store(dbias_ptr + partial, dbias, mask=in_row)
