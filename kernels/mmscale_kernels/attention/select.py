"""Chooses the attention kernel: by name, or the best one for the device and type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from mmscale.kernels.attention.base import AttentionBackend
from mmscale.kernels.attention.cpu_aten import CpuAten
from mmscale.kernels.attention.efficient import Efficient
from mmscale.kernels.attention.flash_attn import FlashAttn
from mmscale.kernels.attention.math import Math
from mmscale.kernels.attention.torch_flash import TorchFlash

KERNELS: Mapping[str, Callable[[], AttentionBackend]] = {
    "cpu_aten": CpuAten,
    "torch_flash": TorchFlash,
    "flash_attn": FlashAttn,
    "efficient": Efficient,
    "math": Math,
}
"""Every kernel by the name that `parallel.attention` takes."""

_AUTO = ("cpu_aten", "torch_flash", "efficient")
"""What `auto` tries, in this order; for fp64 `math` as well, which would be too slow for anything but a test."""


@lru_cache(maxsize=64)
def backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> AttentionBackend:
    """The kernel called `name`, or the first of those that fit for `auto`; the same object for the same question.

    Args:
        head_dim: D, so that a kernel that cannot take it is passed over; None = not asked.

    Raises:
        ValueError: no such kernel, or it is not usable here; the text says why.
    """
    chosen, refused = _choose(name, device, dtype, head_dim)
    if chosen is None:
        kind = f"{device.type} and {dtype}"
        raise ValueError(f"expected an attention kernel for {kind}, found none: {_reasons(refused)}")
    return chosen


def explain(name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """One line for the log: which kernel `backend` gives and why.

    Raises:
        ValueError: as `backend`.
    """
    chosen = backend(name, device, dtype, head_dim)
    line = f"attention kernel {chosen.name} for {device.type} and {dtype}"
    if name != "auto":
        return f"{line}, as configured"
    refused = _choose(name, device, dtype, head_dim)[1]
    return f"{line}, chosen by auto" + (f"; passed over: {_reasons(refused)}" if refused else "")


def usable(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of all kernels that can be used there; for tests and benchmarks."""
    return [name for name, make in KERNELS.items() if make().refuses(device, dtype) is None]


def _choose(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int | None
) -> tuple[AttentionBackend | None, dict[str, str]]:
    """The kernel, and why others before it were passed over."""
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"expected an attention kernel in auto, {', '.join(KERNELS)}, found {name!r}")
    names = (name,) if name != "auto" else (*_AUTO, "math") if dtype == torch.float64 else _AUTO
    refused: dict[str, str] = {}
    for candidate in names:
        kernel = KERNELS[candidate]()
        reason = kernel.refuses(device, dtype, head_dim)
        if reason is None:
            return kernel, refused
        refused[candidate] = reason
    return None, refused


def _reasons(refused: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refused.items())
