"""Output head and loss against Liger's fused loss and against plain torch, for packs where some rows have no target.

Shapes: T tokens, N of them with a target, D width, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.measure import Bench, backward
from benchmarks.gpu.report import Timing
from mmscale.kernels.linear_cross_entropy import linear_cross_entropy_sum, take_rows

SIZES = ((32_768, 4096, 152_064), (32_768, 2048, 128_256), (8192, 4096, 152_064))
TINY = ((64, 16, 97),)
SHARES = (0.3, 1.0)
"""Of the tokens that have a target."""
IGNORE = -100
CHECKED = (1024, 1024, 32_000)
"""Size that is computed in float64."""


def plain(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """All logits, in fp32, for every row."""
    return F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), labels_T, ignore_index=IGNORE, reduction="sum")


def liger() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Liger's fused loss where it can run: on a GPU, with the package installed."""
    if not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def fused(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(hidden_TD, weight_VD, labels_T, ignore_index=IGNORE, reduction="sum")

    return {"liger": fused}


def ours(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, target_N: Tensor) -> Tensor:
    """Rows with a target, which the collator has listed, through the loss."""
    return linear_cross_entropy_sum(take_rows(hidden_TD, target_N), weight_VD, labels_T.index_select(0, target_N))


def run(bench: Bench) -> None:
    """Checks one size in float64, then times each size and share of targets."""
    _check(bench)
    for number, size in enumerate(TINY if bench.dry else SIZES):
        num_tokens, width, vocab = size
        leaves = (bench.randn(num_tokens, width, grad=True), bench.randn(vocab, width, scale=0.02, grad=True))
        for share in SHARES:
            labels_T, target_N = _labels(bench, num_tokens, vocab, share)
            functions = {"eager": partial(plain, labels_T=labels_T)}
            functions |= {name: partial(f, labels_T=labels_T) for name, f in liger().items()}
            functions["ours"] = partial(ours, labels_T=labels_T, target_N=target_N)
            one = torch.ones((), device=bench.device)
            runs = {name: backward(partial(f, *leaves), leaves, one) for name, f in functions.items()}
            bench.require_no_sync(runs["ours"])
            case = f"head+loss {num_tokens}x{width}x{vocab} {share:.0%}"
            times = bench.case(f"{case} fwd+bwd", runs, floor_flops=6.0 * len(target_N) * width * vocab)
            if number == 0:
                _claims(bench, case, times, is_headline=share == SHARES[0])


def _claims(bench: Bench, case: str, times: Mapping[str, Timing], *, is_headline: bool) -> None:
    bench.claim_ratio(case, times, "liger", ">= 2.7" if is_headline else "")
    if is_headline and "ours" in times:
        bench.claim_ratio("30%", times, "eager")
        bench.report.claim("extra", times["ours"].extra_mb / 1e3, " GB", "<= 4")
        bench.report.claim("of matmul rate", times["ours"].floor_share)


def _labels(bench: Bench, num_tokens: int, vocab: int, share: float) -> tuple[Tensor, Tensor]:
    target_N = torch.randperm(num_tokens)[: round(share * num_tokens)].sort().values
    labels_T = torch.full((num_tokens,), IGNORE)
    labels_T[target_N] = torch.randint(0, vocab, (len(target_N),))
    return labels_T.to(bench.device), target_N.to(bench.device)


def _check(bench: Bench) -> None:
    num_tokens, width, vocab = TINY[0] if bench.dry else CHECKED
    hidden_TD, weight_VD = bench.randn(num_tokens, width, grad=True), bench.randn(vocab, width, scale=0.02, grad=True)
    labels_T, target_N = _labels(bench, num_tokens, vocab, 0.3)
    doubles = [x.detach().double().requires_grad_() for x in (hidden_TD, weight_VD)]
    want = F.cross_entropy(F.linear(*doubles), labels_T, ignore_index=IGNORE, reduction="sum")
    want_grads = torch.autograd.grad(want, doubles)
    got = ours(hidden_TD, weight_VD, labels_T, target_N)
    got_grads = torch.autograd.grad(got, (hidden_TD, weight_VD))
    bench.require_close("linear_cross_entropy_sum", (got, *got_grads), (want, *want_grads))
