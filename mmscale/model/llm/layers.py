"""Faster modules in place of those that a Hugging Face decoder spends its memory traffic in: norms, gated MLPs, rotary attention.

Modules are replaced one by one in a loaded model, by the exact class that they are known to equal; the library itself is
not changed, and whatever is not known stays as it is. Names, order and identity of parameters are kept, so checkpoints,
exports, tensor-parallel plans and engines that wrap layers see the same model.

Shapes: B packs, L tokens, H query heads, G key/value heads, D head size, W width, I inner width of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmscale.errors import ConfigError
from mmscale.kernels.gated import Activation, gated_product
from mmscale.kernels.rms_norm import rms_norm
from mmscale.kernels.rope import rotate
from mmscale.model.llm.attention import ATTENTION, attend_pack


@dataclass(frozen=True, slots=True)
class _NormKind:
    """`offset`, `rounds_first`: see `rms_norm`. `eps`: where the module keeps it."""

    offset: float = 0.0
    rounds_first: bool = True
    eps: str = "variance_epsilon"


_NORMS = {
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "MixtralRMSNorm", "Phi3RMSNorm"), _NormKind()),
    **dict.fromkeys(("Qwen2RMSNorm", "Qwen3RMSNorm"), _NormKind()),
    "GemmaRMSNorm": _NormKind(offset=1.0, rounds_first=False, eps="eps"),
    "GptOssRMSNorm": _NormKind(rounds_first=False),
}
_GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "StableLmMLP")
_FUSED_MLPS = ("Phi3MLP",)
_ATTENTIONS = ("LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "Qwen3Attention", "GemmaAttention")  # fmt: skip
_WINDOW_IN_CONFIG = ("MistralAttention", "MixtralAttention")
"""Their window is the configuration's for every layer; the others' own attribute `sliding_window`, if any, is the layer's."""
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def replace_layers(model: PreTrainedModel) -> PreTrainedModel:
    """`model` itself, whose known norms, MLPs and attentions are replaced by those below; safe to call again.

    What is replaced: RMSNorm of every family that has it, gated MLPs with a known activation, and attention with rotary
    embeddings of whole heads. What stays: LayerNorm, experts, MLPs without a gate, attention with partly rotated heads (phi, phi3,
    stablelm) or its own rotation (gpt_oss).
    """
    for name, module in list(model.named_modules()):
        new = _replacement(module)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new.train(module.training))
    return model


def _replacement(module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    if not type(module).__module__.startswith("transformers."):
        return None
    if kind in _NORMS:
        return RMSNorm(module, _NORMS[kind])
    if kind in _ATTENTIONS:
        return RotaryAttention(module, window_in_config=kind in _WINDOW_IN_CONFIG)
    if kind in (*_GATED_MLPS, *_FUSED_MLPS):
        activation = _ACTIVATIONS.get(cast(Any, module).config.hidden_act)
        if activation is not None:
            return FusedGatedMlp(module, activation) if kind in _FUSED_MLPS else GatedMlp(module, activation)
    return None


class RMSNorm(nn.Module):
    """Root mean square norm with the parameter `weight` [W] of the module that it replaces."""

    def __init__(self, inner: nn.Module, kind: _NormKind) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, inner.weight)
        self.eps = float(cast(Any, inner).__dict__[kind.eps])
        self.kind = kind

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., W], normalised along the last dimension."""
        return rms_norm(
            hidden_states, self.weight, self.eps, offset=self.kind.offset, rounds_first=self.kind.rounds_first
        )

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}, offset={self.kind.offset}"


class GatedMlp(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), with the layers of the module that it replaces."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, inner: nn.Module, activation: Activation) -> None:
        super().__init__()
        _take_children(self, inner, but=("act_fn",))
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, W] from [B, L, W], or [N, W] from [N, W]."""
        rows = x.flatten(0, -2)  # a matrix: a linear layer of one makes no views of its own
        out = self.down_proj(gated_product(self.gate_proj(rows), self.up_proj(rows), self.activation))
        # -1: under tensor parallelism it may be a share of the rows
        return cast(Tensor, out.view(*x.shape[:-2], -1, out.shape[-1]))


