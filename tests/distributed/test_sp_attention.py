"""Attention over a divided pack equals attention in one process: all kinds, degrees, layouts, heads, windows and sinks.

The reference is float64 softmax attention with an explicit mask. Errors are relative L2 norms over all ranks together.
"""

import itertools
import random
from collections import Counter
from functools import lru_cache
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mmscale.model.llm.attention import WholePack
from mmscale.parallel.sp.plan import local_index, make_plan, padded_lengths, validate

KINDS = ("exchange", "gather", "ring")
LAYOUTS = ("contiguous", "zigzag", "per_document", "planned", "chunks")
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6}
NAMES = ("out", "dq", "dk", "dv", "dsinks")


def random_lengths(rng, tokens):
    """Documents of 1 token and up, together `tokens`; now and then one document alone."""
    if rng.random() < 0.2:
        return (tokens,)
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(min(rng.choice([1, 1, 3, 7, 17, 40, 100]), tokens - sum(lengths)))
    return tuple(lengths)


def chunk_plan(rng, lengths, ranks, multiple):
    """Pieces of the pack of a few tokens, dealt at random: what no layout would give."""
    size = sum(lengths) // ranks
    cut = sorted({*rng.sample(range(1, sum(lengths)), min(4 * ranks, sum(lengths) - 1)), 0, sum(lengths)})
    pieces = list(itertools.pairwise(cut))
    rng.shuffle(pieces)
    tokens = [t for a, b in pieces for t in range(a, b)]
    where = [(d, p) for d, n in enumerate(lengths) for p in range(n)]
    plan = []
    for rank in range(ranks):
        spans = []
        for doc, position in sorted(where[t] for t in tokens[rank * size : (rank + 1) * size]):
            if spans and spans[-1][0] == doc and spans[-1][2] == position:
                spans[-1] = (doc, spans[-1][1], position + 1)
            else:
                spans.append((doc, position, position + 1))
        plan.append(tuple(spans))
    validate(tuple(plan), lengths)
    return tuple(plan)


def spans_of(layout, lengths, ring, ulysses, seed):
    if layout == "chunks" and ring > 1:
        return chunk_plan(random.Random(seed), lengths, ring, ulysses)
    return make_plan(lengths, ring, "contiguous" if layout == "chunks" else layout, ulysses)


def tensors(seed, num_tokens, heads, kv_heads, width=8):
    """q, k, v, upstream gradient and sinks, float64, the same on every rank."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v, up = (make(num_tokens, h, width) for h in (heads, kv_heads, kv_heads, heads))
    return q, k, v, up, make(heads)


@lru_cache(maxsize=8)
def exact(seed, lengths, heads, kv_heads, window, with_sinks):
    """out, dq, dk, dv, dsinks in float64."""
    q, k, v, up, sinks = tensors(seed, sum(lengths), heads, kv_heads)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    t = torch.arange(sum(lengths))
    seen = (document[:, None] == document[None]) & (t[None] <= t[:, None])
    if window is not None:
        seen &= t[None] > t[:, None] - window
    scores = (torch.einsum("qhd,khd->hqk", q, k) * 0.3).masked_fill(~seen, -torch.inf)
    if with_sinks:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(t), 1)], -1)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(t)], v)
    grads = torch.autograd.grad(out, leaves, up, allow_unused=True)
    return [out.detach(), *grads]


def run_case(mesh, case, dtype, seed, index_of=local_index):
    """This rank's out, dq, dk, dv, dsinks of one case, and the reference of the same rows."""
    from grids import grid

    from mmscale.parallel.sp.attention import SequenceAttention

    ulysses, ring, kind, layout, lengths, (heads, kv_heads), window, with_sinks = case
    m = grid(mesh, ulysses=ulysses, ring=ring)
    lengths = padded_lengths(lengths, ulysses * ring)
    spans = spans_of(layout, lengths, ring, ulysses, seed)
    index = torch.from_numpy(index_of(spans, lengths, m.ring.rank, m.ulysses.rank, ulysses))
    pack = SequenceAttention(spans, lengths, m, kind)
    assert pack.num_tokens == len(index)
    q, k, v, up, sinks = (x.to(dtype) for x in tensors(seed, sum(lengths), heads, kv_heads))
    local = [x[index].requires_grad_() for x in (q, k, v)] + ([sinks.requires_grad_()] if with_sinks else [])
    out = pack(*local[:3], scale=0.3, window=window, sinks=sinks if with_sinks else None)
    grads = torch.autograd.grad(out, local, up[index])
    true = exact(seed, lengths, heads, kv_heads, window, with_sinks)
    rows = [x[index] for x in true[:4]] + ([true[4]] if with_sinks else [])
    return [out.detach(), *grads], rows


