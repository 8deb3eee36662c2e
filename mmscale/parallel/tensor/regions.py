"""The borders of tensor-parallel regions: where ranks that hold parts of the same weights add up what they computed.

Outside a region every rank holds the same hidden states (`enter`, `leave`), or its share of the tokens (`gather_tokens`,
`scatter_tokens`, Megatron's sequence-parallel regions). Inside, it works with its part of the weights on all tokens.

Shapes: L tokens, S tokens of a rank's share (L / n, rounded up), W width, n tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mmscale.parallel.meter import CommMeter

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class TensorComm:
    """The collectives of the tensor-parallel ranks; all of them call each.

    `meter` counts bytes under `tensor` as a ring sends them: an all-reduce of B bytes 2 (n-1)/n B, an all-gather or a
    reduce-scatter of B bytes in the whole (n-1)/n B, the exchange between copies what it is.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    meter: CommMeter

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, a new tensor, the same bits on each."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks, a new tensor."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def gathered(self, x_SW: Tensor) -> Tensor:
        """[n * S, W], the rows of all ranks in their order."""
        x_SW = x_SW.contiguous()
        whole = x_SW.new_empty(self.size * x_SW.shape[0], *x_SW.shape[1:])
        self._count((self.size - 1) * x_SW.nbytes)
        with self.meter.waiting(x_SW.device):
            dist.all_gather(list(whole.chunk(self.size)), x_SW, group=self.group)
        return whole

    def scattered(self, x_LW: Tensor) -> Tensor:
        """[S, W], this rank's rows of the sum over the ranks; L = n * S. Added up in fp32 at least."""
        received = torch.empty_like(x_LW, memory_format=torch.contiguous_format)
        self._count((self.size - 1) * x_LW.nbytes // self.size)
        with self.meter.waiting(x_LW.device):
            dist.all_to_all_single(received, x_LW.contiguous(), group=self.group)
        parts = received.view(self.size, -1, *x_LW.shape[1:])
        return parts.sum(0, dtype=torch.promote_types(x_LW.dtype, torch.float32)).to(x_LW.dtype)

    def own_share(self, x_LW: Tensor) -> Tensor:
        """[S, W], this rank's rows of what every rank holds; L = n * S. No communication."""
        return x_LW.chunk(self.size)[self.rank].contiguous()

    def copies_total(self, x: Tensor, copies: int) -> Tensor:
        """The sum over the `copies` neighbouring ranks that hold the same part, the same bits on each of them."""
        first = self.rank - self.rank % copies
        splits = [x.numel() if first <= rank < first + copies else 0 for rank in range(self.size)]
        sent = x.reshape(-1).repeat(copies)
        received = torch.empty_like(sent)
        self._count((copies - 1) * x.nbytes)
        with self.meter.waiting(x.device):
            dist.all_to_all_single(received, sent, splits, splits, group=self.group)
        total = received.view(copies, -1).sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
        return total.view(x.shape).to(x.dtype)

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        # a copy: autograd may hand the same gradient to several consumers
        total = x.clone(memory_format=torch.contiguous_format)
        if not x.numel():  # on every rank alike: no targets
            return total
        self._count(2 * (self.size - 1) * x.nbytes // self.size)
        with self.meter.waiting(x.device):
            dist.all_reduce(total, op, group=self.group)
        return total

    def _count(self, num_bytes: int) -> None:
        self.meter.add("tensor", num_bytes)


def enter(x: Tensor, comm: TensorComm) -> Tensor:
    """`x` as it is; its gradient is summed over the ranks, each of which used it with its part of the weights."""
    return _border(x, _same, comm.total)


def leave(x: Tensor, comm: TensorComm) -> Tensor:
    """The sum of the ranks' parts `x`; its gradient is the same on each rank and passes as it is."""
    return _border(x, comm.total, _same)


def gather_tokens(x_1SW: Tensor, comm: TensorComm) -> Tensor:
    """[1, n * S, W] from the ranks' shares; the gradients of all ranks are summed and each gets its share's. An entry."""
    return _border(x_1SW[0], comm.gathered, comm.scattered)[None]


def scatter_tokens(x_LW: Tensor, comm: TensorComm) -> Tensor:
    """[S, W], this rank's share of the sum of the ranks' parts, zeros behind the last token. An exit.

    Or [1, S, W] from [1, L, W].
    """
    share_SW = _border(_padded(x_LW.flatten(0, -2), comm), comm.scattered, comm.gathered)
    return share_SW.view(*x_LW.shape[:-2], *share_SW.shape)


def share_tokens(x_1LW: Tensor, comm: TensorComm) -> Tensor:
    """[1, S, W], this rank's share of what every rank holds, zeros behind the last token; gradients are gathered."""
    return _border(_padded(x_1LW[0], comm), comm.own_share, comm.gathered)[None]


def collect_tokens(x_1SW: Tensor, comm: TensorComm) -> Tensor:
    """[1, n * S, W] on every rank from its shares; the gradient, the same on each rank, is cut to the share."""
    return _border(x_1SW[0], comm.gathered, comm.own_share)[None]


def sum_gradient(weight: Tensor, comm: TensorComm) -> Tensor:
    """`weight` as it is; its gradient is summed over the ranks, each of which saw its own heads or tokens only."""

    def total(grad: Tensor) -> Tensor:
        return comm.total(grad.to(torch.promote_types(grad.dtype, torch.float32))).to(grad.dtype)

    return _border(weight, _same, total)


def sum_copies(weight: Tensor, comm: TensorComm, copies: int) -> Tensor:
    """`weight` as it is; its gradient is summed over the `copies` neighbouring ranks that hold the same weight."""
    return weight if copies == 1 else _border(weight, _same, lambda grad: comm.copies_total(grad, copies))


def divide(weight: Tensor, comm: TensorComm) -> Tensor:
    """`weight` / n, for one that every rank adds before the ranks are summed; the gradient passes undivided."""
    return _border(weight, lambda value: value / comm.size, _same)


def _padded(x_LW: Tensor, comm: TensorComm) -> Tensor:
    missing = -len(x_LW) % comm.size
    return F.pad(x_LW, (0, 0, 0, missing)) if missing else x_LW


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _border(x: Tensor, there: Change, back: Change) -> Tensor:
    """`there(x)`, whose gradient on its way back goes through `back`."""
    out: Tensor = _Border.apply(x, there, back)  # type: ignore[no-untyped-call]
    return out


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Change, back: Change) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0]), None, None
