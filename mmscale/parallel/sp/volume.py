"""Bytes that one rank sends in one attention layer, from the plan alone; what `CommMeter` counts is equal to it.

Notation: T tokens of the padded pack, U Ulysses and R outer ranks, H query heads, G key/value heads, C = max(G, U) of them
after replication, D head size, b bytes of an element; gradients of keys and values between outer ranks have max(b, 4) bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mmscale.parallel.sp.plan import Kind


@dataclass(frozen=True, slots=True)
class HeadShape:
    """H, G, D and b of one attention layer, as one tensor-parallel rank has them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int


class Sent(NamedTuple):
    """Bytes that leave one rank in the forward and in the backward pass of one layer."""

    forward: int
    backward: int


def ulysses_bytes(num_tokens: int, ulysses: int, shape: HeadShape) -> Sent:
    """(U - 1) / U * T / P * D * b * (2 H + 2 C), and the same backward.

    Args:
        num_tokens: T / P, of one rank.
        ulysses: U.
    """
    kv_heads = max(shape.num_kv_heads, ulysses)
    row_bytes = shape.head_dim * shape.element_bytes
    there = num_tokens * row_bytes * (shape.num_heads + 2 * kv_heads) // ulysses * (ulysses - 1)
    back = num_tokens * row_bytes * shape.num_heads // ulysses * (ulysses - 1)
    return Sent(there + back, there + back)


def outer_bytes(rows_out: int, rows_back: int, kind: Kind, ulysses: int, shape: HeadShape) -> Sent:
    """Bytes between outer ranks: rows * 2 C / U * D * b forward, the gradients of as many rows backward.

    A ring sends keys and values again in the backward pass.

    Args:
        rows_out: key rows that this rank sends to others; (R - 1) * T / R for `gather` and `ring`.
        rows_back: rows whose gradients it sends: those it got.
    """
    elements = 2 * max(shape.num_kv_heads, ulysses) // ulysses * shape.head_dim
    forward = rows_out * elements * shape.element_bytes
    again = forward if kind == "ring" else 0
    return Sent(forward, again + rows_back * elements * max(shape.element_bytes, 4))
