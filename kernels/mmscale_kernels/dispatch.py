"""Which implementation of an operation runs: its Triton kernel or its torch reference.

`MMSCALE_KERNELS` decides: `auto` (the default) takes Triton for CUDA tensors on devices of compute capability 8.0 and more,
`triton` always, `torch` never. That `import triton` succeeds says nothing: it is installed beside every CUDA build of torch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VARIABLE = "MMSCALE_KERNELS"
MODES = ("auto", "triton", "torch")
_CAPABILITY = (8, 0)
"""Ampere: the oldest GPUs that the kernels are compiled for in tests."""


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on `tensors` runs its Triton kernel; the absent (None) count for nothing.

    Raises:
        ValueError: `MMSCALE_KERNELS` has another value, or is `triton` where no Triton kernel can run.
    """
    mode = _mode()
    if mode == "torch":
        return False
    can_run = all(_can_run(tensor.device) for tensor in tensors if tensor is not None)
    if mode == "triton" and not can_run:
        found = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
        raise ValueError(
            f"{VARIABLE}=triton: CUDA tensors on a device of compute capability 8.0 or more are expected, and Triton installed, "
            f"found {', '.join(found)}; set {VARIABLE}=auto"
        )
    return can_run and (mode == "triton" or all(tensor.is_cuda for tensor in tensors if tensor is not None))


class OnDeviceOf:
    """A Triton kernel that is launched on the device of a tensor: Triton itself takes the current device."""

    def __init__(self, tensor: Tensor, kernel: Any) -> None:
        self._tensor, self._kernel = tensor, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            with torch.cuda.device_of(self._tensor):
                self._kernel[grid](*args, **options)

        return launch


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU: for tests of results, far too slow for use.

    Triton looks at the same variable when a kernel is defined, so it is set before the process starts.
    """
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@torch.compiler.assume_constant_result
def _mode() -> str:
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}: one of {', '.join(MODES)} is expected, found {mode!r}; set it to auto")
    return mode


@torch.compiler.assume_constant_result
def _can_run(device: torch.device) -> bool:
    return _has_kernels(device)


@functools.cache  # not on the function above: Dynamo looks through a cache and would trace what is in it
def _has_kernels(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type != "cuda":
        return is_interpreted()
    return torch.cuda.get_device_capability(device) >= _CAPABILITY
