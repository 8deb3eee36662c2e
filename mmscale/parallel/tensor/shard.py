"""Divides the language model of a run among tensor-parallel ranks, in place.

Towers and connectors stay whole on every rank: their inputs and the gradients that reach them are the same there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from mmscale.config.schema import ParallelConfig
from mmscale.model.composite import MultimodalLM
from mmscale.model.llm.head import LossHead
from mmscale.parallel.layout import ShardLayout
from mmscale.parallel.megatron import column_parallel, row_parallel, vocab_parallel_embedding
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.tensor.layers import Reading, change_input, change_output
from mmscale.parallel.tensor.plan import (
    EXPERT_CUTS,
    Heads,
    Style,
    bias_cut,
    even_cut,
    linear_cut,
    tensor_plan,
)
from mmscale.parallel.tensor.regions import (
    TensorComm,
    collect_tokens,
    divide,
    enter,
    gather_tokens,
    leave,
    share_tokens,
    sum_gradient,
)

_COLUMNS = (Style.COLUMN, Style.KEY_VALUE, Style.FUSED_QKV, Style.FUSED_PAIR)
_FINAL_NORMS = ("norm", "final_layernorm")


def shard_tensor(model: MultimodalLM, mesh: Mesh, parallel: ParallelConfig) -> dict[str, ShardLayout]:
    """Divides `model.llm` among the ranks of `mesh.tensor`; names of parameters do not change.

    Args:
        model: whole, on the CPU, with the same weights on every rank of the tensor group. Its weights are not kept.

    Returns:
        Parameter name -> this rank's part, for the parameters that are divided; the others are whole on every rank and get the
        same gradient there. Divided ones carry `tensor_model_parallel=True`, as Megatron marks them, on the ranks that write
        them: norms count them there, and all others on the first tensor rank.

    Raises:
        ConfigError: a model that cannot be divided so.

    Distributed: no communication. Afterwards every forward and backward pass communicates in `mesh.tensor`, alike on its ranks.
    """
    axis = mesh.tensor
    if axis.size == 1:
        return {}
    places = tensor_plan(model.llm, axis.size, parallel.tensor_sequence)
    assert axis.group is not None, "a mesh with tensor ranks has their group"
    comm = TensorComm(axis.group, axis.rank, axis.size, mesh.meter)
    sharder = _Sharder(model.llm, comm, Heads.of(model.llm.config), parallel.tensor_sequence)
    for name, style in places.items():
        sharder.place(name, style)
    sharder.open_regions(places)
    if parallel.tensor_sequence:
        sharder.share_tokens(places)
    present = {id(param): name for name, param in model.named_parameters()}
    return {present[key]: layout for key, layout in sharder.layouts.items()}


class _Sharder:
    """Puts divided modules in place of whole ones; remembers the layouts by the identity of the new parameters."""

    def __init__(self, llm: PreTrainedModel, comm: TensorComm, heads: Heads, has_shares: bool) -> None:
        self._llm = llm
        self._comm = comm
        self._heads = heads
        self._has_shares = has_shares
        self._parts: list[tuple[nn.Parameter, ShardLayout]] = []
        self._part_of = WeakTensorKeyDictionary()  # whole parameter -> part: tied weights are cut once

    @property
    def layouts(self) -> dict[int, ShardLayout]:
        """Identity of a divided parameter -> its layout."""
        return {id(part): layout for part, layout in self._parts}

    def place(self, name: str, style: Style) -> None:
        """Changes the module called `name` as `style` says."""
        module = self._llm.get_submodule(name)
        if style is Style.EMBEDDING:
            self._set(name, self._embedding(module))
        elif style is Style.SUMMED:
            self._set(name, self._summed(module))
        elif style is Style.SINKS:
            sinks = _own(module)["sinks"]
            module.register_parameter("sinks", self._cut(sinks, self._even(sinks, 0)))
        elif style is Style.EXPERTS:
            self._set(name, self._experts(module))
        else:
            self._set(name, self._linear(module, style))

    def open_regions(self, places: Mapping[str, Style]) -> None:
        """Lets the modules that hold divided columns sum the gradients of their input, once for all of them."""
        parents = {name.rpartition(".")[0] for name, style in places.items() if style in _COLUMNS}
        for name in sorted(parents):
            module = self._llm.get_submodule(name)
            change_input(module, self._gather if self._has_shares else self._enter)
            if any(places.get(f"{name}.{leaf}") in (Style.KEY_VALUE, Style.FUSED_QKV) for leaf in _children(module)):
                _set_local_heads(module, self._heads.local(self._comm.size))
        for name, style in places.items():
            if style in (Style.HEAD, Style.EXPERTS):
                change_input(self._llm.get_submodule(name), self._enter)
            if style is Style.EXPERTS:
                change_output(self._llm.get_submodule(name), partial(leave, comm=self._comm))

    def share_tokens(self, places: Mapping[str, Style]) -> None:
        """Divides the tokens between the regions, from the first layer to the final norm."""
        for name, module in list(self._llm.named_modules()):
            if name not in places and _own(module):
                self._set(name, self._summed(module))
        base = self._llm.base_model
        change_input(base.get_submodule("layers.0"), lambda x, _: share_tokens(x, self._comm))
        final = next(child for name, child in base.named_children() if name in _FINAL_NORMS)
        change_output(final, partial(collect_tokens, comm=self._comm))

    def _enter(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        return enter(x, self._comm)

    def _gather(self, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        whole = gather_tokens(x, self._comm)
        positions = kwargs.get("position_embeddings")  # attention is given those of the true tokens
        return whole if positions is None else whole[:, : positions[0].shape[1]]

    def _linear(self, linear: nn.Module, style: Style) -> nn.Module:
        params, comm = _own(linear), self._comm
        weight, bias = params["weight"], params.get("bias")
        layout = linear_cut(style, weight.shape, self._heads, comm.rank, comm.size)
        own_bias = None if bias is None or style is Style.ROW else self._cut(bias, bias_cut(layout))
        if style is Style.HEAD:
            assert isinstance(linear, LossHead), "the model's own head"
            return LossHead(self._cut(weight, layout), own_bias, linear.options, comm)
        if style is Style.ROW:
            return row_parallel(self._cut(weight, layout), bias, comm, self._has_shares)
        copies = self._heads.copies(comm.size) if style is Style.KEY_VALUE else 1
        return column_parallel(self._cut(weight, layout), own_bias, comm, copies)

    def _embedding(self, embedding: nn.Module) -> nn.Module:
        assert isinstance(embedding, nn.Embedding), "Hugging Face models embed with torch's class"
        whole = _own(embedding)["weight"]
        weight = self._cut(whole, self._even(whole, 0))
        scale = dict(embedding.named_buffers()).get("embed_scale")
        return vocab_parallel_embedding(weight, self._comm, embedding.padding_idx, scale)

    def _summed(self, module: nn.Module) -> nn.Module:
        return Reading(module, dict.fromkeys(_own(module), partial(sum_gradient, comm=self._comm)))

    def _experts(self, experts: nn.Module) -> nn.Module:
        cuts = EXPERT_CUTS[self._llm.config.model_type]
        changes = {name: partial(divide, comm=self._comm) for name in _own(experts) if name not in cuts}
        for name, (dim, blocks) in cuts.items():
            whole = _own(experts)[name]
            experts.register_parameter(name, self._cut(whole, self._even(whole, dim, blocks)))
        return Reading(experts, changes)

    def _even(self, param: nn.Parameter, dim: int, blocks: int = 1) -> ShardLayout:
        sizes = (param.shape[dim] // blocks,) * blocks
        return even_cut(param.shape, dim, self._comm.rank, self._comm.size, sizes)

    def _cut(self, whole: nn.Parameter, layout: ShardLayout) -> nn.Parameter:
        if whole not in self._part_of:
            part = nn.Parameter(layout.cut(whole.detach()), requires_grad=whole.requires_grad)
            mark(part, layout)
            self._part_of[whole] = part
            self._parts.append((part, layout))
        return cast(nn.Parameter, self._part_of[whole])

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._llm.get_submodule(parent), leaf, module.train(self._llm.training))


def mark(param: nn.Parameter, layout: ShardLayout) -> None:
    """Marks a divided parameter as Megatron does, where it is to be counted in a norm over all tensor-parallel ranks."""
    marks = {"tensor_model_parallel": layout.is_writer, "partition_dim": layout.dim, "partition_stride": 1}
    for key, value in marks.items():
        setattr(param, key, value)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False))


def _children(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


def _set_local_heads(attention: nn.Module, heads: Heads) -> None:
    """Tells an attention module how many heads it has now, where it counts them instead of reading shapes."""
    counts = {
        "num_heads": heads.num_queries,
        "num_key_value_heads": heads.num_kv,
        "num_key_value_groups": heads.num_queries // heads.num_kv,
    }
    for name, count in counts.items():
        if name in vars(attention):
            setattr(attention, name, count)
    config: Any = copy.copy(attention.config)  # Phi-3 reads the heads of its fused projection there
    config.num_attention_heads, config.num_key_value_heads = heads.num_queries, heads.num_kv
    attention.config = config
