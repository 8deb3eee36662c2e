"""The order of an epoch as a keyed permutation that needs no memory: position -> row in constant time."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_LEAST_BLOCKS = 1024
"""Blocks that an order has at least, as long as a block is larger than one row."""


def permute(positions: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """The rows at `positions` of a pseudo-random order of `range(size)` that `key` chooses.

    A Feistel network over the next power of two, walked until the value falls below `size`, so it is a bijection.

    Args:
        positions: int64, each in `[0, size)`.
        size: number of rows, >= 1.
        key: any text; another key gives another order.

    Example:
        >>> sorted(permute(np.arange(5), 5, "seed 0").tolist())
        [0, 1, 2, 3, 4]
    """
    bits = max(2, (size - 1).bit_length())
    round_keys = [_round_key(key, r) for r in range(_ROUNDS)]
    rows = _encrypt(positions.astype(np.uint64), bits, round_keys)
    outside = np.flatnonzero(rows >= size)
    while len(outside):
        rows[outside] = _encrypt(rows[outside], bits, round_keys)
        outside = outside[rows[outside] >= size]
    return rows.astype(np.int64)


def shuffle_blocks(positions: NDArray[np.int64], size: int, block: int, key: str) -> NDArray[np.int64]:
    """The rows at `positions` of an order of `range(size)` in which blocks of neighbours stay together.

    Whole blocks are permuted, and their borders fall elsewhere for every key, so that other rows are neighbours; the rows
    that are left over come last.

    Args:
        positions: int64, each in `[0, size)`.
        size: number of rows, >= 1.
        block: rows that stay together; small sets use shorter blocks, of a 1024th of their rows.
        key: any text; another key gives another order.

    Example:
        >>> sorted(shuffle_blocks(np.arange(5000), 5000, 4, "seed 0").tolist()) == list(range(5000))
        True
    """
    if size == 1:  # which is asked for once per epoch
        return np.zeros_like(positions)
    block = max(1, min(block, size // _LEAST_BLOCKS))
    num_blocks = size // block
    offset = int(_round_key(f"{key}/offset", 0)) % size if block > 1 else 0
    number, within = np.divmod(positions, block)
    runs = np.flatnonzero(np.diff(number, prepend=-1))  # neighbours are mostly asked for together: once per block
    blocks = number[runs]
    whole = blocks < num_blocks
    blocks[whole] = permute(blocks[whole], num_blocks, key)
    number = np.repeat(blocks, np.diff(runs, append=len(number)))
    return (number * block + within + offset) % size


def shuffled(size: int, key: str) -> NDArray[np.int64]:
    """All of `range(size)` in a pseudo-random order that `key` chooses; faster than `permute` when all are wanted.

    Example:
        >>> sorted(shuffled(5, "seed 0").tolist())
        [0, 1, 2, 3, 4]
    """
    return np.argsort(_mix(np.arange(size, dtype=np.uint64), _round_key(key, 0)), kind="stable")


def _round_key(key: str, round_idx: int) -> np.uint64:
    digest = hashlib.blake2b(f"{key}/{round_idx}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A hash of each value."""
    mixed = values * np.uint64(0x9E3779B97F4A7C15) + key
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _encrypt(values: NDArray[np.uint64], bits: int, round_keys: list[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of numbers of `bits` bits; the halves differ by one bit when that is odd, and swap in every round."""
    low, high = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    for key in round_keys:
        left, right = right, left ^ (_mix(right, key) & np.uint64((1 << high) - 1))
        low, high = high, low
    return (left << np.uint64(low)) | right
