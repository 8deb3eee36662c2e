"""What tensor parallelism does with each module of a language model, and which rows of its weights a rank holds.

The places come from the model's own tensor-parallel plan, which Hugging Face publishes per family; where a plan is missing, or
means to gather what need not be gathered (fused projections), ours stands beside it.

Terms: H query heads, G key/value heads, D head size, n tensor-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mmscale.errors import ConfigError
from mmscale.parallel.layout import Piece, ShardLayout


class Style(Enum):
    """What happens to a module."""

    COLUMN = "its output features are divided"
    KEY_VALUE = "its heads are divided, and copied when there are fewer heads than ranks"
    FUSED_QKV = "like COLUMN, for queries, keys and values in one weight"
    FUSED_PAIR = "like COLUMN, for two projections of equal size in one weight"
    ROW = "its input features are divided, its output is summed"
    SUMMED = "whole; its gradient is summed, since each rank uses it on its own heads"
    SINKS = "its parameter `sinks` [H] is divided"
    EXPERTS = "the hidden features of its experts are divided, its output is summed"
    EMBEDDING = "the vocabulary is divided"
    HEAD = "the vocabulary is divided, and the logits stay so"


_HF_STYLES = {
    "colwise": Style.COLUMN,
    "rowwise": Style.ROW,
    "replicated_with_grad_allreduce": Style.SUMMED,
    "moe_tp_experts": Style.EXPERTS,
}
_SELF_ATTN, _MLP = "model.layers.*.self_attn", "model.layers.*.mlp"
_ATTENTION = {
    f"{_SELF_ATTN}.q_proj": Style.COLUMN,
    f"{_SELF_ATTN}.k_proj": Style.COLUMN,
    f"{_SELF_ATTN}.v_proj": Style.COLUMN,
    f"{_SELF_ATTN}.o_proj": Style.ROW,
}
_OWN_PLANS: dict[str, dict[str, Style]] = {
    "phi": {f"{_SELF_ATTN}.q_layernorm": Style.SUMMED, f"{_SELF_ATTN}.k_layernorm": Style.SUMMED},
    "phi3": {
        f"{_SELF_ATTN}.qkv_proj": Style.FUSED_QKV,
        f"{_SELF_ATTN}.o_proj": Style.ROW,
        f"{_MLP}.gate_up_proj": Style.FUSED_PAIR,
        f"{_MLP}.down_proj": Style.ROW,
    },
    "stablelm": {
        **_ATTENTION,
        f"{_MLP}.gate_proj": Style.COLUMN,
        f"{_MLP}.up_proj": Style.COLUMN,
        f"{_MLP}.down_proj": Style.ROW,
    },
    "gpt_oss": {**_ATTENTION, _SELF_ATTN: Style.SINKS, f"{_MLP}.experts": Style.EXPERTS},
}
FAMILIES = ("gemma", "gpt_oss", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "stablelm")
"""`model_type` of the language models that can be divided."""

EXPERT_CUTS: dict[str, dict[str, tuple[int, int]]] = {
    "mixtral": {"gate_up_proj": (1, 2), "down_proj": (2, 1)},
    "gpt_oss": {"gate_up_proj": (2, 1), "gate_up_proj_bias": (1, 1), "down_proj": (1, 1)},
}
"""Family -> parameter of its experts -> (dimension that is cut, blocks that are each cut evenly). GPT-OSS keeps gate and up side
by side in pairs. Parameters that are not named are added once by every rank."""

_REPLICATED = re.compile(r"^model\.(layers\.\d+\.\w*norm|norm|final_layernorm|layers\.\d+\.mlp\.(gate|router))$")
"""Modules outside the regions, which every rank computes alike: norms of hidden states, and routers."""

_DROPOUTS = ("resid_pdrop", "embd_pdrop", "hidden_dropout", "router_jitter_noise")


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a language model: `num_queries` H, `num_kv` G, `head_dim` D."""

    num_queries: int
    num_kv: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Heads:
        """Those of a supported family."""
        facts = config.to_dict()
        num_queries = int(facts["num_attention_heads"])
        head_dim = facts.get("head_dim") or facts["hidden_size"] // num_queries
        return cls(num_queries, int(facts.get("num_key_value_heads") or num_queries), int(head_dim))

    def local(self, size: int) -> Heads:
        """Those of one of `size` ranks."""
        return Heads(self.num_queries // size, max(1, self.num_kv // size), self.head_dim)

    def copies(self, size: int) -> int:
        """Ranks that hold the same key/value head; 1 = none is copied."""
        return max(1, size // self.num_kv)


def check_tensor(config: PretrainedConfig, size: int) -> None:
    """Refuses a language model that cannot be divided among `size` tensor-parallel ranks.

    Raises:
        ConfigError: a family without a plan, sizes that `size` does not divide (with the degrees that are possible), or random
            numbers that the ranks would draw differently.
    """
    if size == 1:
        return
    family = config.model_type
    if family not in FAMILIES:
        raise ConfigError(
            f"parallel.tensor={size}: a language model of {', '.join(FAMILIES)} is expected, found '{family}'; "
            "use one of these or set parallel.tensor=1"
        )
    facts = config.to_dict()
    random = {key: facts[key] for key in _DROPOUTS if facts.get(key)}
    if random:
        found = ", ".join(f"{key}={value}" for key, value in random.items())
        raise ConfigError(
            f"parallel.tensor={size}: model.llm without dropout or noise is expected (tensor-parallel ranks would draw it "
            f"differently), found {found}; set it to 0"
        )
    if family == "stablelm" and facts.get("qk_layernorm"):
        raise ConfigError(
            f"parallel.tensor={size}: stablelm is expected without qk_layernorm (one norm per head), found "
            "qk_layernorm=true; set parallel.tensor=1"
        )
    misfits = list(_misfits(config, size))
    if misfits:
        possible = [n for n in range(1, Heads.of(config).num_queries + 1) if not list(_misfits(config, n))]
        raise ConfigError(
            f"parallel.tensor={size} must divide the language model's sizes, found {'; '.join(misfits)}; "
            f"set parallel.tensor to one of {', '.join(map(str, possible))}"
        )


def _misfits(config: PretrainedConfig, size: int) -> Iterator[str]:
    heads, facts = Heads.of(config), config.to_dict()
    sizes = {"num_attention_heads": heads.num_queries}
    sizes |= {key: int(facts[key]) for key in ("intermediate_size", "vocab_size")}
    for key, value in sizes.items():
        if value % size:
            yield f"model.llm {key}={value}"
    if heads.num_kv % size and (size % heads.num_kv or heads.num_queries % heads.num_kv):
        yield f"model.llm num_key_value_heads={heads.num_kv}, neither a multiple nor a divisor"
    elif heads.num_kv < size and config.model_type == "phi3":
        yield f"phi3 num_key_value_heads={heads.num_kv}, whose fused projection cannot hold copied heads"


def tensor_plan(llm: PreTrainedModel, size: int, has_shares: bool) -> dict[str, Style]:
    """`placements` for `size` tensor-parallel ranks; a model of shapes only will do.

    Args:
        has_shares: each rank keeps its share of the tokens between the layers (`parallel.tensor_sequence`).

    Raises:
        ConfigError: like `check_tensor` and `placements`, and for experts, which need every token.
    """
    check_tensor(llm.config, size)
    places = placements(llm)
    if has_shares and Style.EXPERTS in places.values():
        raise ConfigError(
            f"parallel.tensor_sequence=true needs a language model without experts, found '{llm.config.model_type}'; set it to false"
        )
    return places


def placements(llm: PreTrainedModel) -> dict[str, Style]:
    """Module name -> what happens to it, for every module of `llm` that tensor parallelism changes.

    Raises:
        ConfigError: a style that is not known here, or a parameter that no rule covers.
    """
    family = llm.config.model_type
    rules = {**_published(llm), **_OWN_PLANS.get(family, {})}
    patterns = [(re.compile(_as_regex(pattern)), style) for pattern, style in rules.items()]
    placed: dict[str, Style] = {}
    for name, module in llm.named_modules():
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        if module is llm.get_input_embeddings():
            style = Style.EMBEDDING
        elif module is llm.get_output_embeddings():
            style = Style.HEAD
        elif style is Style.COLUMN and name.rpartition(".")[2] in ("k_proj", "v_proj"):
            style = Style.KEY_VALUE
        if style is not None:
            placed[name] = style
    _require_complete(llm, placed)
    return placed


def _published(llm: PreTrainedModel) -> dict[str, Style]:
    """The part of the model's own plan that is understood; what it misses, `_require_complete` finds."""
    plan: Mapping[str, str] = llm.tp_plan or {}
    return {pattern: _HF_STYLES[style] for pattern, style in plan.items() if style in _HF_STYLES}


def _as_regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", r"\d+")


def _require_complete(llm: PreTrainedModel, placed: Mapping[str, Style]) -> None:
    for name, _ in llm.named_parameters():
        owner, _, leaf = name.rpartition(".")
        is_placed = owner in placed and (placed[owner] is not Style.SINKS or leaf == "sinks")
        if not is_placed and not _REPLICATED.match(owner):
            raise ConfigError(
                f"parallel.tensor: a rule for every weight of the language model is expected, found none for {name} of "
                f"'{llm.config.model_type}'; set parallel.tensor=1"
            )


def even_cut(whole: torch.Size, dim: int, rank: int, size: int, blocks: Sequence[int] = ()) -> ShardLayout:
    """The part of `rank`, one of `size`, when dimension `dim` is divided evenly.

    Args:
        blocks: lengths along `dim` that are divided each for itself, such as those of queries, keys and values; () = one block.
    """
    pieces, start, local_start = [], 0, 0
    for block in blocks or (whole[dim],):
        length = block // size
        pieces.append(Piece(start + rank * length, local_start, length))
        start, local_start = start + block, local_start + length
    assert start == whole[dim] and all(block % size == 0 for block in blocks or (whole[dim],)), "see check_tensor"
    return ShardLayout(whole, dim, tuple(pieces))


def key_value_cut(whole: torch.Size, heads: Heads, rank: int, size: int) -> ShardLayout:
    """Like `even_cut` for rows of key/value heads; with fewer heads than ranks, neighbours hold the same head."""
    copies = heads.copies(size)
    if copies == 1:
        return even_cut(whole, 0, rank, size)
    piece = Piece(rank // copies * heads.head_dim, 0, heads.head_dim)
    return ShardLayout(whole, 0, (piece,), is_writer=rank % copies == 0)


def linear_cut(style: Style, weight: torch.Size, heads: Heads, rank: int, size: int) -> ShardLayout:
    """The part of a linear layer's weight [out, in] that `rank` of `size` holds."""
    if style is Style.ROW:
        return even_cut(weight, 1, rank, size)
    if style is Style.KEY_VALUE:
        return key_value_cut(weight, heads, rank, size)
    queries, keys = heads.num_queries * heads.head_dim, heads.num_kv * heads.head_dim
    blocks = {Style.FUSED_QKV: (queries, keys, keys), Style.FUSED_PAIR: (weight[0] // 2,) * 2}
    return even_cut(weight, 0, rank, size, blocks.get(style, ()))


def bias_cut(weight: ShardLayout) -> ShardLayout:
    """The part of a bias that goes with a weight whose rows are divided."""
    assert weight.dim == 0, "the bias of a ROW layer is whole"
    return ShardLayout(weight.whole[:1], 0, weight.pieces, weight.is_writer)
