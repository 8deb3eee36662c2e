"""The head that takes the place of a language model's own: the same logits, names and ties in every family, and the loss."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mmscale.config.specs import media_specs
from mmscale.model.composite import build_model
from mmscale.model.description import hf_config
from mmscale.model.llm.attention import SUPPORTED
from mmscale.model.llm.head import LossHead, LossOptions, loss_head, put_loss_head

VOCAB = 97
SIZES = {
    **{
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    **{"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None},
}
KEYS = {
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 8},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
}


def plain_model(family, seed):
    """A Hugging Face model with every parameter drawn at random: biases and norms start as constants, which hides mistakes."""
    torch.manual_seed(seed)
    config = hf_config({"model_type": family, **SIZES, **KEYS.get(family, {})}, "model.llm.config")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).train()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model


@pytest.mark.parametrize("family", SUPPORTED)
def test_base_model_and_head_are_the_whole_model(family, seed):
    theirs = plain_model(family, seed)
    ours = copy.deepcopy(theirs)
    put_loss_head(ours, LossOptions())
    head = loss_head(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    is_tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert is_tied == (family in ("gemma", "qwen2")) == (head.weight is ours.get_input_embeddings().weight)
    assert (head.bias is not None) == (family == "phi") and head.training

    ids = torch.randint(0, VOCAB, (1, 20))
    labels, rows = torch.randint(0, VOCAB, (6,)), torch.tensor([2, 3, 7, 8, 13, 19])
    want = theirs(input_ids=ids, use_cache=False).logits
    hidden = ours.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(head(hidden), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours(input_ids=ids, use_cache=False).logits, want, rtol=1e-6, atol=1e-6)
    assert head(hidden).abs().max() > 0.1

    loss, exact = head(hidden[0, rows], labels), F.cross_entropy(want[0, rows], labels, reduction="sum")
    loss.backward()
    exact.backward()
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() + 1e-7, name


def test_weights_go_through_folders_and_vocabularies_grow(tmp_path, seed):
    """What Hugging Face does to a plain head still works: saving, loading, tying, another vocabulary."""
    model = plain_model("phi", seed)
    put_loss_head(model, LossOptions())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is nn.Linear, "a folder knows nothing of our class"
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
    put_loss_head(model, LossOptions())
    assert loss_head(model)(torch.zeros(2, 32)).shape == (2, VOCAB + 7)


def test_the_z_loss_is_trained_and_not_validated(seed):
    torch.manual_seed(seed)
    linear = nn.Linear(8, 13)
    head = LossHead(linear.weight, linear.bias, LossOptions(z_loss=0.01))
    hidden, labels = torch.randn(5, 8), torch.randint(0, 13, (5,))
    logits = linear(hidden)
    plain = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(head(hidden, labels), plain + 0.01 * logits.logsumexp(1).square().sum())
    torch.testing.assert_close(head.eval()(hidden, labels), plain)


def test_the_configuration_reaches_the_head(tiny_config, make_pack, seed):
    config = tiny_config(train={"z_loss": 0.5, "loss_memory_mb": 3})
    specs = media_specs(config.model, config.data)
    model = build_model(config, VOCAB, specs)
    assert loss_head(model.llm).options == LossOptions(0.5, 3_000_000)
    pack = make_pack(specs, [[("text", 30)], [("image", 1), ("text", 9)]], seed)
    with torch.no_grad():
        logits = model.logits(pack)
        plain = F.cross_entropy(logits, pack.labels[pack.target_idx], reduction="sum")
        torch.testing.assert_close(model(pack), plain + 0.5 * logits.logsumexp(1).square().sum())
        torch.testing.assert_close(model.eval()(pack), plain)
