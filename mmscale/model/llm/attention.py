"""Attention over packed documents, plugged into unmodified Hugging Face decoders through their two registries.

The document lengths travel as the keyword `pack=` of `model(...)`; there is no global state and no [T, T] tensor.

Shapes: T tokens of the pack, L tokens of one document, H query heads, G key/value heads, D head size, W sliding window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from mmscale.errors import ConfigError
from mmscale.kernels.attention.attend import attend
from mmscale.kernels.attention.base import AttentionBackend, Segment, Segments
from mmscale.kernels.attention.select import backend
from mmscale.types import PackedBatch

ATTENTION = "mmscale_packed"
"""The name of the implementation in Hugging Face's registries."""

SUPPORTED = ("gemma", "gpt_oss", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2", "qwen3", "stablelm")
"""`model_type` of the families whose masks are known and tested: causal, or causal with a sliding window; sinks in gpt_oss.

GPT-OSS knows nothing of packs by itself: it makes its masks without the positions. Only this attention isolates documents.
"""

_KNOWN_REASONS = {
    "gemma2": "it caps attention scores (soft-cap)",
    "gemma3": "it uses bidirectional image blocks",
    "gemma3_text": "it mixes masks by layer",
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


class PackAttention(Protocol):
    """Causal attention inside the documents of one pack. It travels as the keyword `pack=` of the language model."""

    @property
    def num_tokens(self) -> int:
        """L, the tokens of the pack or of this rank's part of it."""
        ...

    def __call__(
        self, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, /, *, scale: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """[L, H, D], differentiable in every tensor.

        Args:
            window: W, a token sees itself and the W - 1 before it; None = its whole document.
            sinks: [H], a logit per head that takes part in the softmax without a value (GPT-OSS).
        """
        ...


@dataclass(frozen=True, slots=True)
class WholePack:
    """Attention over a pack that is not divided. `kernel`: see `mmscale.kernels.attention.select`."""

    lengths: tuple[int, ...]
    kernel: str = "auto"

    @classmethod
    def of(cls, batch: PackedBatch, kernel: str = "auto") -> WholePack:
        """The documents of `batch`."""
        return cls(batch.lengths, kernel)

    @property
    def num_tokens(self) -> int:
        """See `PackAttention.num_tokens`."""
        return sum(self.lengths)

    def __call__(
        self, q_LHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, *, scale: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """See `PackAttention`."""
        segments = document_segments(self.lengths, window)
        return attend(q_LHD, k_LGD, v_LGD, segments, scale, attention_kernel(self.kernel, q_LHD), sinks)


def attention_kernel(name: str, q_LHD: Tensor) -> AttentionBackend:
    """The kernel called `name` (`auto` = the best one) for queries like these.

    Raises:
        ConfigError: it cannot be used here; the text says why.
    """
    try:
        return backend(name, q_LHD.device, q_LHD.dtype, q_LHD.shape[-1])
    except ValueError as error:
        raise ConfigError(f"parallel.attention={name}: {error}; use auto or another kernel") from error


@lru_cache(maxsize=64)
def document_segments(lengths: tuple[int, ...], window: int | None) -> Segments:
    """Every document sees itself, causally."""
    ends = list(accumulate(lengths))
    rows = tuple(Segment(end - n, end, end - n, end) for n, end in zip(lengths, ends, strict=True) if n)
    longest = max(lengths, default=0)
    return Segments(rows, causal=True, window=None if window is None or window >= longest else window)


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
    cap = facts.get("attn_logit_softcapping")
    if odd or cap:
        found = (
            f"layer_types {sorted(odd)}" if odd else f"a soft-cap of attention scores (attn_logit_softcapping={cap})"
        )
        raise ConfigError(
            f"model.llm: plain causal or sliding-window attention is expected, found {found}; use another model"
        )


def check_positions(config: PretrainedConfig, seq_len: int) -> None:
    """Refuses rotary frequencies that would depend on what else is in a pack, and on which rank a token is.

    Hugging Face's `longrope` (Phi-3 with 128k positions) takes one set of frequencies for all tokens of a call, by the largest
    position among them: a short document beside a long one gets another than alone, and a rank with early tokens another than
    a rank with late ones.

    Raises:
        ConfigError: `longrope`, and documents that may be longer than those of its first set.
    """
    rope = config.to_dict().get("rope_parameters") or {}
    if rope.get("rope_type") != "longrope":
        return
    longest = int(rope["original_max_position_embeddings"])
    if seq_len > longest:
        raise ConfigError(
            f"model.llm: rope_type=longrope is expected with documents of at most original_max_position_embeddings={longest} "
            f"tokens (beyond it frequencies depend on the longest document of a pack), found data.seq_len={seq_len}; set "
            f"data.seq_len={longest}, or use a model with another rope_type"
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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """([1, L, H, D], None): `attend_pack` with Hugging Face's signature, `query` [1, H, L, D], `key` and `value` [1, G, L, D]."""
    if len(query) != 1:
        raise ConfigError(f"one pack is expected, found query {tuple(query.shape)}; give packs one by one")
    # squeeze, not [0]: the gradient of an index is a tensor of zeros and a copy into it
    q_LHD, k_LGD, v_LGD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend_pack(module, q_LHD, k_LGD, v_LGD, attention_mask, **options).unsqueeze(0), None


def attend_pack(
    module: nn.Module,
    q_LHD: Tensor,
    k_LGD: Tensor,
    v_LGD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pack: PackAttention | None = None,
    **_: Any,
) -> Tensor:
    """[L, H, D], causal attention inside each document of one pack.

    Args:
        q_LHD: [L, H, D]; keys and values: [L, G, D], H a multiple of G.
        sliding_window: W, a token sees itself and the W - 1 before it; None = its whole document.
        s_aux: [H], attention sinks (GPT-OSS).
        pack: what sees what, from `model(..., pack=)`.

    Raises:
        ConfigError: a feature that would change the result silently.
    """
    found = [] if softcap is None else [f"a soft-cap of attention scores (softcap={softcap})"]
    if attention_mask is not None:
        found.append(f"a mask tensor {tuple(attention_mask.shape)}")
    if dropout > 0 and module.training:
        found.append(f"attention dropout {dropout}")
    if pack is None or pack.num_tokens != len(q_LHD):
        found.append(f"no matching pack= for query {tuple(q_LHD.shape)}")
    if found or pack is None:
        raise ConfigError(
            f"plain causal attention over one pack is expected, found {', '.join(found)}; use another model"
        )
    scale = q_LHD.shape[-1] ** -0.5 if scaling is None else scaling
    return pack(_cast(q_LHD), _cast(k_LGD), _cast(v_LGD), scale=scale, window=sliding_window, sinks=s_aux)


def _cast(x: Tensor) -> Tensor:
    """In the type of autocast where it is on: rotary embeddings in fp32 make such queries and keys beside bf16 values."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))
