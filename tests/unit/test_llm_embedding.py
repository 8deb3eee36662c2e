"""The embedding that places media: what it replaces, what it leaves alone, and that a model does not notice."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mmscale.config.specs import media_specs
from mmscale.kernels.placement import media_positions
from mmscale.model.composite import build_model
from mmscale.model.llm.embedding import PlacingEmbedding, embed_pack, place_in_lookup
from mmscale.model.llm.load import load_llm

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 33,
}


def language_model(model_type="llama", **keys):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **keys}))


def places(tokens, rows, seed):
    g = torch.Generator().manual_seed(seed)
    source = torch.arange(tokens)
    source[torch.randperm(tokens, generator=g)[: rows - 1]] = tokens + torch.randperm(rows, generator=g)[: rows - 1]
    media = torch.randn(rows, 16, generator=g).requires_grad_()
    return torch.randint(0, 33, (tokens,), generator=g), media, source, media_positions(source, rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_it_is_the_same_embedding_with_the_same_parameter(tied, padding_idx, seed):
    llm = language_model(tie_word_embeddings=tied, pad_token_id=padding_idx)
    table, names = llm.get_input_embeddings(), list(llm.state_dict())
    params = {name: id(param) for name, param in llm.named_parameters()}
    place_in_lookup(llm)
    placing = llm.get_input_embeddings()
    assert type(placing) is PlacingEmbedding and placing.padding_idx == padding_idx
    assert placing.weight is table.weight and list(llm.state_dict()) == names
    assert {name: id(param) for name, param in llm.named_parameters()} == params
    assert (llm.get_output_embeddings().weight is placing.weight) == tied
    ids = torch.randint(0, 33, (2, 7), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(placing(ids), table(ids)), "text alone, of any shape"
    place_in_lookup(llm)
    assert llm.get_input_embeddings() is placing, "a second call changes nothing"


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_one_pass_equals_two(padding_idx, seed):
    table = nn.Embedding(33, 16, padding_idx)
    ids, *rest = places(40, 9, seed)
    media = rest[0]
    ids[:3] = 2
    results = []
    for embedding in (PlacingEmbedding.like(table), table):
        out = embed_pack(embedding, ids, *rest)
        results.append((out, *torch.autograd.grad((out**3).sum(), (table.weight, media))))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    want = torch.cat([F.embedding(ids, table.weight), media])[rest[1]]
    assert torch.equal(results[0][0], want)
    assert padding_idx is None or results[0][1][2].abs().max() == 0


def test_special_embeddings_are_left_alone():
    gemma = language_model("gemma3_text", layer_types=["full_attention"])
    kind = type(gemma.get_input_embeddings())
    assert kind is not nn.Embedding, "Gemma 3 scales its rows"
    place_in_lookup(gemma)
    assert type(gemma.get_input_embeddings()) is kind
    for keys in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        llm = language_model()
        table = nn.Embedding(33, 16, **keys)
        llm.set_input_embeddings(table)
        place_in_lookup(llm)
        assert llm.get_input_embeddings() is table


def test_media_rows_of_a_scaled_embedding_are_not_scaled(seed):
    gemma = language_model("gemma3_text", layer_types=["full_attention"])
    ids, media, source, positions = places(12, 5, seed)
    out = embed_pack(gemma.get_input_embeddings(), ids, media, source, positions)
    taken = positions >= 0
    assert torch.equal(out[positions[taken].long()], media[taken])
    text = source < 12
    torch.testing.assert_close(out[text], 4.0 * gemma.get_input_embeddings().weight[ids[text]])


def test_language_models_of_runs_have_it_and_can_be_copied():
    llm = load_llm(AutoConfig.for_model("llama", **SIZES))
    assert type(llm.get_input_embeddings()) is PlacingEmbedding
    assert type(copy.deepcopy(llm).get_input_embeddings()) is PlacingEmbedding
    with torch.device("meta"):
        assert load_llm(AutoConfig.for_model("llama", **SIZES)).get_input_embeddings().weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns_the_same_with_either(dtype, tiny_config, make_pack, seed):
    """Losses and gradients of the whole model with its embedding and with torch's own, under autocast, too."""
    config = tiny_config()
    specs = media_specs(config.model, config.data)
    pack = make_pack(specs, [[("text", 3), ("image", 1), ("text", 9)], [("audio", 3300), ("text", 4)]], seed)
    model = build_model(config, 97, specs)
    results = []
    for kind in (PlacingEmbedding, nn.Embedding):
        table = model.llm.get_input_embeddings()
        if kind is nn.Embedding:
            plain = nn.Embedding(*table.weight.shape)
            plain.weight = table.weight
            model.llm.set_input_embeddings(plain)
        assert type(model.llm.get_input_embeddings()) is kind
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(pack)
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0] > 0
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