def errors_of_cases(mesh, cases, dtype, seed):
    """For every case and result: (squared error, squared norm) of this rank's rows; sinks as they are, to be summed."""
    found = []
    for case in cases:
        mine, true = run_case(mesh, case, dtype, seed)
        sums = [
            ((a.double() - b).square().sum().item(), b.square().sum().item()) for a, b in zip(mine, true, strict=True)
        ]
        found.append((sums[:4], [x.tolist() for x in (mine[4].double(), true[4])] if len(mine) > 4 else None))
    return found


def relative_errors(by_rank):
    """{result: relative error} of one case from what the ranks found; the gradient of the sinks is the sum over ranks."""
    found = {}
    for i, name in enumerate(NAMES[:4]):
        error, norm = (sum(sums[i][j] for sums, _ in by_rank) for j in (0, 1))
        found[name] = (error / max(norm, 1.0)) ** 0.5  # a window of one key has dq = dk = 0
    if by_rank[0][1] is not None:
        total = torch.tensor([mine for _, (mine, _) in by_rank], dtype=torch.float64).sum(0)
        true = torch.tensor(by_rank[0][1][1], dtype=torch.float64)
        found["dsinks"] = ((total - true).norm() / true.norm().clamp_min(1.0)).item()
    return found


def cases_for(world, seed):
    """Every (U, R, kind, layout) over `world` ranks, the other options in turn from a random start."""
    rng = random.Random(seed)
    tokens = rng.randrange(90, 140)
    packs = [random_lengths(rng, tokens) for _ in range(2)] + [(tokens,), (1,) * 5 + (tokens - 6, 1)]
    heads = ((8, 2), (8, 1), (4, 4), (8, 8))
    windows = (None, 7, None, 1, None, 1000)
    found, count = [], rng.randrange(100)
    for ulysses in (u for u in (1, 2, 4, 8) if world % u == 0):
        ring = world // ulysses
        options = itertools.product(KINDS, LAYOUTS) if ring > 1 else [("exchange", "contiguous")] * 6
        for kind, layout in options:
            count += 1
            legal = [h for h in heads if h[0] % ulysses == 0]
            window = None if kind == "ring" else windows[count % len(windows)]
            pack = packs[count % len(packs)]
            found.append((ulysses, ring, kind, layout, pack, legal[count % len(legal)], window, count % 3 == 0))
    return found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_kind_and_degree_equals_one_process(world, ranks, seed):
    cases = cases_for(world, seed)
    for dtype in (torch.float64, torch.float32):
        by_rank = ranks(world).run(errors_of_cases, cases, dtype, seed)
        for i, case in enumerate(cases):
            for name, error in relative_errors([found[i] for found in by_rank]).items():
                assert error < LIMIT[dtype], f"{name} {error:.2e} of {case} in {dtype}"


def vila_index(spans, lengths, ring_rank, ulysses_rank, ulysses):
    """The rows of VILA's hybrid for U = 2: each rank is dealt two zigzag chunks of its own half before the all-to-all."""
    ring, chunk = len(spans), sum(lengths) // (2 * ulysses * len(spans))
    first = 2 * ring * ulysses_rank
    chunks = (ring_rank + first, ulysses * ring - ring_rank - 1 + first)
    return np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in chunks])


def errors_with_rows_of_vila(mesh, case, seed):
    mine, true = run_case(mesh, case, torch.float64, seed, vila_index)
    return [((a - b).square().sum().item(), b.square().sum().item()) for a, b in zip(mine, true, strict=True)], None


def test_a_wrong_hybrid_layout_is_found(ranks, seed):
    """Negative control: the order of ring and Ulysses layout exchanged."""
    for kind in KINDS:
        case = (2, 2, kind, "zigzag", (96,), (4, 4), None, False)
        errors = relative_errors(ranks(4).run(errors_with_rows_of_vila, case, seed))
        assert min(errors.values()) > 1e-2, errors


