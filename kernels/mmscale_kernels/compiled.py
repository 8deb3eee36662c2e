"""Functions through torch.compile, each compiled once per process and only when it is first used.

For small pointwise functions on GPUs, which Inductor fuses into one kernel; on the CPU nothing here is called by default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` through torch.compile, with sizes that may change between calls without a new compilation."""
    return torch.compile(function, dynamic=True, fullgraph=True)
