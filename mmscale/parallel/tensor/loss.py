"""The loss over a vocabulary that is divided among the tensor-parallel ranks: no rank holds a whole row of logits.

Shapes: N target rows, V this rank's share of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmscale.parallel.tensor.regions import TensorComm


def vocab_parallel_cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor, comm: TensorComm) -> Tensor:
    """The sum of the N cross-entropies, a scalar; exactly 0 with a (zero) gradient when N is 0.

    Args:
        logits_NV: [N, V], any float type, rows `rank * V` onwards of the vocabulary; computed in fp32 (float64 stays).
        labels_N: int64 [N], in the whole vocabulary, every row counts.

    Distributed: two all-reduces of [N] and [2, N] forward, none backward and none when N is 0; the same bits on every rank.

    Cost: one fp32 copy of the logits, which the backward pass reuses.
    """
    return _CrossEntropySum.apply(logits_NV, labels_N, comm)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor, comm: TensorComm) -> Tensor:
        shifted_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
        num_rows, share = shifted_NV.shape
        local_N = labels_N - comm.rank * share
        is_mine_N = (local_N >= 0) & (local_N < share)
        local_N = local_N.where(is_mine_N, 0)
        ctx.input_dtype = logits_NV.dtype
        if not num_rows:
            ctx.save_for_backward(shifted_NV, local_N, is_mine_N)
            return shifted_NV.sum()
        shifted_NV -= comm.largest(shifted_NV.amax(1))[:, None]
        target_N = shifted_NV.gather(1, local_N[:, None])[:, 0].where(is_mine_N, 0)
        exp_NV = shifted_NV.exp_()
        sum_exp_N, target_N = comm.total(torch.stack([exp_NV.sum(1), target_N]))
        ctx.save_for_backward(exp_NV.div_(sum_exp_N[:, None]), local_N, is_mine_N)
        return (sum_exp_N.log() - target_N).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax_NV, local_N, is_mine_N = ctx.saved_tensors
        grad_NV = softmax_NV.clone()
        grad_NV.scatter_add_(1, local_N[:, None], -is_mine_N.to(grad_NV.dtype)[:, None])
        return grad_NV.mul_(grad).to(ctx.input_dtype), None, None
