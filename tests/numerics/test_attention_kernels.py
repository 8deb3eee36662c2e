"""Every attention kernel that runs on this machine's CPU, against one softmax in float64; merging, sinks, choice, launches."""

import random
import sys
import types
from itertools import accumulate, pairwise
from typing import get_args

import pytest
import torch
from attention_cases import EXACT, HEADS, WINDOWS, errors, inputs, random_segments, reference, relative, visible

from mmscale.config.schema import ParallelConfig
from mmscale.kernels.attention import efficient, flash_attn, torch_flash, varlen
from mmscale.kernels.attention.attend import attend
from mmscale.kernels.attention.base import Segment, Segments
from mmscale.kernels.attention.cpu_aten import CpuAten
from mmscale.kernels.attention.efficient import Efficient
from mmscale.kernels.attention.math import Math
from mmscale.kernels.attention.merge import add_sinks, empty_result, merge_, sinks_grad
from mmscale.kernels.attention.select import KERNELS, backend, explain, usable
from mmscale.kernels.attention.torch_flash import TorchFlash
from mmscale.kernels.attention.varlen import VarlenBackend

CPU = torch.device("cpu")


class StandIn(VarlenBackend):
    """A varlen kernel with the freedoms that the real ones take: it writes NaN into rows that it has no business with."""

    name = "stand_in"

    def refuses(self, device, dtype, head_dim=None):
        return None

    def segments(self, q, k, launch):
        cu_q, cu_k = launch.cu_q.tolist(), launch.cu_k.tolist()
        assert (cu_q[0], cu_q[-1], cu_k[0], cu_k[-1]) == (0, len(q), 0, len(k))
        assert all(t.is_contiguous() and t.dtype == torch.int32 for t in (launch.cu_q, launch.cu_k))
        rows = [Segment(*r) for r in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False) if r[1] > r[0] and r[3] > r[2]]
        assert launch.max_q >= max(2, *(r.q_end - r.q_start for r in rows))
        assert launch.max_k >= max(r.k_end - r.k_start for r in rows)
        causal = launch.window_right == 0
        window = None if launch.window_left == -1 else launch.window_left + 1
        return Segments(tuple(rows), causal, window)

    def launch_forward(self, q, k, v, launch, scale):
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        segments = self.segments(q, k, launch)
        out, lse = Math().forward(q, k, v, segments, scale)
        for row in _gaps([(r.q_start, r.q_end) for r in segments.rows], len(q)):
            out[row], lse[:, row] = torch.nan, torch.inf
        return out, lse

    def launch_backward(self, dout, q, k, v, out, lse, launch, scale):
        assert lse.is_contiguous() and all(x.stride(-1) == 1 for x in (dout, q, k, v, out))
        segments = self.segments(q, k, launch)
        grads = Math().backward(dout, q, k, v, out, lse, segments, scale)
        queries, keys = ([(r[i], r[i + 1]) for r in _tuples(segments)] for i in (0, 2))
        for grad, used in zip(grads, (queries, keys, keys), strict=True):
            for row in _gaps(used, len(grad)):
                grad[row] = torch.nan
        return tuple(x.to(q.dtype) for x in grads)


def _tuples(segments):
    return [(r.q_start, r.q_end, r.k_start, r.k_end) for r in segments.rows]


def _gaps(used, size):
    at = 0
    for start, end in [*sorted(used), (size, size)]:
        if start > at:
            yield slice(at, start)
        at = max(at, end)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", usable(CPU, torch.float32))
