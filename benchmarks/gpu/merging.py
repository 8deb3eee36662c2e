"""Varlen token merging against ToMe's algorithm in torch.

Bolya et al. 2023, "Token Merging: Your ViT but Faster" (arXiv:2210.09461), section 3: tokens alternate between two sets; each
of the first set proposes its most similar one of the second (cosine); the `merges` best proposals are merged as the mean
weighted by how many patches a token stands for. All images have the same size there, and the matrix of scores is stored.

Shapes: T tokens in all, S images, L tokens of one image, R merged in each, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.measure import Bench
from mmscale.kernels.token_merge import merge, plan_merges, unmerge

SIZES = ((64, 729, 1152), (4, 11_664, 1152), (64, 576, 1024), (256, 196, 1152))
TINY = ((2, 20, 16),)
LARGE = 11_664
"""Tokens of an image whose matrix of scores no longer fits in a cache."""
REPEATS = 10


@dataclass(frozen=True)
class Images:
    """Packed images of one size."""

    x_TC: Tensor
    cu_seqlens: Tensor
    merges: Tensor
    num: int
    length: int
    num_merged: int

    def ours(self, x_TC: Tensor) -> Tensor:
        """Plan and merge; the plan looks at the features without a gradient."""
        return self.rows(x_TC, self.plan())

    def plan(self) -> object:
        """Which tokens go where."""
        num_out = self.num * (self.length - self.num_merged)
        return plan_merges(self.x_TC.detach(), self.cu_seqlens, self.merges, self.length, num_out)

    def rows(self, x_TC: Tensor, plan: object) -> Tensor:
        """The merged rows of a plan."""
        return merge(x_TC, plan)[0]

    def tome(self, x_TC: Tensor) -> Tensor:
        """The peer; its rows come in another order."""
        return published(x_TC.view(self.num, self.length, -1), self.num_merged).flatten(0, 1)


def published(x_SLC: Tensor, num_merged: int) -> Tensor:
    """The algorithm of the paper, batched over images of one size; every token stands for one patch."""
    with torch.no_grad():
        unit = x_SLC / x_SLC.norm(dim=-1, keepdim=True)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        gone, kept = order[:, :num_merged], order[:, num_merged:]
        target = partner.gather(1, gone)
    first, second = x_SLC[:, ::2], x_SLC[:, 1::2]
    width = x_SLC.shape[-1]

    def take(index: Tensor) -> Tensor:
        return first.gather(1, index[..., None].expand(-1, -1, width))

    sizes = torch.ones_like(second[..., :1])
    sizes = sizes.scatter_add(1, target[..., None], torch.ones_like(gone[..., None], dtype=sizes.dtype))
    sums = second.scatter_reduce(1, target[..., None].expand(-1, -1, width), take(gone), reduce="sum")
    return torch.cat([take(kept), sums / sizes], dim=1)


def run(bench: Bench) -> None:
    """Checks and times each size; two of them are held against the targets."""
    for number, (num, length, channels) in enumerate(TINY if bench.dry else SIZES):
        images = make_images(bench, num, length, channels)
        check(bench, images)
        size = f"{num}x{length}x{channels}"
        leaf = images.x_TC
        upstream = torch.randn_like(images.ours(leaf))
        forwards = {"tome": partial(images.tome, leaf), "ours": partial(images.ours, leaf)}
        moved = (2 * leaf.numel() + upstream.numel()) * leaf.element_size()
        bench.case(f"plan+merge {size} fwd", forwards, moved)
        runs = {
            name: partial(_gradient, f, leaf, upstream) for name, f in (("tome", images.tome), ("ours", images.ours))
        }
        both = bench.case(f"plan+merge {size} fwd+bwd", runs, 2 * moved)
        plan = images.plan()
        flops = 2 * num * (length // 2) * (length - length // 2) * channels
        planned = bench.case(f"plan {size}", {"ours": images.plan}, leaf.numel() * leaf.element_size(), flops)
        rows = images.rows(leaf, plan)
        bench.case(
            f"merge {size} fwd", {"ours": partial(images.rows, leaf, plan)}, moved - leaf.numel() * leaf.element_size()
        )
        bench.case(f"unmerge {size} fwd", {"ours": lambda rows=rows, plan=plan: unmerge(rows, plan)}, moved)
        if number == 0:
            bench.claim_ratio(f"plan+merge {size} fwd+bwd", both, "tome", ">= 2")
            bench.report.claim("runs that differ", differing_runs(images), f" of {REPEATS}", "== 0")
        if length == LARGE and "ours" in planned:
            scores = images.num * (length // 2) ** 2 * leaf.element_size() / 1e6
            bench.report.claim(f"plan {size} extra/scores", planned["ours"].extra_mb / scores, "", "<= 0.02")
            bench.report.claim("of matmul rate", planned["ours"].floor_share, "", ">= 0.45")
            bench.claim_ratio(f"{size} fwd+bwd", both, "tome")


def make_images(bench: Bench, num: int, length: int, channels: int) -> Images:
    """Random features, half of the tokens to be merged."""
    num_merged = length // 2
    return Images(
        bench.randn(num * length, channels, grad=True),
        torch.arange(0, num * length + 1, length, dtype=torch.int32, device=bench.device),
        torch.full((num,), num_merged, dtype=torch.int32, device=bench.device),
        *(num, length, num_merged),
    )


def check(bench: Bench, images: Images) -> None:
    """The merged rows are the means of what the plan puts together, the gradient its adjoint; nothing waits.

    That the plan is ToMe's is tested on other inputs, where no two scores lie within rounding of each other.
    """
    plan = images.plan()
    slot = plan.slot.long()
    num_out = images.num * (images.length - images.num_merged)
    counts = torch.bincount(slot, minlength=num_out).double()[:, None]
    assert len(counts) == num_out and float(counts.min()) >= 1, "an output row without a token"
    image = torch.arange(len(slot), device=bench.device) // images.length
    assert torch.equal(slot // (images.length - images.num_merged), image), "a token in a row of another image"
    exact = images.x_TC.detach().double().requires_grad_()
    want = (
        torch.zeros(num_out, exact.shape[1], dtype=torch.float64, device=bench.device).index_add(0, slot, exact)
        / counts
    )
    upstream = torch.randn_like(images.x_TC[:num_out])
    (want_grad,) = torch.autograd.grad(want, exact, upstream.double())
    got = images.rows(images.x_TC, plan)
    (got_grad,) = torch.autograd.grad(got, images.x_TC, upstream)
    bench.require_close("merge", (got, got_grad), (want, want_grad))
    bench.require_no_sync(lambda: _gradient(images.ours, images.x_TC, upstream))
    back = unmerge(got, plan)
    assert torch.equal(back, got[slot]), "unmerge gives every token its row"


def differing_runs(images: Images) -> int:
    """How many of ten runs over the same input differ from the first in any bit, forward or backward."""
    upstream = torch.randn_like(images.ours(images.x_TC))

    def once() -> tuple[Tensor, Tensor]:
        rows = images.ours(images.x_TC)
        return rows.detach(), *torch.autograd.grad(rows, images.x_TC, upstream)

    first = once()
    return sum(not all(map(torch.equal, first, once())) for _ in range(REPEATS))


def _gradient(forward: object, leaf: Tensor, upstream: Tensor) -> object:
    return torch.autograd.grad(forward(leaf), leaf, upstream)
