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
    """`function` through torch.compile, with sizes that may change between calls without a new compilation.

    Other ranks, types, sizes of 1 and grad modes are compiled anew, up to Dynamo's limit of 8; what goes beyond runs as it is.
    """
    return torch.compile(function, dynamic=True)  # with fullgraph=True the ninth would raise FailOnRecompileLimitHit
