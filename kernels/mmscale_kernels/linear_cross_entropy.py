"""Output head and loss in one: the summed cross-entropy of hidden states, whose logits exist for one chunk of rows at a time.

The gradient of a sum is known as soon as its logits are, so the forward pass makes all gradients while a chunk is there and the
backward pass only scales them: a logit is computed once. Rows without a target never get here; the caller takes the others
with `take_rows`.

    chunk of rows:  z = h W' + b      s = logsumexp(z)      loss += s - z[label] + c s^2
                    g = softmax(z) (1 + 2 c s) - onehot(label)      dh = g W      dW += g' h      db += sum g

c is the weight of the z-loss, which keeps the normaliser near 1: Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, section 5) with
c = 1e-4; the same on the logits of a router in Zoph et al. 2022 (ST-MoE, arXiv:2202.08906, equation 5).

Where the vocabulary is divided among ranks, each computes its columns; two small all-reduces per chunk make s and z[label] whole.

Shapes: T tokens, N rows with a target, C rows of a chunk, D width, V vocabulary (this rank's share of it, where it is divided).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

MEMORY_BYTES = 4_000_000_000
"""The default of `memory_bytes`: 4224 rows of a vocabulary of 152,064 in bf16. With width 4096 the sum of the weight's gradient
in memory then costs about 8 % of the chunk's matrix products on an H200 by the bytes, with 1024 rows it would be a third."""

_ALIGNED_ROWS = 128
_BYTES_OF_SCALARS = 128
"""Per row: column, maximum, sum, logarithms and factors."""


class VocabRanks(Protocol):
    """The ranks among which a vocabulary is divided evenly, rank r holding rows r V to r V + V - 1 of the weight."""

    @property
    def rank(self) -> int:
        """This rank's number."""
        ...

    @property
    def size(self) -> int:
        """Their number."""
        ...

    def largest(self, x: Tensor, /) -> Tensor:
        """The elementwise maximum over the ranks, a new tensor."""
        ...

    def total(self, x: Tensor, /) -> Tensor:
        """The sum over the ranks, a new tensor, the same bits on each."""
        ...


def linear_cross_entropy_sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    z_loss: float = 0.0,
    memory_bytes: int = MEMORY_BYTES,
    ranks: VocabRanks | None = None,
) -> Tensor:
    """The sum over all N rows of cross-entropy and z-loss, a scalar; exactly 0 with zero gradients when N is 0.

    Args:
        hidden_ND: [N, D], any float type.
        weight_VD: [V, D], of the type of `hidden_ND` unless autocast is on.
        labels_N: int64 [N], 0 to V - 1 (in the whole vocabulary, where it is divided); every row counts.
        bias_V: [V], added to the logits.
        z_loss: c >= 0, see the head of the file.
        memory_bytes: bound on what is there at any time besides the arguments (and the weight in autocast's type) and the
            gradients, whatever N is. The gradient of the weight is added up in fp32 over several chunks.
        ranks: those that hold the other parts of the vocabulary; the gradient of `hidden_ND` is then this rank's part of
            a sum, and the loss the same on each.

    Returns:
        fp32, float64 where the arguments are. Matrix products are computed in autocast's type or that of the arguments,
        everything else in fp32 at least.

    Raises:
        ValueError: shapes or types that do not fit, or `memory_bytes` that cannot hold one row.
        RuntimeError: a second derivative, a second backward pass through the same graph, or a label outside the vocabulary (on a
            GPU as a failed assertion of the device).

    Distributed: with `ranks` every rank calls it with the same rows; all-reduces of [C] and [2, C] per chunk, none when N is 0
        and none in the backward pass.

    Cost:
        three products of N x D x V (those of gradients nobody wants are left out, all but one under `no_grad`). In bf16 a
        logit takes 6 bytes while its chunk is there, in fp32 4.
    """
    _check(hidden_ND, weight_VD, labels_N, bias_V)
    dtype = _product_dtype(hidden_ND, weight_VD)
    _rows_in(memory_bytes, weight_VD.shape, dtype)  # raises
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_ND, weight_VD, bias_V)]
    args = (hidden_ND, weight_VD, bias_V, labels_N, z_loss, memory_bytes, dtype, *wanted)
    loss: Tensor = (_linear_cross_entropy(*args) if ranks is None else _OverRanks.apply(*args, ranks))[0]
    return loss


