"""The sizes of a language model, read from its Hugging Face configuration; nothing is imported from transformers here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.config.schema import LlmConfig
from mmscale.config.specs import read_hf_config
from mmscale.errors import ConfigError

_UNGATED = frozenset(("phi", "gpt2", "gpt_neox", "gptj", "opt", "falcon", "bloom", "starcoder2"))
"""LLMs whose MLP is two matrices; all others have three (a gate)."""

_SWITCHED_WINDOW = frozenset(("qwen2", "qwen3"))
"""Families whose `sliding_window` counts only where `use_sliding_window` is true."""

_MISTRAL_WINDOW = 4096
"""The window of a Mistral configuration that does not name one."""


@dataclass(frozen=True, slots=True)
class LlmSizes:
    """Sizes of a decoder.

    layers, width            number of layers and of channels between them
    heads, kv_heads          of queries, and of keys and values
    head_size                channels of a head
    inner, matrices          channels inside an MLP (of one expert), and its weight matrices: 3 with a gate, else 2
    experts, experts_used    experts per layer and those that a token meets; 1 and 1 without a mixture of experts
    shared_inner             channels of the expert that every token meets
    vocab                    rows of the head; None = the configuration does not say
    window                   tokens of a sliding window; None = every token sees its whole document
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    matrices: int
    experts: int = 1
    experts_used: int = 1
    shared_inner: int = 0
    vocab: int | None = None
    window: int | None = None

    @property
    def attention_weights(self) -> int:
        """Matrix weights of the attention of one layer."""
        return 2 * self.width * self.head_size * (self.heads + self.kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Matrix weights of the MLP of one layer that a token meets; of a mixture of experts those of its experts."""
        if self.experts == 1:
            return self.matrices * self.width * self.inner
        met = self.inner * self.experts_used + self.shared_inner
        return self.matrices * self.width * met + self.width * self.experts


def read_llm_sizes(llm: LlmConfig) -> LlmSizes:
    """The sizes of the configured language model. Raises ConfigError like `llm_sizes` and `read_hf_config`."""
    return llm_sizes(dict(llm.config) if llm.config is not None else read_hf_config(llm.path or "", "model.llm"))


def llm_sizes(raw: Mapping[str, Any]) -> LlmSizes:
    """The sizes in a Hugging Face configuration; of a composite one those of its `text_config`.

    Raises:
        ConfigError: a size that is missing, or no positive whole number.

    Example:
        >>> config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> llm_sizes({**config, "num_key_value_heads": 2}).attention_weights
        12288
    """
    raw = raw.get("text_config", raw)
    width = _size(raw, "hidden_size", "n_embd", "d_model")
    heads = _size(raw, "num_attention_heads", "n_head")
    inner = _size(raw, "intermediate_size", "n_inner", default=4 * width)
    experts = _size(raw, "num_local_experts", "num_experts", default=1)
    return LlmSizes(
        layers=_size(raw, "num_hidden_layers", "n_layer"),
        width=width,
        heads=heads,
        kv_heads=_size(raw, "num_key_value_heads", default=heads),
        head_size=_size(raw, "head_dim", default=max(1, width // heads)),
        inner=inner if experts == 1 else _size(raw, "moe_intermediate_size", default=inner),
        matrices=2 if raw.get("model_type") in _UNGATED else 3,
        experts=experts,
        experts_used=1 if experts == 1 else _size(raw, "num_experts_per_tok", default=2),
        shared_inner=int(raw.get("shared_expert_intermediate_size") or 0),
        vocab=_size(raw, "vocab_size", default=0) or None,
        window=_window(raw),
    )


def _window(raw: Mapping[str, Any]) -> int | None:
    kind = raw.get("model_type")
    if kind in _SWITCHED_WINDOW and not raw.get("use_sliding_window"):
        return None
    default = _MISTRAL_WINDOW if kind == "mistral" else None
    window = raw.get("sliding_window", default)
    return int(window) if window else None


def _size(raw: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of some keys that is set. Raises ConfigError: no positive whole number, or none and no default."""
    for name in names:
        value = raw.get(name)
        if isinstance(value, int) and value > 0:
            return value
        if value is not None:
            raise ConfigError(f"model.llm.config.{name}: expected a positive whole number, found {value!r}; correct it")
    if default is None:
        raise ConfigError(
            f"model.llm.config: expected `{names[0]}` in the Hugging Face configuration, found none; add it (on one process it "
            "is enough to say in data.cost what tokens cost)"
        )
    return default
