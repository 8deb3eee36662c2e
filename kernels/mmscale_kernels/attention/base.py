"""The contract of attention kernels: outputs with their log-sum-exp, and a backward pass that takes the final ones.

With it, partial results over blocks of keys can be merged exactly, whoever computed them (FlashAttention-2, Dao 2023,
arXiv:2307.08691, section 3.1).

Shapes: Q query rows, K key rows, H query heads, G key/value heads (H a multiple of G), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Query rows `q_start:q_end` see key rows `k_start:k_end`; all host integers, both ranges non-empty."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Which queries see which keys.

    rows    query ranges are ascending and disjoint; rows in no range get output 0 and log-sum-exp -inf. Key ranges may
            overlap
    causal  the last query of a segment sees all its keys, the one before it one fewer, and so on (bottom-right alignment);
            a causal segment has at least as many keys as queries
    window  W: of these keys only the nearest W, the query's own row included; None = all. Needs `causal`

    Kernels may keep what they have derived from it, by content: the hash is computed once, not in every layer.
    """

    rows: tuple[Segment, ...]
    causal: bool
    window: int | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.rows, self.causal, self.window)))

    def __hash__(self) -> int:
        return self._hash


class AttentionBackend(Protocol):
    """One attention kernel."""

    name: str

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
        """Why it cannot compute on such tensors, as half a sentence; None = it can.

        Args:
            head_dim: D; None = not known yet, nothing is said about it.
        """
        ...

    def forward(
        self, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out [Q, H, D] in the type of q, log-sum-exp [H, Q] in `accumulate_dtype`)."""
        ...

    def backward(
        self, dout_QHD: Tensor, q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
        segments: Segments, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dq, dk, dv) of these segments, given the FINAL out and log-sum-exp of every query over all its keys.

        Parts over disjoint keys then add up exactly. The type is that of the inputs, or `accumulate_dtype` where a kernel has
        added parts up itself.
        """
        ...