class FusedGatedMlp(nn.Module):
    """Like `GatedMlp` with one projection to gate and up, side by side (Phi-3)."""

    gate_up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, inner: nn.Module, activation: Activation) -> None:
        super().__init__()
        _take_children(self, inner, but=("activation_fn",))
        self.activation: Activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., W] from [..., W]."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return cast(Tensor, self.down_proj(gated_product(gate, up, self.activation)))


class RotaryAttention(nn.Module):
    """Causal attention whose rotary embeddings take one pass, with the layers of the module that it replaces.

    It calls the implementation that the model's configuration names, as the replaced module does. Heads are counted from the
    shapes of the projections, so a rank may hold some of them. `q_norm` and `k_norm` [D] are applied before the rotation where
    the replaced module has them.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, inner: nn.Module, window_in_config: bool) -> None:
        super().__init__()
        _take_children(self, inner)
        facts = cast(Any, inner)
        self.config: PretrainedConfig = facts.config
        self.layer_idx = int(facts.layer_idx)
        self.head_dim = int(facts.head_dim)
        self.num_key_value_groups = int(facts.num_key_value_groups)
        self.is_causal = bool(facts.is_causal)
        self.scaling = float(facts.scaling)
        self.attention_dropout = float(facts.attention_dropout)
        window = facts.config.sliding_window if window_in_config else facts.__dict__.get("sliding_window")
        self.sliding_window: int | None = window
        self.has_head_norms = "q_norm" in dict(inner.named_children())

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """([B, L, W], weights or None), as a decoder layer of Hugging Face expects.

        Args:
            hidden_states: [B, L, W].
            position_embeddings: cosines and sines [B, L, D] of the angles of the positions.
            kwargs: handed to the implementation: `pack` for packed attention.

        Raises:
            ConfigError: an implementation that is in no registry, and whatever `attend_pack` refuses.
        """
        options: dict[str, Any] = {
            "scaling": self.scaling,
            "dropout": self.attention_dropout if self.training else 0.0,
            "sliding_window": self.sliding_window,
        }
        name = self.config._attn_implementation
        if name == ATTENTION and past_key_values is None and len(hidden_states) == 1:
            # matrices without the pack dimension: fewer views in every layer
            q_LHD, k_LGD, v_LGD = self._heads(hidden_states.squeeze(0), *(x.squeeze(0) for x in position_embeddings))
            out_LHD = attend_pack(self, q_LHD, k_LGD, v_LGD, attention_mask, **options, **kwargs)
            return self.o_proj(out_LHD.flatten(-2)).unsqueeze(0), None
        if name not in ALL_ATTENTION_FUNCTIONS:
            raise ConfigError(f"an attention implementation that is registered is expected, found '{name}'; use sdpa")
        q_BHLD, k_BGLD, v_BGLD = (x.transpose(1, 2) for x in self._heads(hidden_states, *position_embeddings))
        if past_key_values is not None:
            k_BGLD, v_BGLD = past_key_values.update(k_BGLD, v_BGLD, self.layer_idx)
        implementation = cast(Callable[..., tuple[Tensor, Tensor | None]], ALL_ATTENTION_FUNCTIONS[name])
        out_BLHD, weights = implementation(self, q_BHLD, k_BGLD, v_BGLD, attention_mask, **options, **kwargs)
        return self.o_proj(out_BLHD.flatten(-2)), weights

    def _heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [..., L, H, D] and keys [..., L, G, D], and values, of hidden states [..., L, W]."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = (cast(Tensor, project(hidden)).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        return *rotate(q, k, cos, sin), v


def _take_children(to: nn.Module, inner: nn.Module, but: tuple[str, ...] = ()) -> None:
    for name, child in inner.named_children():
        if name not in but:
            to.add_module(name, child)