def bf16_errors(mesh, cases, seed):
    """For every case the errors of the divided pack, and those of one rank with the whole pack, both in bf16."""
    divided = errors_of_cases(mesh, cases, torch.bfloat16, seed)
    whole = []
    for case in cases:
        lengths = padded_lengths(case[4], case[0] * case[1])
        q, k, v, up, _ = (x.bfloat16() for x in tensors(seed, sum(lengths), *case[5]))
        local = [x.requires_grad_() for x in (q, k, v)]
        out = WholePack(lengths)(*local, scale=0.3, window=case[6], sinks=None)
        true = exact(seed, lengths, *case[5], case[6], False)
        mine = [out.detach(), *torch.autograd.grad(out, local, up)]
        whole.append(
            {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in zip(NAMES, mine, true, strict=False)}
        )
    return divided, whole


@pytest.mark.parametrize("world", [4, 8])
def test_bf16_is_as_exact_as_one_rank(world, ranks, seed):
    rng = random.Random(seed)
    lengths = (*random_lengths(rng, 200), 312)
    grids = [(u, world // u) for u in (1, 2, world)]
    cases = [
        (u, r, kind, "per_document", lengths, (8, 2), None, False)
        for u, r in grids
        for kind in (KINDS if r > 1 else KINDS[:1])
    ]
    by_rank = ranks(world).run(bf16_errors, cases, seed)
    for i, case in enumerate(cases):
        whole = by_rank[0][1][i]
        for name, error in relative_errors([divided[i] for divided, _ in by_rank]).items():
            assert error <= 1.15 * whole[name], f"{name} {error:.2e}, one rank {whole[name]:.2e}, {case}"


def isolation(mesh, cases, seed):
    """For every case: (rows of other documents whose results changed, rows of the changed document that did not)."""
    from grids import grid

    from mmscale.parallel.sp.attention import SequenceAttention

    found = []
    for ulysses, ring, kind, layout, lengths, changed in cases:
        m = grid(mesh, ulysses=ulysses, ring=ring)
        spans = make_plan(lengths, ring, layout, ulysses)
        index = torch.from_numpy(local_index(spans, lengths, m.ring.rank, m.ulysses.rank, ulysses))
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[index]
        pack = SequenceAttention(spans, lengths, m, kind)
        results = []
        for salt in (0, 1):
            here = (document == changed)[:, None, None]
            base, other = (tensors(seed + s, sum(lengths), 8, 2)[:4] for s in (0, salt))
            q, k, v, up = (torch.where(here, b[index], a[index]).float() for a, b in zip(base, other, strict=True))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = pack(*leaves, scale=0.3, window=None, sinks=None)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, up)])
        moved = [(a != b).flatten(1).any(1) for a, b in zip(*results, strict=True)]
        leaks = sum(int((x & (document != changed)).sum()) for x in moved)
        found.append((leaks, int((~moved[0] & (document == changed)).sum()), int((document == changed).sum())))
    return found


