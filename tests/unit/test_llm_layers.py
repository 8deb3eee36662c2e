"""The modules that stand in a decoder for those of Hugging Face: the same numbers, gradients, names and refusals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mmscale.errors import ConfigError
from mmscale.model.llm.attention import SUPPORTED, WholePack
from mmscale.model.llm.layers import FusedGatedMlp, GatedMlp, RMSNorm, RotaryAttention, replace_layers
from mmscale.model.llm.load import load_llm

SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 128},
    **{"num_key_value_heads": 4, "head_dim": 8, "pad_token_id": None, "max_position_embeddings": 64},
}
MORE = {
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": 7, "num_local_experts": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
REPLACED = {
    "gemma": (5, 2, 0, 2),
    "gpt_oss": (5, 0, 0, 0),
    "llama": (5, 2, 0, 2),
    "mistral": (5, 2, 0, 2),
    "mixtral": (5, 0, 0, 2),
    "phi": (0, 0, 0, 0),
    "phi3": (5, 0, 2, 0),
    "qwen2": (5, 2, 0, 2),
    "qwen3": (9, 2, 0, 2),
    "stablelm": (0, 2, 0, 0),
}
"""Norms, gated MLPs, fused MLPs and attentions that are replaced in two layers and at the end."""
LENGTHS = (9, 1, 13)


def models(family: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Hugging Face's model with random weights, norms included, and its copy with our layers."""
    torch.manual_seed(seed)
    model = load_llm(AutoConfig.for_model(family, **SMALL, **MORE.get(family, {})))
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.uniform_(0.5, 1.5)
    if family in ("mixtral", "gpt_oss"):
        model.set_experts_implementation("eager")  # the default knows no fp64
    model = model.to(dtype).train()
    return model, replace_layers(copy.deepcopy(model))


def run(model: PreTrainedModel, seed: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and the gradient of the input; the gradients of the weights are left in the model."""
    rng = torch.Generator().manual_seed(seed)
    param = next(model.parameters())
    embeds = torch.randn(1, sum(lengths), 64, generator=rng).to(param.dtype).requires_grad_()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    out = model(inputs_embeds=embeds, position_ids=positions, use_cache=False, pack=WholePack(lengths)).logits[0]
    out.backward(torch.randn(out.shape, generator=rng).to(out.dtype))
    assert embeds.grad is not None
    return out.detach(), embeds.grad


def error(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_computes_the_same(family: str, seed: int) -> None:
    theirs, ours = models(family, seed)
    counts = [
        sum(type(m) is kind for m in ours.modules()) for kind in (RMSNorm, GatedMlp, FusedGatedMlp, RotaryAttention)
    ]
    assert tuple(counts) == REPLACED[family]
    exact, _ = models(family, seed, torch.float64)
    want, got, truth = run(theirs, seed), run(ours, seed), run(exact, seed)
    for a, b, c in zip(got, want, truth, strict=True):
        assert error(a, b) < 2e-6
        assert error(a, c) < max(1e-6, 1.5 * error(b, c))
    true_grads = dict(exact.named_parameters())
    for (name, b), (other, a) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other
        if b.grad is None or not b.grad.any():  # experts that got no token
            assert a.grad is None or not a.grad.any()
            continue
        assert a.grad is not None and true_grads[name].grad is not None
        # key biases have a gradient of zero in exact arithmetic
        if error(b.grad, true_grads[name].grad) < 1e-3:
            # three times: the error of a bias of few numbers is chance
            assert error(a.grad, true_grads[name].grad) < max(2e-6, 3 * error(b.grad, true_grads[name].grad)), name


@pytest.mark.parametrize("family", [f for f in SUPPORTED if f not in ("mixtral", "gpt_oss")])
def test_in_bf16_the_error_is_that_of_hugging_face(family: str, seed: int) -> None:
    """Not for mixtures of experts: one rounding may send a token to another expert."""
    theirs, ours = models(family, seed, torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    want, got, truth = run(theirs, seed), run(ours, seed), run(exact, seed)
    for a, b, c in zip(got, want, truth, strict=True):
        assert a.dtype == torch.bfloat16
        assert error(a, c) < 1.3 * error(b, c)
    # all weights together: a single bias of few numbers may be better or worse by chance
    true = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    a, b = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (ours, theirs))
    assert error(a, true) < 1.3 * error(b, true)


@pytest.mark.parametrize("family", SUPPORTED)
def test_weights_keep_their_names_and_go_both_ways(family: str, seed: int) -> None:
    theirs, ours = models(family, seed)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    stock = AutoModelForCausalLM.from_config(theirs.config)
    stock.load_state_dict(torch.load(file, weights_only=True))
    modules = {id(m) for m in ours.modules()}
    replace_layers(ours)
    assert {id(m) for m in ours.modules()} == modules, "a second time changes nothing"


def test_autocast_gives_what_hugging_face_gives(seed: int) -> None:
    theirs, ours = models("qwen3", seed)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = run(theirs, seed), run(ours, seed)
    assert got[0].dtype == want[0].dtype == torch.bfloat16
    assert error(got[0], want[0]) < 2e-2 and error(got[1], want[1]) < 2e-2
    truth = run(theirs.double(), seed)
    assert error(got[0], truth[0]) < 1.3 * error(want[0], truth[0])


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_recomputed_activations_change_nothing(family: str, seed: int) -> None:
    _, ours = models(family, seed)
    want = run(ours, seed)
    grads = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    got = run(ours, seed)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(p.grad, grads[name]) for name, p in ours.named_parameters() if p.grad is not None)


def test_frozen_weights_get_no_gradient(seed: int) -> None:
    _, ours = models("qwen3", seed)
    want = run(ours, seed)[1]
    ours.zero_grad()
    ours.requires_grad_(False)
    got = run(ours, seed)[1]
    assert error(got, want) < 1e-6
    assert all(p.grad is None for p in ours.parameters())


def test_unknown_modules_stay(seed: int) -> None:
    theirs, _ = models("llama", seed)
    theirs.config.hidden_act = "relu"
    model = load_llm(AutoConfig.for_model("llama", **{**SMALL, "hidden_act": "relu"}))
    assert not any(isinstance(m, GatedMlp) for m in replace_layers(model).modules())

    class LlamaRMSNorm(nn.LayerNorm):
        """A class of that name from elsewhere."""

    model.model.norm = LlamaRMSNorm(64)
    assert type(replace_layers(model).model.norm) is LlamaRMSNorm


def test_other_implementations_and_caches_work_as_before(seed: int) -> None:
    """As the composite's own tests and generation use a model: with torch's attention and a cache, token by token."""
    theirs, ours = models("qwen3", seed)
    for model in (theirs, ours):
        model.eval().set_attn_implementation("sdpa")
    ids = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole = theirs(input_ids=ids, use_cache=False).logits
        assert error(ours(input_ids=ids, use_cache=False).logits, whole) < 2e-6
        first = ours(input_ids=ids[:, :4], use_cache=True)
        rest = ours(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    assert error(torch.cat((first.logits, rest.logits), 1), whole) < 2e-6


def test_missing_packs_and_unregistered_attention_are_refused(seed: int) -> None:
    _, ours = models("llama", seed)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="no matching pack="):
        ours(input_ids=ids, position_ids=torch.arange(4)[None], use_cache=False)
    ours.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="is registered is expected, found 'eager'; use sdpa"):
        ours(input_ids=ids, use_cache=False)
