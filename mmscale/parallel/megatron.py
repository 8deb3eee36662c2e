"""megatron-core, and the only module that imports it: the grid of process groups and the tensor-parallel layers.

The layers take their group explicitly and leave communication to `tensor/regions.py`: megatron-core's own would sum the input
gradients of queries, keys and values one by one, return the unreduced tensor where a gradient is not contiguous, and run its
sequence-parallel regions on CUDA only.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.errors import MissingExtraError
from mmscale.parallel.tensor.regions import TensorComm, leave, scatter_tokens, sum_copies, sum_gradient


@dataclass(frozen=True, slots=True)
class Grid:
    """This rank's groups in megatron-core's order tensor - context - data (tensor ranks are neighbours).

    `data_context`: data and context ranks together, the flat group over which gradients are averaged.
    """

    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup


def make_grid(tensor: int, context: int, timeout_s: int) -> Grid:
    """The groups of a grid over all ranks; megatron-core's `parallel_state` describes it afterwards.

    Distributed: every rank calls it after `init_process_group`, with the same degrees.
    """
    state = _import("parallel_state")
    if state.model_parallel_is_initialized():
        state.destroy_model_parallel()
    state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=max(1, -(-timeout_s // 60)),
        create_gloo_process_groups=False,
    )
    return Grid(
        tensor=state.get_tensor_model_parallel_group(),
        context=state.get_context_parallel_group(),
        data=state.get_data_parallel_group(),
        data_context=state.get_data_parallel_group(with_context_parallel=True),
    )


def column_parallel(weight: nn.Parameter, bias: nn.Parameter | None, comm: TensorComm, copies: int = 1) -> nn.Module:
    """A linear layer whose output features are divided; its input must have come through `regions.enter`.

    Args:
        weight: this rank's rows [out / n, in]; `bias`: [out / n].
        copies: neighbouring ranks that hold the same rows and share their gradient.
    """
    layer = _column_class()(
        weight.shape[1], weight.shape[0] * comm.size, config=_config(comm, weight.dtype), init_method=_keep,
        bias=bias is not None, skip_bias_add=True, disable_grad_reduce=True, tp_group=comm.group,
    )  # fmt: skip
    layer.comm, layer.copies = comm, copies
    return _with_parameters(layer, weight=weight, bias=bias)


def row_parallel(weight: nn.Parameter, bias: nn.Parameter | None, comm: TensorComm, has_shares: bool) -> nn.Module:
    """A linear layer whose input features are divided; its output is summed over the ranks.

    Args:
        weight: this rank's columns [out, in / n]; `bias`: [out], whole, added after the sum.
        has_shares: each rank keeps its share of the tokens only.
    """
    layer = _row_class()(
        weight.shape[1] * comm.size, weight.shape[0], config=_config(comm, weight.dtype), init_method=_keep,
        bias=bias is not None, input_is_parallel=True, skip_bias_add=False, tp_group=comm.group,
    )  # fmt: skip
    layer.comm, layer.has_shares = comm, has_shares
    return _with_parameters(layer, weight=weight, bias=bias)


def vocab_parallel_embedding(
    weight: nn.Parameter, comm: TensorComm, padding_idx: int | None = None, scale: Tensor | None = None
) -> nn.Module:
    """An embedding whose vocabulary is divided; every rank gets all rows.

    Args:
        weight: this rank's rows [vocabulary / n, width].
        padding_idx: row of the whole vocabulary that gets no gradient.
        scale: a factor on the output (Gemma).
    """
    layer = _embedding_class()(
        weight.shape[0] * comm.size, weight.shape[1], init_method=_keep, config=_config(comm, weight.dtype),
        tp_group=comm.group,
    )  # fmt: skip
    layer.comm, layer.padding_idx = comm, padding_idx
    layer.register_buffer("embed_scale", scale, persistent=False)
    return _with_parameters(layer, weight=weight)


def _with_parameters(layer: nn.Module, **params: nn.Parameter | None) -> nn.Module:
    for name, param in params.items():
        layer.register_parameter(name, param)
    return layer


def _keep(_: Tensor) -> None:
    """Weights come from the model that is divided."""


def _config(comm: TensorComm, dtype: torch.dtype) -> Any:
    # on the CPU, without initial values, and without the fused kernels of Apex
    return _import("model_parallel_config").ModelParallelConfig(
        tensor_model_parallel_size=comm.size, use_cpu_initialization=True, perform_initialization=False,
        params_dtype=dtype, gradient_accumulation_fusion=False,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _column_class() -> Any:
    class Column(_import("tensor_parallel.layers").ColumnParallelLinear):  # type: ignore[misc]
        """Gives its output as a plain tensor, as a linear layer does."""

        get_extra_state = nn.Module.get_extra_state  # nothing but weights in a state dict

        def forward(self, x: Tensor) -> Tensor:
            out, _ = super().forward(x, weight=sum_copies(self.weight, self.comm, self.copies))
            return out if self.bias is None else out + sum_copies(self.bias, self.comm, self.copies)

    return Column


@lru_cache(maxsize=1)
def _row_class() -> Any:
    class Row(_import("tensor_parallel.layers").RowParallelLinear):  # type: ignore[misc]
        """Sums its output through our regions, and gives it as a plain tensor."""

        get_extra_state = nn.Module.get_extra_state

        def forward(self, x: Tensor) -> Tensor:
            part = F.linear(x, self.weight)
            out = scatter_tokens(part, self.comm) if self.has_shares else leave(part, self.comm)
            if self.bias is None:
                return out
            return out + (sum_gradient(self.bias, self.comm) if self.has_shares else self.bias)

    return Row


@lru_cache(maxsize=1)
def _embedding_class() -> Any:
    class Embedding(_import("tensor_parallel.layers").VocabParallelEmbedding):  # type: ignore[misc]
        """Keeps what a plain embedding may have: a padding row and a scale."""

        def forward(self, ids: Tensor) -> Tensor:
            local = ids - self.vocab_start_index
            is_mine = (local >= 0) & (local < self.weight.shape[0])
            pad = self.padding_idx
            is_pad_mine = pad is not None and self.vocab_start_index <= pad < self.vocab_end_index
            own_pad = pad - self.vocab_start_index if is_pad_mine else None
            rows = F.embedding(local.where(is_mine, 0), self.weight, own_pad)
            out = leave(rows.masked_fill(~is_mine[..., None], 0), self.comm)
            return out if self.embed_scale is None else out * self.embed_scale.to(out.dtype)

    return Embedding


def _import(name: str) -> ModuleType:
    import importlib

    try:
        with warnings.catch_warnings():  # it says at length that Transformer Engine and Apex are missing
            warnings.simplefilter("ignore")
            return importlib.import_module(f"megatron.core.{name}")
    except ImportError as error:
        raise MissingExtraError(
            "megatron-core", "megatron", "parallel.tensor, ulysses or ring above 1", error
        ) from error
