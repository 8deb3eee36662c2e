"""Attention over packed documents, plugged into unmodified Hugging Face decoders through their two registries.

The document lengths travel as the keyword `pack=` of `model(...)`; there is no global state and no [T, T] tensor.

Shapes: T tokens of the pack, L tokens of one document, H query heads, G key/value heads, D head size, W sliding window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from mmscale.errors import ConfigError
from mmscale.types import PackedBatch

ATTENTION = "mmscale_packed"
"""The name of the implementation in Hugging Face's registries."""

SUPPORTED = ("gemma", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "stablelm")
"""`model_type` of the families whose masks are known and tested: causal, or causal with a sliding window."""

_KNOWN_REASONS = {
    "gemma2": "it caps attention scores (soft-cap)",
    "gemma3": "it uses bidirectional image blocks",
    "gemma3_text": "it mixes masks by layer",
    "gpt_oss": "it uses attention sinks",
    "llama4_text": "it uses chunked attention",
}

_LAYERS_DROP_KEYWORDS = {"stablelm"}

_WRAPPERS = {
    "and_masks.<locals>.and_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}
_IMPLIED = {
    "causal_mask_function",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "sliding_window_overlay.<locals>.inner_mask",
}
"""Mask functions that the document lengths and the `sliding_window` keyword already imply."""


@dataclass(frozen=True, slots=True)
class PackInfo:
    """Document borders of a pack: host `lengths`, `cu_seqlens` int32 [S + 1] on the device, the longest length."""

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    max_length: int

    @classmethod
    def of(cls, batch: PackedBatch) -> PackInfo:
        """The borders of `batch`, without a device sync."""
        return cls(batch.lengths, batch.cu_seqlens, max(batch.lengths, default=0))


def register() -> None:
    """Makes `ATTENTION` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, packed_mask)


def check_llm(config: PretrainedConfig) -> None:
    """Refuses a language model whose attention is not known to be computed right on packs.

    Raises:
        ConfigError: with the reason: an unknown family, attention dropout, a soft-cap, an odd layer type.
    """
    kind = config.model_type
    if kind not in SUPPORTED:
        reason = _KNOWN_REASONS.get(kind, "its attention masks are not known here")
        raise ConfigError(
            f"model.llm: a model_type in {', '.join(SUPPORTED)} is expected, found '{kind}', which is refused because "
            f"{reason}; use one of these families"
        )
    facts = config.to_dict()
    dropout = facts.get("attention_dropout") or 0.0
    if dropout > 0:
        raise ConfigError(
            f"model.llm: attention dropout 0 is expected (its random pattern would depend on the packing), "
            f"found attention_dropout={dropout}; set it to 0"
        )
    odd = set(facts.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if odd or facts.get("attn_logit_softcapping"):
        found = f"layer_types {sorted(odd)}" if odd else "attn_logit_softcapping"
        raise ConfigError(
            f"model.llm: plain causal or sliding-window attention is expected, found {found}; use another model"
        )


def carry_pack(model: PreTrainedModel) -> None:
    """Brings `pack=` to the attention of families whose layers do not hand keywords on (stablelm); others are left alone.

    Forward hooks find the pack by the identity of `position_ids`, the tensor that all layers do get, so that a later
    recomputation in the backward pass finds its own pack and not the newest one.
    """
    if model.config.model_type not in _LAYERS_DROP_KEYWORDS:
        return
    packs = WeakTensorKeyDictionary()

    def take(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        packs[kwargs["position_ids"]] = kwargs.get("pack")

    def give(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "pack": packs[kwargs["position_ids"]]}

    model.base_model.register_forward_pre_hook(take, with_kwargs=True)
    for name, module in model.named_modules():
        if name.endswith(".self_attn"):
            module.register_forward_pre_hook(give, with_kwargs=True)


def mask_parts(function: Callable[..., Any]) -> Iterator[str]:
    """Names of the mask functions that a composed one is made of; wrappers are opened through their closures."""
    if function.__qualname__ not in _WRAPPERS:
        yield function.__qualname__
        return
    for cell in function.__closure__ or ():
        held = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        for item in held:
            if callable(item) and not isinstance(item, torch.Tensor):
                yield from mask_parts(item)


def packed_mask(
    *, mask_function: Callable[..., Any], use_vmap: bool = False, attention_mask: torch.Tensor | None = None, **_: Any
) -> None:
    """None, "the attention function knows", for masks that the pack implies; Hugging Face calls it for every mask.

    Raises:
        ConfigError: any other mask (bidirectional blocks, padding, chunks, user functions).
    """
    unknown = sorted(set(mask_parts(mask_function)) - _IMPLIED)
    if unknown or use_vmap or attention_mask is not None:
        found = ", ".join(unknown) or ("a user mask function" if use_vmap else "a padding mask")
        raise ConfigError(
            f"a causal or sliding-window mask is expected on a pack, found {found} in the language model; "
            f"use a family of {', '.join(SUPPORTED)}"
        )


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    pack: PackInfo | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of one pack; Hugging Face's attention signature.

    Args:
        query: [1, H, T, D]; `key` and `value`: [1, G, T, D], H a multiple of G.
        sliding_window: W, a token sees itself and the W - 1 before it; None = its whole document.
        pack: the document borders, from `model(..., pack=)`.

    Returns:
        ([1, T, H, D], None).

    Raises:
        ConfigError: a feature that would change the result silently.
    """
    refused = {"softcap": softcap, "attention sinks": s_aux, "a mask tensor": attention_mask}
    found = [name for name, value_ in refused.items() if value_ is not None]
    if dropout > 0 and module.training:
        found.append(f"attention dropout {dropout}")
    if pack is None or query.shape[0] != 1 or sum(pack.lengths) != query.shape[2]:
        found.append(f"no matching pack= for query {tuple(query.shape)}")
    if found or pack is None:
        raise ConfigError(
            f"plain causal attention over one pack is expected, found {', '.join(found)}; use another model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < pack.max_length else None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, pack, scale, window), None
    return _per_document(query, key, value, pack, scale, window), None


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackInfo, scale: float, window: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    # torch 2.11 takes fewer key/value heads without asking; later versions want to be told.
    extra: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out_THD: Any = varlen_attn(
        q_THD,
        k_TGD,
        v_TGD,
        cu_seq_q=pack.cu_seqlens,
        cu_seq_k=pack.cu_seqlens,
        max_q=pack.max_length,
        max_k=pack.max_length,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        **extra,
    )
    return out_THD[None]


def _per_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackInfo, scale: float, window: int | None
) -> torch.Tensor:
    if query.is_cuda and query.shape[1] != key.shape[1]:
        # fp32 on CUDA: the memory-efficient kernel wants equal heads; without it torch falls back to [L, L] scores.
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (x.split(pack.lengths, dim=2) for x in (query, key, value))
    parts = [_document(*document, scale, window) for document in zip(q, k, v, strict=True)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """Attention of one document: q [1, H, L, D], k and v [1, G, L, D] -> [1, H, L, D]."""
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    blocks = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        q_pos = torch.arange(start, end, device=q.device)[:, None]
        k_pos = torch.arange(first, end, device=q.device)[None, :]
        mask = (k_pos <= q_pos) & (k_pos > q_pos - window)  # at most [W, 2 W]
        blocks.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], attn_mask=mask, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(blocks, dim=2)
