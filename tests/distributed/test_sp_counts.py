"""What divided attention sends, and what it never does: bytes by formula, no metadata, no barrier, no sync, no square."""

import random
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mmscale.errors import ParallelError
from mmscale.model.llm.attention import WholePack
from mmscale.parallel.sp.attention import SequenceAttention, check_same_plan
from mmscale.parallel.sp.plan import make_plan, needed, padded_lengths
from mmscale.parallel.sp.volume import HeadShape, outer_bytes, ulysses_bytes

KINDS = ("exchange", "gather", "ring")
WIDTH = 8


class Operators(TorchDispatchMode):
    """Counts operators, and those whose result has two dimensions of at least `n`."""

    def __init__(self, n):
        super().__init__()
        self.n, self.names, self.squares = n, Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names[str(func).removesuffix(".default")] += 1
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(t) and sum(d >= self.n for d in t.shape) >= 2:
                self.squares.append((str(func), tuple(t.shape)))
        return out


def sent(meter):
    found = meter.num_bytes, meter.num_calls
    _, seconds = meter.take()
    return *found, seconds


def run_pass(pack, heads, kv_heads, dtype, window=None, square=10**9):
    """(operators of the forward pass, its meter), then the same of the backward pass."""
    n, meter = pack.num_tokens, pack.mesh.meter
    q, k, v = (torch.randn(n, h, WIDTH).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    with Operators(square) as forward:
        out = pack(q, k, v, scale=0.3, window=window, sinks=None)
    sent_forward = sent(meter)
    up = torch.randn(out.shape).to(dtype)
    with Operators(square) as backward:
        out.backward(up)
    return (forward, sent_forward), (backward, sent(meter))


def expected_bytes(spans, ring_rank, ulysses, kind, shape, window=None):
    """What a rank of outer rank `ring_rank` sends in one layer, by link."""
    sent, num_rows = {}, sum(end - start for _, start, end in spans[ring_rank])
    if ulysses > 1:
        sent["ulysses"] = ulysses_bytes(num_rows // ulysses, ulysses, shape)
    if len(spans) > 1:
        others = [rank for rank in range(len(spans)) if rank != ring_rank]
        out = back = len(others) * num_rows
        if kind == "exchange":
            out = sum(num_needed(spans, rank, ring_rank, window) for rank in others)
            back = sum(num_needed(spans, ring_rank, rank, window) for rank in others)
        sent[kind] = outer_bytes(out, back, kind, ulysses, shape)
    return sent


def num_needed(spans, dst, src, window):
    return sum(end - start for _, start, end in needed(spans, dst, src, window))


def count_cases(mesh, cases):
    from grids import grid

    found = []
    for ulysses, ring, kind, layout, lengths, heads, window, dtype in cases:
        m = grid(mesh, ulysses=ulysses, ring=ring)
        spans = make_plan(lengths, ring, layout, ulysses)
        pack = SequenceAttention(spans, lengths, m, kind)
        run_pass(pack, *heads, dtype, window)
        first = m.meter.take()
        (_, forward), (_, backward) = run_pass(pack, *heads, dtype, window)
        assert first[0] == {}, "taken"
        shape = HeadShape(*heads, WIDTH, torch.empty(0, dtype=dtype).element_size())
        expected = expected_bytes(spans, m.ring.rank, ulysses, kind, shape, window)
        found.append((forward, backward, {link: tuple(sizes) for link, sizes in expected.items()}))
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_counted_bytes_equal_the_formulas(world, ranks, seed):
    rng = random.Random(seed)
    cases = []
    for ulysses in (u for u in (1, 2, 4) if world % u == 0):
        for kind in KINDS:
            for window in (None, 6) if kind == "exchange" else (None,):
                lengths = padded_lengths((rng.randrange(1, 60), 1, rng.randrange(20, 90), 5, 30), world)
                heads = rng.choice([(8, 2), (8, 1), (4, 4)])
                dtype = rng.choice([torch.bfloat16, torch.float32, torch.float64])
                layout = rng.choice(["contiguous", "zigzag", "per_document", "planned"])
                cases.append((ulysses, world // ulysses, kind, layout, lengths, heads, window, dtype))
    for rank, found in enumerate(ranks(world).run(count_cases, cases)):
        for case, (forward, backward, expected) in zip(cases, found, strict=True):
            ulysses, ring, kind = case[:3]
            for i, (counted, calls, seconds) in enumerate((forward, backward)):
                assert counted == {link: sizes[i] for link, sizes in expected.items()}, (rank, case)
                outer = (ring - 1) * (1 + i) if kind == "ring" else 1
                assert calls == ({"ulysses": 2} if ulysses > 1 else {}) | ({kind: outer} if ring > 1 else {}), case
                assert seconds > 0, "the wait is visible"


def test_formulas_of_the_reference():
    """reference/sequence-parallel.md, section 1: T 512, H 8, G 2, D 16, fp32, forward and backward."""
    shape, lengths = HeadShape(8, 2, 16, 4), (512,)

    def total(ulysses, ring, kind):
        plan = make_plan(lengths, ring, "zigzag", ulysses)
        return sum(sum(s) for s in expected_bytes(plan, 0, ulysses, kind, shape).values())

    assert [total(u, 1, "gather") for u in (2, 4)] == [327_680, 294_912]
    assert [total(1, r, "gather") for r in (2, 4)] == [131_072, 196_608]
    # the reference's ring sends the gradients R times around; here they start at the neighbour
    assert [total(1, r, "ring") for r in (2, 4)] == [262_144 - 65_536, 327_680 - 32_768]


def scan(mesh, kind, ulysses):
    """Operators, squares and forbidden calls of one layer in its second pass over a pack."""
    from grids import grid

    m = grid(mesh, ulysses=ulysses, ring=4 // ulysses)
    lengths = (300, 212)
    pack = SequenceAttention(make_plan(lengths, 4 // ulysses, "per_document", ulysses), lengths, m, kind)
    run_pass(pack, 4, 2, torch.float32)
    refuse = mock.Mock(side_effect=AssertionError("metadata collective"))
    names = ("barrier", "all_gather_object", "broadcast_object_list", "all_reduce", "all_gather", "broadcast")
    with mock.patch.multiple(dist, **dict.fromkeys(names, refuse)):
        passes = run_pass(pack, 4, 2, torch.float32, square=pack.num_tokens)
    return [(dict(ops.names), ops.squares) for ops, _ in passes]


@pytest.mark.parametrize("kind", KINDS)
def test_attention_makes_no_metadata_collective_no_sync_and_no_square(kind, ranks):
    allowed = {
        "exchange": "alltoall_base_",
        "gather": ("_allgather_base_", "_reduce_scatter_base_"),
        "ring": ("send", "recv_"),
    }
    for ulysses in (1, 2, 4):
        for found in ranks(4).run(scan, kind, ulysses):
            for i, (names, squares) in enumerate(found):
                assert squares == []
                bad = [n for n in names if "local_scalar_dense" in n or "nonzero" in n or "unique" in n]
                assert bad == []
                calls = {n.removeprefix("c10d."): c for n, c in names.items() if n.startswith("c10d.")}
                expected = Counter({"alltoall_base_": 2} if ulysses > 1 else {})
                if ulysses < 4 and kind == "ring":
                    hops = (4 // ulysses - 1) * (1 + i)
                    expected.update({"send": hops, "recv_": hops})
                elif ulysses < 4:
                    expected.update([allowed[kind] if kind == "exchange" else allowed[kind][i]])
                assert calls == dict(expected), (kind, ulysses)


def test_the_scan_sees_a_square_and_a_sync():
    """Negative control."""
    x = torch.randn(64, 4, WIDTH)
    with Operators(64) as found:
        torch.einsum("qhd,khd->hqk", x, x).sum().item()
    assert found.squares and found.names["aten._local_scalar_dense"] == 1
    with Operators(64) as clean:
        WholePack((64,))(x, x, x, scale=1.0, window=None, sinks=None)
    assert clean.squares == []


def plans(mesh, odd_ranks):
    from grids import grid

    m = grid(mesh, tensor=2, ring=2)
    plan = make_plan((10, 6), 2, "zigzag")
    other = make_plan((10, 6), 2, "contiguous")
    check_same_plan(m, plan)
    try:
        check_same_plan(m, other if m.rank in odd_ranks else plan)
    except ParallelError as error:
        return str(error)
    return None


def test_ranks_that_disagree_are_named(ranks):
    for message in ranks(4).run(plans, [2]):
        assert "expected the plan of the pack to be the same on ranks [0, 1, 2, 3]" in message
        assert "than on rank 0 on ranks [2]" in message
    assert ranks(4).run(plans, []) == [None] * 4