def take_rows(x_TD: Tensor, rows_N: Tensor) -> Tensor:
    """[N, D], the rows of `x_TD` at `rows_N`.

    Args:
        rows_N: int64 [N], 0 to T - 1, no row twice: the gradient is copied and not added, which is several times as fast on a
            CPU and needs no atomics on a GPU.
    """
    out: Tensor = _TakeRows.apply(x_TD, rows_N)  # type: ignore[no-untyped-call]
    return out


def reference(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """`linear_cross_entropy_sum` as a formula over all logits at once, in the type of its arguments; autograd by torch."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V)
    normaliser_N = logits_NV.logsumexp(1)
    return (normaliser_N - logits_NV.gather(1, labels_N[:, None])[:, 0] + z_loss * normaliser_N.square()).sum()


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.num_rows = x_TD.shape[0]
        return x_TD.index_select(0, rows_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (rows_N,) = ctx.saved_tensors
        return grad_ND.new_zeros(ctx.num_rows, grad_ND.shape[1]).index_copy_(0, rows_N, grad_ND), None


@dataclass(frozen=True, slots=True)
class _Job:
    """What to compute and in which type: `dtype` of the matrix products, `exact` of everything else."""

    z_loss: float
    memory_bytes: int
    dtype: torch.dtype
    wants_hidden: bool
    wants_weight: bool
    wants_bias: bool

    @property
    def exact(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def wants_any(self) -> bool:
        return self.wants_hidden or self.wants_weight or self.wants_bias


_Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""Loss, and gradients of hidden states, weight and bias: empty [0] where nobody wants them."""


def _solve(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, job: _Job, ranks: VocabRanks | None
) -> _Results:
    num_rows = hidden_ND.shape[0]
    step = _chunk_rows(num_rows, job, weight_VD)
    is_one_chunk = num_rows <= step
    loss, dhidden_ND, dweight_VD, dbias_V = _results(hidden_ND, weight_VD, bias_V, job, is_one_chunk)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        low_VD = weight_VD.to(job.dtype)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            x_CD = hidden_ND[rows].to(job.dtype)
            part, g_CV = _loss_and_gradient(x_CD, low_VD, bias_V, labels_N[rows], job, ranks, dbias_V)
            loss += part
            if job.wants_hidden:
                _product(g_CV, low_VD, dhidden_ND[rows])
            if job.wants_weight:
                _add_product(g_CV, x_CD, dweight_VD)
            del g_CV  # before the next chunk
    return loss, dhidden_ND, dweight_VD.to(weight_VD.dtype), dbias_V if bias_V is None else dbias_V.to(bias_V.dtype)


def _loss_and_gradient(
    x_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_C: Tensor,
    job: _Job,
    ranks: VocabRanks | None,
    dbias_V: Tensor,
) -> tuple[Tensor, Tensor]:
    """(loss of the rows, its gradient [C, V] by the logits, in the type of the products); the bias's is added to `dbias_V`.

    Without a wanted gradient the second is empty.
    """
    e_CV, loss, factor_C = _softmax_parts(x_CD, weight_VD, bias_V, labels_C, job, ranks)
    if not job.wants_any:
        return loss, e_CV.new_empty(0)
    if job.wants_bias:
        dbias_V += e_CV.t() @ factor_C
    if e_CV.is_cuda and job.dtype != job.exact:  # in one pass; on the CPU this would make the product in fp32 first
        return loss, torch.mul(e_CV, factor_C[:, None], out=torch.empty_like(e_CV, dtype=job.dtype))
    return loss, e_CV.mul_(factor_C[:, None]).to(job.dtype)


def _softmax_parts(
    x_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_C: Tensor, job: _Job, ranks: VocabRanks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(e [C, V], the loss of the rows, f [C]) with e f = d loss / d logits, both in the exact type.

    Without a wanted gradient e and f mean nothing.
    """
    z_CV = _logits(x_CD, weight_VD, job.exact)
    if bias_V is not None:
        z_CV += bias_V
    top_C = z_CV.amax(1)
    column_C1, mine_C = labels_C[:, None], None
    if ranks is not None:
        # any other would be nobody's target
        is_known = ((labels_C >= 0) & (labels_C < ranks.size * weight_VD.shape[0])).all()
        torch._assert_async(is_known, "labels_N: labels of the vocabulary are expected, found others")
        top_C = ranks.largest(top_C)
        column_C1 = column_C1 - ranks.rank * weight_VD.shape[0]
        mine_C1 = (column_C1 >= 0) & (column_C1 < weight_VD.shape[0])
        column_C1, mine_C = column_C1.where(mine_C1, 0), mine_C1[:, 0]
    z_CV -= top_C[:, None]
    target_C = z_CV.gather(1, column_C1)[:, 0]
    total_C = z_CV.exp_().sum(1)
    if ranks is not None and mine_C is not None:
        total_C, target_C = ranks.total(torch.stack([total_C, target_C.where(mine_C, 0)]))
    log_C = total_C.log()
    normaliser_C = top_C + log_C
    loss = (log_C - target_C).sum()
    if job.z_loss:
        loss = loss + job.z_loss * normaliser_C.square().sum()
    factor_C = (1 + 2 * job.z_loss * normaliser_C) / total_C
    if job.wants_any:
        # subtracted here, where 1 - softmax still has all its digits
        one_C = factor_C.reciprocal() if mine_C is None else factor_C.reciprocal().where(mine_C, 0)
        z_CV.scatter_add_(1, column_C1, -one_C[:, None])
    return z_CV, loss, factor_C


def _logits(x_CD: Tensor, weight_VD: Tensor, exact: torch.dtype) -> Tensor:
    if x_CD.dtype == exact or not _keeps_fp32_sums(x_CD.device, x_CD.dtype):
        return (x_CD @ weight_VD.t()).to(exact)
    return torch.mm(x_CD, weight_VD.t(), out_dtype=exact)


@functools.cache
def _keeps_fp32_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of this type can be had as it was added up, in fp32: on CUDA. Elsewhere logits are rounded."""
    tiny = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return bool(torch.mm(tiny, tiny.t(), out_dtype=torch.float32).dtype == torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        return False


def _product(g_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    if out_CD.dtype == g_CV.dtype:
        torch.mm(g_CV, weight_VD, out=out_CD)
    else:
        out_CD.copy_(g_CV @ weight_VD)


def _add_product(g_CV: Tensor, x_CD: Tensor, sum_VD: Tensor) -> None:
    """`sum_VD += g_CV' x_CD`; a product in a smaller type is added piece by piece, in twice the memory of `g_CV`."""
    if sum_VD.dtype == g_CV.dtype:
        sum_VD.addmm_(g_CV.t(), x_CD)
        return
    copies = 1 if g_CV.is_cuda else 3  # a CPU widens a piece to fp32 before it adds it
    num_columns = max(1, 2 * g_CV.numel() // max(1, copies * x_CD.shape[1]))
    for g_CP, sum_PD in zip(g_CV.split(num_columns, 1), sum_VD.split(num_columns), strict=True):
        sum_PD += g_CP.t() @ x_CD


def _results(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, job: _Job, is_one_chunk: bool) -> _Results:
    """Zeros to add to; the weight's in the exact type where several chunks add."""
    loss = hidden_ND.new_zeros((), dtype=job.exact)
    dhidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if job.wants_hidden else None
    dtype = weight_VD.dtype if is_one_chunk else job.exact
    dweight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=dtype) if job.wants_weight else None
    dbias_V = weight_VD.new_zeros(weight_VD.shape[:1], dtype=job.exact) if job.wants_bias else None
    nothing = [hidden_ND.new_empty(0), weight_VD.new_empty(0), (weight_VD if bias_V is None else bias_V).new_empty(0)]
    found = [x if some is None else some for x, some in zip(nothing, (dhidden_ND, dweight_VD, dbias_V), strict=True)]
    return loss, found[0], found[1], found[2]


def _chunk_rows(num_rows: int, job: _Job, weight_VD: Tensor) -> int:
    """Rows of a chunk: as few chunks as the memory allows, of nearly equal length."""
    most = _rows_in(job.memory_bytes, weight_VD.shape, job.dtype)
    if num_rows <= most:
        return max(1, num_rows)
    even = -(-num_rows // -(-num_rows // most))
    return min(most, -(-even // _ALIGNED_ROWS) * _ALIGNED_ROWS)


def _rows_in(memory_bytes: int, weight: torch.Size, dtype: torch.dtype) -> int:
    vocab, width = weight
    exact = torch.promote_types(dtype, torch.float32)
    of_logits = vocab * (exact.itemsize + (0 if dtype == exact else dtype.itemsize))
    row = of_logits + 2 * width * dtype.itemsize + _BYTES_OF_SCALARS
    rows = memory_bytes // row
    if rows == 0:
        raise ValueError(
            f"memory_bytes: room for one row of {vocab} logits is expected, {row} bytes, found {memory_bytes}; raise it"
        )
    return rows if rows < _ALIGNED_ROWS else rows // _ALIGNED_ROWS * _ALIGNED_ROWS


def _product_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    kind = hidden_ND.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden_ND.dtype, weight_VD.dtype):
        return torch.get_autocast_dtype(kind)
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"hidden_ND and weight_VD: one type is expected without autocast, found {hidden_ND.dtype} and "
            f"{weight_VD.dtype}; cast one of them"
        )
    return weight_VD.dtype


def _check(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None) -> None:
    is_fit = hidden_ND.dim() == weight_VD.dim() == 2 and hidden_ND.shape[1] == weight_VD.shape[1]
    is_fit = is_fit and labels_N.shape == hidden_ND.shape[:1] and labels_N.dtype == torch.int64
    if not is_fit or (bias_V is not None and bias_V.shape != weight_VD.shape[:1]):
        found = ", ".join(
            f"{x.dtype} {tuple(x.shape)}" for x in (hidden_ND, weight_VD, labels_N, bias_V) if x is not None
        )
        raise ValueError(f"hidden [N, D], weight [V, D], int64 labels [N] and bias [V] are expected, found {found}")


@torch.library.custom_op(
    "mmscale::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float z_loss, int memory_bytes, ScalarType dtype, "
    "bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    z_loss: float,
    memory_bytes: int,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> _Results:
    job = _Job(z_loss, memory_bytes, dtype, wants_hidden, wants_weight, wants_bias)
    return _solve(hidden_ND, weight_VD, bias_V, labels_N, job, None)


@_linear_cross_entropy.register_fake
def _fake(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    z_loss: float,
    memory_bytes: int,
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> _Results:
    job = _Job(z_loss, memory_bytes, dtype, wants_hidden, wants_weight, wants_bias)
    loss, dhidden_ND, dweight_VD, dbias_V = _results(hidden_ND, weight_VD, bias_V, job, is_one_chunk=True)
    return loss, dhidden_ND, dweight_VD, dbias_V if bias_V is None else dbias_V.to(bias_V.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
    _, *grads = output
    ctx.mark_non_differentiable(*grads)
    ctx.set_materialize_grads(False)  # else zeros as large as the weight would be made for the gradients' gradients
    ctx.save_for_backward(*grads)
    ctx.num_inputs = len(inputs)


def _scale(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The saved gradients times that of the loss, in place: a copy of the weight's would be the largest tensor here."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy_sum has a first derivative only, found create_graph=True; compute the loss from logits"
        )
    rest = (None,) * (ctx.num_inputs - 3)
    if grad is None:
        return (None, None, None, *rest)
    needs = ctx.needs_input_grad[:3]
    scaled = (_scaled(g, grad) if need else None for g, need in zip(ctx.saved_tensors, needs, strict=True))
    return (*scaled, *rest)


def _scaled(saved: Tensor, grad: Tensor) -> Tensor:
    # tracers have tensors of their own, and do not take it when a saved one changes
    return saved.mul_(grad) if type(saved) is Tensor else (saved * grad).to(saved.dtype)


_linear_cross_entropy.register_autograd(_scale, setup_context=_save)


class _OverRanks(torch.autograd.Function):
    """The op with ranks, which an op cannot be given."""

    @staticmethod
    def forward(*inputs: Any) -> _Results:
        hidden_ND, weight_VD, bias_V, labels_N, *job, ranks = inputs
        return _solve(hidden_ND, weight_VD, bias_V, labels_N, _Job(*job), ranks)

    setup_context = staticmethod(_save)
    backward = staticmethod(_scale)
