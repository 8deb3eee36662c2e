"""The order of an epoch as a keyed permutation that needs no memory: position -> row in constant time."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def permute(positions: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """The rows at `positions` of a pseudo-random order of `range(size)` that `key` chooses.

    A Feistel network over the next power of four, walked until the value falls below `size`, so it is a bijection.

    Args:
        positions: int64, each in `[0, size)`.
        size: number of rows, >= 1.
        key: any text; another key gives another order.

    Example:
        >>> sorted(permute(np.arange(5), 5, "seed 0").tolist())
        [0, 1, 2, 3, 4]
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = [_round_key(key, r) for r in range(_ROUNDS)]
    rows = _encrypt(positions.astype(np.uint64), half_bits, round_keys)
    outside = rows >= size
    while outside.any():
        rows[outside] = _encrypt(rows[outside], half_bits, round_keys)
        outside = rows >= size
    return rows.astype(np.int64)


def _round_key(key: str, round_idx: int) -> np.uint64:
    digest = hashlib.blake2b(f"{key}/{round_idx}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _encrypt(values: NDArray[np.uint64], half_bits: int, round_keys: list[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        mixed = right * np.uint64(0x9E3779B97F4A7C15) + key
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(32)
        left, right = right, left ^ (mixed & mask)
    return (left << shift) | right
