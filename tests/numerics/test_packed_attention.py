"""Packed attention against float64 mathematics per document: outputs and gradients, windows, head groups, memory."""

import inspect

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
from mmscale.model.llm.attention import PackInfo, mask_parts, packed_attention, packed_mask, register


def pack_of(lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return PackInfo(tuple(lengths), cu, max(lengths))


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
    "extra",
    [
        {"softcap": 30.0},
        {"s_aux": torch.zeros(2)},
        {"dropout": 0.1},
        {"attention_mask": torch.ones(1, 1, 6, 6)},
        {"pack": None},
        {"pack": pack_of([2, 3])},
    ],
)
def test_attention_refuses_what_it_does_not_compute(extra):
    x = torch.randn(1, 2, 6, 4)
    arguments = {"attention_mask": None, "pack": pack_of([2, 4]), **extra}
    with pytest.raises(ConfigError, match="plain causal attention"):
        packed_attention(torch.nn.Module().train(), x, x, x, **arguments)


@pytest.mark.parametrize("window", [None, 1, 7])
def test_the_call_of_the_cuda_kernel_fits_its_signature_and_meaning(window, monkeypatch, seed):
    """The kernel itself needs a GPU; a stand-in with torch's own signature computes what its documentation says."""
    from torch.nn.attention import varlen

    from mmscale.model.llm import attention

    signature = inspect.signature(varlen.varlen_attn)
    lengths = [5, 1, 20]

    def stand_in(*args, **kwargs):
        a = signature.bind(*args, **kwargs).arguments
        assert a["query"].is_contiguous() and a["cu_seq_q"].dtype == torch.int32
        assert a["max_q"] == a["max_k"] == 20 and a["enable_gqa"]
        left, right = a["window_size"]
        assert right == 0
        q, k, v = (a[n].transpose(0, 1)[None] for n in ("query", "key", "value"))
        return reference(q, k, v, a["cu_seq_q"].diff().tolist(), None if left == -1 else left + 1, a["scale"])[0]

    stand_in.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, 26, 8, generator=g)
    k, v = (torch.randn(1, 2, 26, 8, generator=g) for _ in "kv")
    got = attention._varlen(q, k, v, pack_of(lengths), 0.2, window)
    assert relative(got, reference(q, k, v, lengths, window, 0.2)) < 1e-12


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
