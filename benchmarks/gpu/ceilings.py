"""What this GPU reaches at best: a large copy, and a large product of matrices. Everything else is held against them."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.measure import COPY, MATMUL, Bench


def run(bench: Bench) -> None:
    """Copies 4 GiB (read and written bytes count), multiplies random 8192 x 8192 matrices in bf16."""
    size = 1 << 20 if bench.dry else 4 << 30
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.case(f"copy of {size >> 20:,} MiB", {"torch": partial(target.copy_, source)})["torch"]
    bench.report.claim(COPY, 2 * size / copy.ms * 1e3 / 1e12)
    side = 128 if bench.dry else 8192
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in "ab")
    matmul = bench.case(f"matmul {side}^3 bf16", {"torch": partial(torch.matmul, a, b)})["torch"]
    bench.report.claim(MATMUL, 2 * side**3 / matmul.ms * 1e3 / 1e12)
