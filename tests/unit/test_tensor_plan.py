"""What tensor parallelism does with each module, and which rows a rank holds, without processes."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mmscale.errors import ConfigError
from mmscale.parallel.layout import ShardLayout, chunks
from mmscale.parallel.tensor.plan import (
    FAMILIES,
    Heads,
    Style,
    bias_cut,
    check_tensor,
    even_cut,
    key_value_cut,
    linear_cut,
    placements,
)

SMALL = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 128},
    **{"num_key_value_heads": 4, "pad_token_id": None},
}


def config_of(family: str, **keys: object) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**SMALL, **keys})


def model_of(family: str, **keys: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(family, **keys))


def reassembled(whole: torch.Tensor, layouts: list[ShardLayout]) -> torch.Tensor:
    """The tensor from what the ranks write, cut into blocks of rows as an engine may do; every element exactly once."""
    out, times = torch.full_like(whole, -1), torch.zeros_like(whole, dtype=torch.int64)
    for layout in layouts:
        local = layout.cut(whole)
        assert local.shape == layout.local
        middle = len(local) // 3
        for first, rows in ((0, local[:middle]), (middle, local[middle:])):
            for chunk in chunks(rows, layout, first):
                where = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.value.shape, strict=True))
                out[where] = chunk.value
                times[where] += 1
    assert times.eq(1).all()
    return out


def test_cuts_cover_every_weight_once(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        size, head_dim = rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 4, 5])
        num_kv = rng.choice([n for n in range(1, 17) if n % size == 0 or size % n == 0])
        per_kv = rng.choice([n for n in range(1, 17) if n * num_kv % size == 0])
        heads = Heads(num_kv * per_kv, num_kv, head_dim)
        queries, keys = heads.num_queries * head_dim, num_kv * head_dim
        rows = {Style.COLUMN: queries, Style.KEY_VALUE: keys, Style.FUSED_PAIR: 2 * size * 3, Style.ROW: 7}
        if num_kv % size == 0:
            rows[Style.FUSED_QKV] = queries + 2 * keys
        for style, out in rows.items():
            shape = torch.Size((out, queries if style is Style.ROW else 5))
            whole = torch.arange(shape.numel()).view(shape)
            layouts = [linear_cut(style, shape, heads, rank, size) for rank in range(size)]
            assert torch.equal(reassembled(whole, layouts), whole), (style, heads, size)
            if style is not Style.ROW:
                bias = torch.arange(out)
                assert torch.equal(reassembled(bias, [bias_cut(layout) for layout in layouts]), bias)


def test_fused_projections_are_cut_by_their_parts() -> None:
    heads = Heads(4, 2, 3)
    rows = linear_cut(Style.FUSED_QKV, torch.Size((24, 5)), heads, 1, 2).cut(torch.arange(24)[:, None])[:, 0]
    assert rows.tolist() == [6, 7, 8, 9, 10, 11, 15, 16, 17, 21, 22, 23]
    rows = linear_cut(Style.FUSED_PAIR, torch.Size((8, 5)), heads, 0, 2).cut(torch.arange(8)[:, None])[:, 0]
    assert rows.tolist() == [0, 1, 4, 5]
    plain = even_cut(torch.Size((24, 5)), 0, 1, 2).cut(torch.arange(24)[:, None])[:, 0]
    assert plain.tolist() == list(range(12, 24)), "a plain cut would mix queries and keys"


def test_few_heads_are_copied_to_neighbours() -> None:
    layouts = [key_value_cut(torch.Size((6, 5)), Heads(8, 2, 3), rank, 4) for rank in range(4)]
    assert [layout.pieces[0].start for layout in layouts] == [0, 0, 3, 3]
    assert [layout.is_writer for layout in layouts] == [True, False, True, False]
    assert Heads(8, 2, 3).local(4) == Heads(2, 1, 3) and Heads(8, 2, 3).copies(4) == 2 and Heads(8, 4, 3).copies(4) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_has_a_rule(family: str) -> None:
    places = placements(model_of(family))
    layer = {name.removeprefix("model.layers.1."): style for name, style in places.items() if ".1." in name}
    assert places["model.embed_tokens"] is Style.EMBEDDING and places["lm_head"] is Style.HEAD
    if family == "phi3":
        assert layer["self_attn.qkv_proj"] is Style.FUSED_QKV and layer["mlp.gate_up_proj"] is Style.FUSED_PAIR
    else:
        assert [layer[f"self_attn.{x}_proj"] for x in "qkv"] == [Style.COLUMN, Style.KEY_VALUE, Style.KEY_VALUE]
    rows = {"phi": ("self_attn.dense", "mlp.fc2"), "mixtral": ("self_attn.o_proj",), "gpt_oss": ("self_attn.o_proj",)}
    for name in rows.get(family, ("self_attn.o_proj", "mlp.down_proj")):
        assert layer[name] is Style.ROW
    assert (layer.get("mlp.experts") is Style.EXPERTS) == (family in ("mixtral", "gpt_oss"))
    assert (layer.get("self_attn.q_norm") is Style.SUMMED) == (family == "qwen3")


def test_a_weight_without_a_rule_is_refused() -> None:
    llm = model_of("llama")
    llm.model.layers[1].self_attn.gate = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"found none for model\.layers\.1\.self_attn\.gate\.weight of 'llama'"):
        placements(llm)


@pytest.mark.parametrize(
    ("family", "keys", "size", "message"),
    [
        ("llama", {}, 3, r"num_attention_heads=8; .*vocab_size=128; .*num_key_value_heads=4.*to one of 1, 2, 4, 8$"),
        ("llama", {"num_key_value_heads": 1, "vocab_size": 132}, 8, r"vocab_size=132; set .* to one of 1, 2, 4$"),
        ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2}, 4, r"num_attention_heads=6; .* of 1, 2$"),
        ("llama", {"intermediate_size": 98}, 4, r"intermediate_size=98; .* of 1, 2$"),
        ("phi3", {}, 8, r"phi3 num_key_value_heads=4, whose fused projection .* of 1, 2, 4$"),
        ("phi", {"resid_pdrop": 0.1}, 2, r"without dropout .* found resid_pdrop=0\.1; set it to 0"),
        ("mixtral", {"router_jitter_noise": 0.2}, 2, r"found router_jitter_noise=0\.2"),
        ("stablelm", {"qk_layernorm": True}, 2, r"stablelm is expected without qk_layernorm"),
        ("gpt2", {}, 2, r"a language model of gemma, .* is expected, found 'gpt2'"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(family: str, keys: dict[str, object], size: int, message: str) -> None:
    config = config_of(family, **keys) if family != "gpt2" else AutoConfig.for_model("gpt2")
    with pytest.raises(ConfigError, match=message):
        check_tensor(config, size)
    check_tensor(config, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_be_divided_is_not_refused(family: str) -> None:
    for size in (1, 2, 4) if family == "phi3" else (1, 2, 4, 8):
        check_tensor(config_of(family), size)
