"""Rows of a pack from text and media, and back: one program per row and block of columns, nothing but copies.

Every argument that holds numbers is a contiguous matrix of `WIDTH` columns. Row numbers are widened to 64 bits before they are
multiplied, so a pack may hold more than 2^31 numbers.
"""

import triton
import triton.language as tl


@triton.jit
def place_rows(text, ids, media, source, out, num_tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = media[source[t] - T] where source[t] >= T = num_tokens, else text[ids[t]], or text[t] when `ids` is None."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.load(source + t).to(tl.int64) - num_tokens
    kind = out.dtype.element_ty
    if row >= 0:
        value = tl.load(media + row * WIDTH + column, mask=inside).to(kind)
    else:
        own = t if ids is None else tl.load(ids + t).to(tl.int64)
        value = tl.load(text + own * WIDTH + column, mask=inside).to(kind)
    tl.store(out + t * WIDTH + column, value, mask=inside)


@triton.jit
def gather_rows(grad, positions, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[m] = grad[positions[m]], 0 where positions[m] < 0."""
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    position = tl.load(positions + m).to(tl.int64)
    kind = out.dtype.element_ty
    value = tl.zeros([BLOCK], dtype=kind)
    if position >= 0:
        value = tl.load(grad + position * WIDTH + column, mask=inside).to(kind)
    tl.store(out + m * WIDTH + column, value, mask=inside)


@triton.jit
def keep_text_rows(grad, source, out, num_tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = grad[t] where source[t] < T = num_tokens, 0 under media."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.load(source + t).to(tl.int64) - num_tokens
    value = tl.zeros([BLOCK], dtype=out.dtype.element_ty)
    if row < 0:
        value = tl.load(grad + t * WIDTH + column, mask=inside)
    tl.store(out + t * WIDTH + column, value, mask=inside)