def test_other_documents_are_bit_identical_when_one_changes(ranks, seed):
    rng = random.Random(seed)
    lengths = padded_lengths((30, 1, *random_lengths(rng, 61), 40, 3), 4)
    cases = [
        (u, 4 // u, kind, rng.choice(LAYOUTS[:4]), lengths, rng.choice([0, len(lengths) - 2, 1]))
        for u in (1, 2, 4)
        for kind in KINDS
    ]
    by_rank = ranks(4).run(isolation, cases, seed)
    for i, case in enumerate(cases):
        leaks, unchanged, rows = (sum(found[i][j] for found in by_rank) for j in range(3))
        assert leaks == 0, case
        assert unchanged == 0 and rows == lengths[case[5]], "negative control: the changed document did change"


def checkpointed(mesh, cases, seed):
    """For every case whether results and gradients are bit-identical when the pass is computed again in the backward pass."""
    from grids import grid

    from mmscale.parallel.sp.attention import SequenceAttention

    found = []
    for ulysses, kind, reentrant in cases:
        m, lengths = grid(mesh, ulysses=ulysses, ring=4 // ulysses), (50, 13, 1)
        spans = make_plan(lengths, 4 // ulysses, "planned", ulysses)
        index = torch.from_numpy(local_index(spans, lengths, m.ring.rank, m.ulysses.rank, ulysses))
        pack = SequenceAttention(spans, lengths, m, kind)
        q, k, v, up, sinks = (x.float() for x in tensors(seed, sum(lengths), 8, 2))
        leaves = [x.requires_grad_() for x in (q[index], k[index], v[index], sinks)]

        def layer(q, k, v, sinks, pack=pack):
            return pack(q, k, v, scale=0.3, window=None, sinks=sinks)

        plain = layer(*leaves)
        again = checkpoint(layer, *leaves, use_reentrant=reentrant)
        grads = [torch.autograd.grad(plain, leaves, up[index])]
        again.backward(up[index])
        found.append(torch.equal(plain, again) and all(map(torch.equal, grads[0], [x.grad for x in leaves])))
    return found


def test_activation_checkpointing_changes_nothing(ranks, seed):
    cases = list(itertools.product((1, 2, 4), KINDS, (False, True)))
    for found in ranks(4).run(checkpointed, cases, seed):
        assert all(found), [case for case, same in zip(cases, found, strict=True) if not same]


class Recorder:
    """A kernel that writes down which query meets which key; inputs hold their position in the pack."""

    name = "recorder"

    def __init__(self):
        self.pairs = Counter()

    def forward(self, q_QHD, k_KGD, v_KGD, segments, scale):
        at_q, at_k = (x[:, 0, 0].long().tolist() for x in (q_QHD, k_KGD))
        for row in segments.rows:
            shift = (row.k_end - row.k_start) - (row.q_end - row.q_start)
            for i in range(row.q_end - row.q_start):
                keys = range(row.k_start, row.k_start + i + shift + 1 if segments.causal else row.k_end)
                if segments.window is not None:
                    keys = keys[-segments.window :]
                self.pairs.update((at_q[row.q_start + i], at_k[key]) for key in keys)
        return q_QHD, torch.zeros(q_QHD.shape[1], q_QHD.shape[0], dtype=q_QHD.dtype)


def pairs_of_cases(mesh, cases, seed):
    from grids import grid

    from mmscale.parallel.sp import attention

    found = []
    for ulysses, ring, kind, layout, lengths, window in cases:
        m = grid(mesh, ulysses=ulysses, ring=ring)
        spans = spans_of(layout, lengths, ring, ulysses, seed)
        index = torch.from_numpy(local_index(spans, lengths, m.ring.rank, m.ulysses.rank, ulysses))
        at = index.double()[:, None, None].expand(-1, 8, 2)
        recorder = Recorder()
        stand_ins = {
            "attention_kernel": lambda *_, kernel=recorder: kernel,
            "attend": lambda q, k, v, segments, scale, kernel, _: kernel.forward(q, k, v, segments, scale)[0],
        }
        with mock.patch.multiple(attention, **stand_ins), torch.no_grad():
            pack = attention.SequenceAttention(spans, lengths, m, kind)
            out = pack(at, at, at, scale=1, window=window, sinks=None)
        assert torch.equal(out, at), "rows and heads come back where they were"
        found.append((m.ulysses.rank, dict(recorder.pairs)))
    return found


def test_every_legal_pair_meets_once(ranks, seed):
    rng = random.Random(seed)
    cases = []
    for ulysses, kind, layout in itertools.product((1, 2, 4), KINDS, LAYOUTS):
        lengths = padded_lengths(random_lengths(rng, rng.randrange(20, 60)), 4)
        cases.append(
            (ulysses, 4 // ulysses, kind, layout, lengths, None if kind == "ring" else rng.choice([None, 1, 5]))
        )
    by_rank = ranks(4).run(pairs_of_cases, cases, seed)
    for i, (ulysses, _, _, _, lengths, window) in enumerate(cases):
        starts = [sum(lengths[:d]) for d in range(len(lengths))]
        legal = Counter(
            (first + q, first + k)
            for first, n in zip(starts, lengths, strict=True)
            for q in range(n)
            for k in range(0 if window is None else max(0, q - window + 1), q + 1)
        )
        for heads in range(ulysses):
            met = Counter()
            for rank, pairs in (found[i] for found in by_rank):
                met.update(pairs if rank == heads else {})
            assert met == legal, cases[i]
