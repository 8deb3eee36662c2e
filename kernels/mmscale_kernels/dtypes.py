"""Types of floating-point numbers in operations."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums and exponentials are held in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the type `dtype`. `Tensor.to` passes through the dispatcher even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)