def test_conformance(name, dtype, seed):
    conform(KERNELS[name](), dtype, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conformance_of_launches(dtype, seed):
    """Everything around a varlen kernel; no fp64, because the log-sum-exp of such kernels is fp32."""
    conform(StandIn(), dtype, seed)


def conform(kernel, dtype, seed):
    cases = [{"heads": h, "window": w} for h in HEADS for w in WINDOWS]
    cases += [{"heads": h, "causal": False} for h in HEADS] + [{"sinks": True, "window": w} for w in (None, 7)]
    for number, case in enumerate(cases):
        found = errors(kernel, dtype, CPU, seed + number, **case)
        assert max(found.values()) <= EXACT[dtype], (case, found)


CUT_UP = {
    "documents": (((30, 30), (1, 1), (64, 64), (5, 5)), True, None),
    "one document": (((90, 90),), True, None),
    "documents shorter than a window": (((30, 30), (1, 1), (64, 64)), True, 64),
    "documents longer than a window": (((30, 30), (1, 1), (64, 64)), True, 17),
    "other numbers of keys": (((30, 7), (1, 60), (9, 1)), False, None),
    "keys in front": (((30, 33), (1, 60), (9, 9)), True, None),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", usable(CPU, torch.float32))
@pytest.mark.parametrize("case", CUT_UP)
@pytest.mark.parametrize("order", ["keys in order", "keys in another order"])
def test_segments_without_gaps(name, case, order, dtype, seed):
    """A whole pack, which takes a way of its own: every row of queries and keys is in exactly one segment."""
    sizes, causal, window = CUT_UP[case]
    rng, places = random.Random(seed), list(range(len(sizes)))
    if order != "keys in order":
        places.reverse()
    k_starts = {n: sum(sizes[m][1] for m in places[: places.index(n)]) for n in places}
    rows = tuple(
        Segment(at, at + q, k_starts[n], k_starts[n] + k)
        for n, ((q, k), at) in enumerate(zip(sizes, accumulate((q for q, _ in sizes), initial=0), strict=False))
    )
    q, k, v, dout = inputs(rng, dtype, CPU, 8, 2, num_q=sum(s[0] for s in sizes), num_k=sum(s[1] for s in sizes))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    segments = Segments(rows, causal, window)
    out, (want, _) = attend(*leaves, segments, 0.3, KERNELS[name]()), reference(*exact, segments, 0.3)
    assert relative(out, want) <= EXACT[dtype]
    got, right = torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, exact, dout.double())
    assert max(relative(a, b) for a, b in zip(got, right, strict=True)) <= EXACT[dtype]


def test_a_leak_of_one_pair_is_seen(seed):
    """Negative control: one more visible key in one row is far outside the tolerance of fp32."""
    rng = random.Random(seed)
    q, k, v, _ = inputs(rng, torch.float32, CPU, 4, 4, num_q=40, num_k=40)
    right, wrong = (Segments((Segment(0, 40, 0, 40), ), True, window) for window in (7, 8))  # fmt: skip
    assert relative(Math().forward(q, k, v, wrong, 0.3)[0], reference(q, k, v, right, 0.3)[0]) > 1e-2
    one_query = Segments((Segment(0, 39, 0, 39), Segment(39, 40, 1, 40)), True)
    assert visible(one_query, 40, 40).sum() == visible(Segments((Segment(0, 40, 0, 40),), True), 40, 40).sum() - 1
    assert relative(CpuAten().forward(q, k, v, one_query, 0.3)[0][39:], reference(q, k, v, right, 0.3)[0][39:]) > 1e-5


def test_blocks_of_keys_merge_to_one_pass(seed):
    """Any cut of the keys, any order of the blocks; backward with the final log-sum-exp adds up."""
    rng = random.Random(seed)
    for kernel in (CpuAten(), Math()):
        q, k, v, dout = inputs(rng, torch.float64, CPU, 8, 2, num_q=60, num_k=97)
        whole = Segments((Segment(0, 60, 0, 97),), causal=False)
        cuts = [0, *sorted(rng.sample(range(1, 97), 5)), 97]
        blocks = [Segments((Segment(0, 60, a, b),), causal=False) for a, b in pairwise(cuts)]
        rng.shuffle(blocks)
        out, lse = empty_result(q)
        for block in blocks:
            merge_(out, lse, *kernel.forward(q, k, v, block, 0.3))
        want, want_lse = kernel.forward(q, k, v, whole, 0.3)
        assert relative(out, want) <= 1e-14 and relative(lse, want_lse) <= 1e-14
        parts = [kernel.backward(dout, q, k, v, out, lse, block, 0.3) for block in blocks]
        for got, exact in zip(
            map(sum, zip(*parts, strict=True)), kernel.backward(dout, q, k, v, want, want_lse, whole, 0.3), strict=True
        ):
            assert relative(got, exact) <= 1e-14


def test_merging_extreme_and_empty_rows():
    lses = torch.tensor([[-1e4, 1e4, 0.0, -torch.inf, -torch.inf, 5.0, 700.0]])
    part_lses = torch.tensor([[1e4, -1e4, 0.0, -torch.inf, 3.0, -torch.inf, -800.0]])
    out, part = torch.ones(7, 1, 2), torch.full((7, 1, 2), 3.0)
    out[3], part[3] = 0.0, 0.0
    merge_(out, lses, part, part_lses)
    assert out[:, 0, 0].tolist() == [3.0, 1.0, 2.0, 0.0, 3.0, 1.0, 1.0]
    assert lses[0].tolist() == pytest.approx([1e4, 1e4, 0.6931472, -torch.inf, 3.0, 5.0, 700.0])
    naive = torch.log1p(torch.exp(part_lses[0, 0] - torch.tensor(-1e4)))
    assert naive.isinf(), "negative control: log(1 + exp(difference)) overflows"


def test_sinks_on_any_kernel(seed):
    rng = random.Random(seed)
    q, k, v, dout = inputs(rng, torch.float64, CPU, 6, 2)
    segments = random_segments(rng, len(q), len(k), True)
    sinks = torch.tensor([-50.0, -2.0, 0.0, 1.0, 3.0, 50.0], dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want, want_lse = reference(*leaves, segments, 0.3, sinks)
    exact = torch.autograd.grad(want, [*leaves, sinks], dout)
    got = attend(*leaves, segments, 0.3, CpuAten(), sinks)
    for a, b in zip((got, *torch.autograd.grad(got, [*leaves, sinks], dout)), (want, *exact), strict=True):
        assert relative(a, b) <= 1e-12
    out, lse = add_sinks(*CpuAten().forward(q, k, v, segments, 0.3), sinks)
    assert relative(lse, want_lse) <= 1e-12
    plain, _ = CpuAten().forward(q, k, v, segments, 0.3)
    assert relative(sinks_grad(dout, plain, lse, sinks), exact[3]) > 1e-3, "negative control: the out without sinks"


def test_gradients_that_come_expanded(seed):
    """The gradient of a sum is one number with strides of 0."""
    rng = random.Random(seed)
    q, k, v, _ = inputs(rng, torch.float32, CPU, 4, 2)
    segments = random_segments(rng, len(q), len(k), True)
    for kernel in (CpuAten(), StandIn()):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attend(*leaves, segments, 0.3, kernel).sum().backward()
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        reference(*exact, segments, 0.3)[0].sum().backward()
        assert all(relative(a.grad, b.grad) <= 2e-6 for a, b in zip(leaves, exact, strict=True))


def test_launches_are_few(seed):
    """Documents need one launch, two spans of each document on a rank two; ring hops with skipped rows one."""
    documents = Segments(tuple(Segment(i * 9, i * 9 + 9, i * 9, i * 9 + 9) for i in range(50)), True)
    assert len(varlen.launches(documents, CPU)) == 1
    (only,) = varlen.launches(documents, CPU)
    assert only.unused_q is None and only.unused_k is None and (only.max_q, only.max_k) == (9, 9)
    spans = [(Segment(i * 8, i * 8 + 4, i * 20, i * 20 + 7), Segment(i * 8 + 4, i * 8 + 8, i * 20, i * 20 + 20)) for i in range(9)]  # fmt: skip
    assert len(varlen.launches(Segments(tuple(s for pair in spans for s in pair), True), CPU)) == 2
    hop = Segments((Segment(3, 5, 0, 9), Segment(7, 9, 12, 20)), causal=False)
    (only,) = varlen.launches(hop, CPU)
    assert only.cu_q.tolist() == [0, 2, 4, 4, 6] and only.cu_k.tolist() == [0, 9, 9, 12, 20]
    assert only.unused_q.tolist() == [False] * 2 + [True] * 2 + [False] * 2
    assert varlen.launches(hop, CPU) is varlen.launches(Segments(hop.rows, False), CPU), "kept by content"
    rng = random.Random(seed)
    for _ in range(30):
        segments = random_segments(rng, 200, 90, causal=False)
        groups = varlen.group_by_keys(segments.rows)
        assert sorted((r for g in groups for r in g), key=lambda r: r.q_start) == list(segments.rows)
        assert all(a.k_end <= b.k_start for g in groups for a, b in pairwise(g))


OF_TORCH_2_11 = {
    "_flash_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> "
    "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, "
    "Tensor unused, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None) -> "
    "(Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("name", OF_TORCH_2_11)
def test_calls_of_flash_attention_fit_old_and_new_signatures(name, monkeypatch):
    operator, seen = getattr(torch.ops.aten, name).default, {}
    short = name.removeprefix("_flash_attention")
    monkeypatch.setattr(torch_flash, short, lambda **given: (seen.update(given), operator(**given))[1])
    kernel, x = TorchFlash(), torch.empty(20, 4, 16, device="meta", dtype=torch.bfloat16)
    segments = Segments((Segment(2, 12, 0, 15), Segment(12, 20, 5, 20)), True, 4)
    kernel.backward(x, x, x[:, :2], x[:, :2], *kernel.forward(x, x[:, :2], x[:, :2], segments, 0.2), segments, 0.2)
    for schema in (operator._schema, torch._C.parse_schema(f"aten::{name}{OF_TORCH_2_11[name]}")):
        known = {a.name: a for a in schema.arguments}
        assert set(seen) <= set(known)
        assert {n for n, a in known.items() if not a.has_default_value()} <= set(seen)
    assert (seen["window_size_left"], seen["window_size_right"], seen["is_causal"]) == (3, 0, True)


def fitting(operator, result):
    """A stand-in for a torch operator that checks the names of its arguments."""

    def call(**given):
        known = {a.name: a for a in operator._schema.arguments}
        assert set(given) <= set(known)
        assert {n for n, a in known.items() if not a.has_default_value()} <= set(given)
        return result(given)

    return call


@pytest.mark.parametrize(("kernel", "dtype"), [(TorchFlash(), torch.bfloat16), (Efficient(), torch.float32)])
def test_cuda_kernels_give_the_shapes_of_the_contract(kernel, dtype, monkeypatch, seed):
    """Without a GPU: torch checks the calls on tensors without data (its check of one operator is broken in 2.13)."""
    like_inputs = fitting(
        efficient._backward, lambda a: (*(torch.empty_like(a[n]) for n in ("query", "key", "value")), None)
    )
    monkeypatch.setattr(efficient, "_backward", like_inputs)
    rng = random.Random(seed)
    q, k, v, dout = inputs(rng, dtype, "meta", 8, 2)
    for causal, window in ((True, None), (True, 7), (False, None)):
        segments = random_segments(rng, len(q), len(k), causal, window)
        out, lse = kernel.forward(q, k, v, segments, 0.3)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (8, len(q)), torch.float32)
        grads = kernel.backward(dout, q, k, v, out, lse, segments, 0.3)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
        assert {x.dtype for x in grads} <= {dtype, torch.float32}


def test_efficient_attention_around_its_operators(monkeypatch, seed):
    """Heads, padded log-sum-exps, masks: with stand-ins that compute what torch's kernels say they do."""

    def segments(query, key, given):
        window = given["window_size"]
        return Segments((Segment(0, len(query), 0, len(key)),), given["custom_mask_type"] == 2, window)

    def forward(given):
        q, k, v = (given[n][0] for n in ("query", "key", "value"))
        assert q.shape[1] == k.shape[1]
        out, lse = Math().forward(q, k, v, segments(q, k, given), given["scale"])
        padded = torch.full((1, lse.shape[0], (len(q) + 31) // 32 * 32), torch.nan)
        padded[0, :, : len(q)] = lse
        return out[None], padded, None, None, None, None

    def backward(given):
        dout, q, k, v, out = (given[n][0] for n in ("grad_out_", "query", "key", "value", "out"))
        lse = given["logsumexp"]
        assert lse.is_contiguous() and lse.shape[2] % 32 == 0 and (lse[..., len(q) :] == torch.inf).all()
        grads = Math().backward(dout, q, k, v, out, lse[0, :, : len(q)], segments(q, k, given), given["scale"])
        return (*(x[None] for x in grads), None)

    monkeypatch.setattr(efficient, "_forward", fitting(efficient._forward, forward))
    monkeypatch.setattr(efficient, "_backward", fitting(efficient._backward, backward))
    for number, case in enumerate(({}, {"window": 7}, {"causal": False}, {"heads": (6, 1), "sinks": True})):
        found = errors(Efficient(), torch.float32, CPU, seed + number, **case)
        assert max(found.values()) <= EXACT[torch.float32], (case, found)


@pytest.fixture
def package(monkeypatch):
    """A stand-in of the flash-attn package with the signatures of its versions 2.7 and 2.8."""
    made = types.ModuleType("flash_attn.flash_attn_interface")

    def varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        launch = _Borders(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right)
        assert causal == (window_size_right == 0) and dropout_p == 0.0
        return (*StandIn().launch_forward(q, k, v, launch, softmax_scale), None, None)[: made.num_results]

    def varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (softcap, alibi_slopes, deterministic) == (0.0, None, False)
        launch = _Borders(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size_left, window_size_right)
        grads = StandIn().launch_backward(dout, q, k, v, out, softmax_lse, launch, softmax_scale)
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place.copy_(grad)

    made.num_results = 4
    made._flash_attn_varlen_forward, made._flash_attn_varlen_backward = varlen_forward, varlen_backward
    top = types.ModuleType("flash_attn")
    top.flash_attn_interface = made
    monkeypatch.setitem(sys.modules, "flash_attn", top)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", made)
    flash_attn._package.cache_clear()
    yield made
    flash_attn._package.cache_clear()


class _Borders(types.SimpleNamespace):
    def __init__(self, cu_q, cu_k, max_q, max_k, left, right):
        super().__init__(cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k, window_left=left, window_right=right)


def test_calls_of_the_flash_attn_package_fit_its_signatures(package, seed, monkeypatch):
    for number, case in enumerate(({}, {"window": 7}, {"causal": False}, {"heads": (6, 1), "sinks": True})):
        found = errors(flash_attn.FlashAttn(), torch.float32, CPU, seed + number, **case)
        assert max(found.values()) <= EXACT[torch.float32], (case, found)
    package.num_results = 3
    monkeypatch.setattr(flash_attn, "version", lambda _: "1.0")
    with pytest.raises(RuntimeError, match=r"expected 4 results .* found 3 from version 1\.0"):
        errors(flash_attn.FlashAttn(), torch.float32, CPU, seed)


def test_selection(monkeypatch):
    assert backend("auto", CPU, torch.float32).name == "cpu_aten"
    assert backend("auto", CPU, torch.float32) is backend("auto", CPU, torch.float32), "no work per call"
    assert backend("math", CPU, torch.bfloat16).name == "math"
    assert explain("auto", CPU, torch.float32) == "attention kernel cpu_aten for cpu and torch.float32, chosen by auto"
    assert explain("math", CPU, torch.float32).endswith("as configured")
    with pytest.raises(ValueError, match=r"in auto, cpu_aten, torch_flash, flash_attn, efficient, math, found 'fast'"):
        backend("fast", CPU, torch.float32)
    for name, reason in (
        ("torch_flash", "runs on CUDA"),
        ("efficient", "runs on CUDA"),
        ("flash_attn", "flash_attn: "),
    ):
        with pytest.raises(ValueError, match=reason):
            backend(name, CPU, torch.float32)


def test_auto_on_a_gpu(monkeypatch):
    """The order on CUDA, without a GPU: only the question for its age is answered by hand."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cuda = torch.device("cuda")
    backend.cache_clear()
    assert backend("auto", cuda, torch.bfloat16, 128).name == "torch_flash"
    assert backend("auto", cuda, torch.float32).name == "efficient"
    assert backend("auto", cuda, torch.float64).name == "math"
    line = explain("auto", cuda, torch.float32, 20)
    assert (
        line.startswith("attention kernel efficient for cuda") and "torch_flash: it computes in bf16 and fp16" in line
    )
    with pytest.raises(
        ValueError, match=r"torch_flash: .*multiples of 8, the model has 20; efficient: .*multiples of 8"
    ):
        backend("auto", cuda, torch.bfloat16, 20)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 is older"):
        backend("torch_flash", cuda, torch.float16)
    backend.cache_clear()


def test_the_configuration_names_the_same_kernels():
    names = get_args(ParallelConfig.model_fields["attention"].annotation)
    assert set(names) == {"auto", *KERNELS}
