"""Packed attention against float64 mathematics per document: outputs and gradients, windows, head groups, memory."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from mmscale.errors import ConfigError
from mmscale.model.llm.attention import (
    WholePack,
    check_llm,
    check_positions,
    mask_parts,
    packed_attention,
    packed_mask,
    register,
)


def pack_of(lengths, kernel="auto"):
    return WholePack(tuple(lengths), kernel)


def reference(q, k, v, lengths, window, scale):
    """Softmax attention in float64 with an explicit mask over the whole pack."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    t = torch.arange(q.shape[2])
    seen = (document[:, None] == document[None]) & (t[None] <= t[:, None])
    if window is not None:
        seen &= t[None] > t[:, None] - window
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def relative(a, b):
    return (
        (a.double() - b.double()).norm() / b.double().norm().clamp_min(10.0)
    ).item()  # norms here are 30 to 100; a window of 1 gives zero


def test_a_pack_of_documents_compiles_whole_and_has_no_second_derivative(seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(13, heads, 8, generator=g).requires_grad_() for heads in (4, 2, 2))
    call = partial(pack_of([5, 8]), scale=0.3, window=None, sinks=None)
    want = call(q, k, v)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(got, want)
    wanted = torch.autograd.grad(want.square().sum(), (q, k, v), create_graph=True)
    found = torch.autograd.grad(got.square().sum(), (q, k, v))
    assert all(relative(a, b) <= 1e-6 for a, b in zip(found, wanted, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        wanted[0].sum().backward()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_and_gradients_equal_float64(heads, kv_heads, window, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    lengths = [1, 17, 3, 40, 7, 1, 14]
    shape = (1, heads, sum(lengths), 16)
    q = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    k, v = (
        torch.randn(1, kv_heads, *shape[2:], generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in "kv"
    )
    out, weights = packed_attention(
        torch.nn.Module(), q, k, v, None, scaling=0.3, sliding_window=window, pack=pack_of(lengths)
    )
    upstream = torch.randn(out.shape, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
    exact = reference(q, k, v, lengths, window, 0.3)
    exact_grads = torch.autograd.grad(exact, (q, k, v), upstream)
    assert weights is None
    assert out.shape == (1, sum(lengths), heads, 16)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert relative(out, exact) < limit
    for name, mine, true in zip("qkv", grads, exact_grads, strict=True):
        assert relative(mine, true) < limit, f"gradient of {name}"


def test_reference_sees_a_leak(seed):
    """Negative control: attention over the pack as one document is far from the reference."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=g) for _ in "qkv")
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, pack=pack_of([30]))
    assert relative(out, reference(q, k, v, [10, 20], None, 8**-0.5)) > 1e-2


class LargeOutputs(TorchDispatchMode):
    """Records outputs with two or more dimensions of at least `n`."""

    def __init__(self, n):
        super().__init__()
        self.n, self.hits = n, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t) and sum(d >= self.n for d in t.shape) >= 2:
                self.hits.append((str(func), tuple(t.shape)))
        return out


@pytest.mark.parametrize("window", [None, 16])
def test_no_square_of_tokens_is_made(window, tiny_llm):
    register()
    length = 200
    model = tiny_llm("mistral", sliding_window=window)
    ids = torch.arange(length)[None] % 50
    lengths = [120, 80]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model.set_attn_implementation("mmscale_packed")
    with LargeOutputs(min(lengths)) as mine:
        model(input_ids=ids, position_ids=positions, use_cache=False, pack=pack_of(lengths)).logits.sum().backward()
    model.set_attn_implementation("sdpa")
    with LargeOutputs(min(lengths)) as masked:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert mine.hits == []
    assert masked.hits, "negative control: Hugging Face's masked path builds a square"


@pytest.fixture
def tiny_llm():
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(kind, **extra):
        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(kind, **small, num_key_value_heads=1, vocab_size=50, **extra)
        return AutoModelForCausalLM.from_config(config)

    return build


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"softcap": 30.0}, r"soft-cap of attention scores \(softcap=30.0\)"),
        ({"dropout": 0.1}, "attention dropout 0.1"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "mask tensor"),
        ({"pack": None}, "no matching pack="),
        ({"pack": pack_of([2, 3])}, "no matching pack="),
        ({"pack": pack_of([2, 4], "torch_flash")}, "parallel.attention=torch_flash: .*runs on CUDA"),
        ({"pack": pack_of([2, 4], "fast")}, "parallel.attention=fast: expected an attention kernel in auto"),
    ],
)
def test_attention_refuses_what_it_does_not_compute(extra, found):
    x = torch.randn(1, 2, 6, 4)
    arguments = {"attention_mask": None, "pack": pack_of([2, 4]), **extra}
    with pytest.raises(ConfigError, match=found):
        packed_attention(torch.nn.Module().train(), x, x, x, **arguments)


def test_models_are_refused_by_name():
    from transformers import AutoConfig

    check_llm(AutoConfig.for_model("gpt_oss"))
    for kind, found in (("gemma2", "soft-cap"), ("gemma3_text", "mixes masks"), ("bert", "masks are not known")):
        with pytest.raises(ConfigError, match=found):
            check_llm(AutoConfig.for_model(kind))
    capped = AutoConfig.for_model("llama")
    capped.attn_logit_softcapping = 50.0
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping=50.0"):
        check_llm(capped)


def test_longrope_is_refused_where_a_pack_decides_its_frequencies(seed):
    """Hugging Face takes the frequencies by the largest position of the call: within the first set they are everyone's own."""
    from transformers import AutoConfig, AutoModel

    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, **factors}
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    config = AutoConfig.for_model("phi3", **sizes, pad_token_id=0, original_max_position_embeddings=16,
                                  max_position_embeddings=64, rope_parameters=rope)  # fmt: skip
    rotary, x, early = AutoModel.from_config(config).rotary_emb, torch.randn(1, 1, 16), torch.arange(8)
    alone, beside_short, beside_long = (
        rotary(x, torch.cat([early, torch.arange(n)])[None])[0][0, :8] for n in (0, 16, 17)
    )
    assert torch.equal(alone, beside_short) and not torch.equal(alone, beside_long)
    check_positions(config, 16)
    check_positions(AutoConfig.for_model("llama"), 1 << 20)
    with pytest.raises(ConfigError, match=r"longrope .* original_max_position_embeddings=16 .* data.seq_len=17"):
        check_positions(config, 17)


def test_autocast_makes_one_type(tiny_llm, seed):
    """Rotary embeddings in fp32 make queries and keys wider than the values; the kernel gets one type, as from torch's own."""
    torch.manual_seed(seed)
    register()
    model = tiny_llm("llama")
    ids, positions = torch.randint(0, 50, (1, 9)), torch.arange(9)[None]
    logits = {}
    for name in ("sdpa", "mmscale_packed"):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", torch.bfloat16):
            pack = {} if name == "sdpa" else {"pack": pack_of([9])}
            logits[name] = model(input_ids=ids, position_ids=positions, use_cache=False, **pack).logits.float()
    assert relative(logits["mmscale_packed"], logits["sdpa"]) < 1e-2


def test_gpt_oss_on_a_pack_equals_its_documents(seed):
    """Sinks, windows, experts: logits and every gradient, against Hugging Face's eager attention document by document."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    torch.manual_seed(seed)
    config = GptOssConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=50, num_local_experts=4, num_experts_per_tok=2, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    register()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="mmscale_packed")
    model.set_experts_implementation("eager")  # the default, a grouped product, has no float64
    model = model.double()
    lengths = [1, 13, 4, 30]
    ids = torch.randint(0, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    upstream = torch.randn(1, sum(lengths), 50, dtype=torch.float64)

    def run(*parts):
        model.zero_grad()
        outs = [model(input_ids=i, position_ids=p, use_cache=False, **pack).logits for i, p, pack in parts]
        torch.cat(outs, 1).backward(upstream)
        return torch.cat(outs, 1).detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    logits, grads = run((ids, positions, {"pack": pack_of(lengths)}))
    leaked, _ = run((ids, positions, {"pack": pack_of([sum(lengths)])}))
    model.set_attn_implementation("eager")
    whole, _ = run((ids, positions, {}))
    documents = zip(ids.split(lengths, 1), positions.split(lengths, 1), strict=True)
    exact, exact_grads = run(*((i, p, {}) for i, p in documents))
    tolerance = 1e-6  # parts of the model compute in fp32 in any case: norms and the softmax over experts
    assert relative(logits, exact) < tolerance
    for name, grad in exact_grads.items():
        assert ((grads[name] - grad).norm() / grad.norm()).item() < tolerance, name
    assert any("sinks" in n and g.any() for n, g in grads.items())
    assert relative(leaked, exact) > 1e-2, "negative control: one document"
    assert relative(whole, exact) > 1e-2, "GPT-OSS itself does not isolate documents"


def test_known_masks_pass_and_all_others_are_refused():
    documents = torch.zeros(1, 4)
    known = and_masks(packed_sequence_mask_function(documents), sliding_window_causal_mask_function(3))
    assert packed_mask(mask_function=known) is None
    assert packed_mask(mask_function=causal_mask_function) is None
    assert "causal_mask_function" in set(mask_parts(known))
    refused = [
        bidirectional_mask_function,
        or_masks(causal_mask_function, causal_mask_function),
        and_masks(causal_mask_function, lambda *_: True),
        chunked_causal_mask_function(2, torch.zeros(1)),
    ]
    for function in refused:
        with pytest.raises(ConfigError, match="mask is expected"):
            packed_mask(mask_function=function)
    for extra in ({"use_vmap": True}, {"attention_mask": torch.ones(1, 4)}):
        with pytest.raises(ConfigError, match="mask is expected"):
            packed_mask(mask_function=causal_mask_function, **extra)


def test_registering_twice_is_harmless(tiny_llm):
    register()
    register()
    model = tiny_llm("llama")
    model.set_attn_implementation("mmscale_packed")
    with pytest.raises(ConfigError, match="pack="):
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)
