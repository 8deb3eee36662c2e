"""The loss of a pack: summed over its targets in fp32, never averaged (whoever knows the global count divides).

Shapes: N target rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cross_entropy_sum(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """The sum of the N cross-entropies as an fp32 scalar; exactly 0 with a (zero) gradient when N is 0.

    Args:
        logits_NV: [N, V], any float type; computed in fp32.
        labels_N: int64 [N], 0 to V - 1, every row counts.

    Cost:
        one fp32 copy of the logits.
    """
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
