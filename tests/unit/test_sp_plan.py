"""Sequence-parallel plans: every token once, equal parts, every legal (query, key) pair once, even attention, few keys sent."""

import hashlib
import math
import random

import numpy as np
import pytest

from mmscale.errors import ParallelError
from mmscale.parallel.sp.measures import attention_cost, balance, kv_tokens, kv_traffic
from mmscale.parallel.sp.plan import local_index, make_plan, needed, padded_lengths, rank_index, validate

LAYOUTS = ("contiguous", "zigzag", "per_document", "planned")


def random_pack(r, most):
    """Document lengths of up to `most` tokens in all: of one kind or of all, often of 1 token, at times one alone."""
    kinds = [lambda: 1, lambda: r.randint(1, 9), lambda: r.randint(1, most), lambda: int(most ** r.random())]
    pick = r.choice([*kinds, lambda: r.choice(kinds)()])
    lengths, left = [], r.randint(1, most)
    while left:
        lengths.append(min(left, pick()))
        left -= lengths[-1]
    r.shuffle(lengths)
    return tuple(lengths)


def most_spans(plan):
    """The most spans of one document on one rank."""
    return max((sum(s[0] == d for s in own) for own in plan for d in {s[0] for s in own}), default=0)


def test_plans_hold_every_token_once_in_equal_parts(seed):
    r = random.Random(seed)
    for _ in range(500):
        pack = random_pack(r, r.choice([10, 40, 160]))
        for ranks in (1, 2, 4, 8, 16):
            ulysses = r.choice([1, 1, 1, 2, 3])
            lengths = padded_lengths(pack, ranks * ulysses)
            total = sum(lengths)
            assert lengths[: len(pack)] == pack and 0 <= total - sum(pack) < ranks * ulysses
            for layout in LAYOUTS:
                plan = make_plan(lengths, ranks, layout, ulysses)
                validate(plan, lengths)
                assert {sum(e - s for _, s, e in own) for own in plan} == {total // ranks}
                parts = [local_index(plan, lengths, o, u, ulysses) for o in range(ranks) for u in range(ulysses)]
                held = np.concatenate(parts)
                assert {len(part) for part in parts} == {total // (ranks * ulysses)}
                assert np.array_equal(np.sort(held), np.arange(total))
                if layout == "planned" and most_spans(plan) > 2:
                    assert total < 64 * ranks, "two spans of a document on a rank are enough unless parts are tiny"


def coverage(spans, lengths, held, window=None):
    """(illegal, missing, repeated) pairs, when each outer rank holds the positions `held[rank]` and the plan says `spans`.

    A rank works from the plan alone: which keys it needs of whom, and which of its rows may see which. Pairs are counted at
    the positions where the rows really come from.
    """
    total = sum(lengths)
    doc = np.repeat(np.arange(len(lengths)), lengths)
    at = np.concatenate([np.arange(n) for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    reach = np.inf if window is None else window
    computed = np.zeros((total, total), int)
    planned = [rank_index(spans, lengths, rank) for rank in range(len(spans))]
    for dst, queries in enumerate(planned):
        for src, keys in enumerate(planned):
            sent = [np.arange(starts[d] + s, starts[d] + e) for d, s, e in needed(spans, dst, src, window)]
            sent = np.concatenate([np.zeros(0, int), *sent])
            place = np.searchsorted(keys, sent, sorter=np.argsort(keys))
            assert np.isin(sent, keys).all(), "only what a rank holds is asked of it"
            place = np.argsort(keys)[place]
            sees = (doc[queries][:, None] == doc[sent]) & (at[queries][:, None] >= at[sent])
            sees &= at[queries][:, None] - at[sent] < reach
            assert sees.any(0).all(), "no key is sent that no query sees"
            np.add.at(computed, (held[dst][:, None], held[src][place][None]), sees)
    legal = (doc[:, None] == doc) & (at[:, None] >= at) & (at[:, None] - at < reach)
    return int((computed[~legal] > 0).sum()), int((computed[legal] == 0).sum()), int((computed > 1).sum())


def test_every_legal_pair_is_computed_once(seed):
    r = random.Random(seed)
    for case in range(600):
        lengths = padded_lengths(random_pack(r, 48), ranks := r.choice([2, 2, 3, 4, 8]))
        plan = make_plan(lengths, ranks, LAYOUTS[case % 4])
        held = [rank_index(plan, lengths, rank) for rank in range(ranks)]
        assert coverage(plan, lengths, held, r.choice([None, None, 1, 3, 7, 100])) == (0, 0, 0)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (2, 4)])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_wrong_order_of_ulysses_and_zigzag_fails_the_coverage(ulysses, ring, chunk):
    """As in VILA: zigzag chunks are dealt to all ranks first, so the gathered rows of a ring rank are not those of its plan."""
    size = ulysses * ring
    lengths = (2 * size * chunk,)
    plan = make_plan(lengths, ring, "zigzag", ulysses)
    right = [
        np.concatenate([local_index(plan, lengths, outer, u, ulysses) for u in range(ulysses)]) for outer in range(ring)
    ]
    assert coverage(plan, lengths, right) == (0, 0, 0)
    dealt = [[c for u in range(ulysses) for c in (o + 2 * ring * u, size - o - 1 + 2 * ring * u)] for o in range(ring)]
    wrong = [np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in chunks]) for chunks in dealt]
    illegal, missing, _ = coverage(plan, lengths, wrong)
    assert illegal > 0 and missing > 0


def test_counted_keys_are_those_that_are_needed(seed):
    r = random.Random(seed)
    for case in range(200):
        lengths = padded_lengths(random_pack(r, 400), ranks := r.choice([2, 4, 8, 16]))
        plan = make_plan(lengths, ranks, LAYOUTS[case % 4])
        rows = np.zeros((ranks, ranks), int)
        for dst in range(ranks):
            for src in range(ranks):
                if src != dst:
                    rows[src, dst] = sum(end - start for _, start, end in needed(plan, dst, src))
        assert kv_tokens(plan) == (tuple(rows.sum(1).tolist()), tuple(rows.sum(0).tolist()))
        most = max(rows.sum(0).max(), rows.sum(1).max())
        assert kv_traffic(plan) == pytest.approx(most / ((ranks - 1) * sum(lengths) / ranks))


def test_attention_cost_counts_pairs(seed):
    r = random.Random(seed)
    lengths = padded_lengths(random_pack(r, 200), 4)
    at = np.concatenate([np.arange(n) for n in lengths])
    for layout in LAYOUTS:
        plan = make_plan(lengths, 4, layout)
        assert attention_cost(plan) == tuple(int((at[rank_index(plan, lengths, k)] + 1).sum()) for k in range(4))


def realistic_pack(kind, r, total=131_072):
    def log_uniform(low, high):
        return int(math.exp(r.uniform(math.log(low), math.log(high))))

    lengths, left = [], total
    while left:
        if kind == "vlm":
            n = log_uniform(200, 2500) if r.random() < 0.93 else log_uniform(8000, 32_768)
        elif kind == "long":
            n = log_uniform(200, 4000) if lengths else 65_536
        else:
            n = log_uniform(*{"mixed": (200, 32_768), "video": (8000, 32_768), "short": (200, 4000)}[kind])
        lengths.append(min(n, left))
        left -= lengths[-1]
    r.shuffle(lengths)
    return tuple(lengths)


@pytest.mark.parametrize("kind", ["mixed", "vlm", "video", "short", "long"])
def test_planned_attention_is_even_and_few_keys_move(kind, seed):
    r = random.Random(seed)
    packs = [realistic_pack(kind, r) for _ in range(8)]
    for ranks in (8, 16):
        plans = [make_plan(lengths, ranks, "planned") for lengths in packs]
        assert max(map(balance, plans)) < 1.03
        assert np.mean([kv_traffic(plan) for plan in plans]) < 0.55
        assert max(map(most_spans, plans)) <= 2
    assert np.mean([balance(make_plan(lengths, 8, "contiguous")) for lengths in packs]) > 1.1


@pytest.mark.parametrize("layout", ["zigzag", "per_document", "planned"])
def test_one_document_is_even_by_zigzag(layout):
    for ranks in (2, 3, 8, 64):
        plan = make_plan((4096 * ranks,), ranks, layout)
        assert balance(plan) < 1.001
        assert most_spans(plan) <= 2
        assert plan == make_plan((4096 * ranks,), ranks, layout)
    assert balance(make_plan((4096 * 8,), 8, "contiguous")) > 1.8


def slowest_steps(plan):
    """The pairs of the slowest rank summed over the steps of a ring, relative to even work."""
    ranks, total = len(plan), 0
    for step in range(ranks):
        slowest = 0
        for rank, own in enumerate(plan):
            keys = plan[(rank - step) % ranks]
            pairs = 0
            for doc, start, end in own:
                for other, first, last in keys:
                    if other == doc and last <= start:
                        pairs += (end - start) * (last - first)
                    elif (other, first) == (doc, start):
                        pairs += (end - start) * (end - start + 1) // 2
            slowest = max(slowest, pairs)
        total += slowest
    return total * ranks / sum(attention_cost(plan))


def test_every_step_of_a_ring_is_even_by_zigzag_of_every_document(seed):
    lengths = realistic_pack("mixed", random.Random(seed))
    assert slowest_steps(make_plan(lengths, 8, "per_document")) < 1.02
    assert slowest_steps(make_plan(lengths, 8, "contiguous")) > 1.2


def test_tiny_packs():
    cases = [((), 4), ((1,) * 256, 64), ((256,), 64), ((3, 1), 4), ((1, 1), 2), ((4093, 1, 1, 1), 64), ((2,) * 2048, 2)]
    for lengths, ranks in cases:
        for layout in LAYOUTS:
            plan = make_plan(lengths, ranks, layout)
            validate(plan, lengths)
            assert len(plan) == ranks
    assert padded_lengths((), 4) == () and padded_lengths((5,), 4) == (5, 3)
    assert make_plan((2, 3), 1, "planned") == (((0, 0, 2), (1, 0, 3)),)


def test_small_packs_are_even_too(seed):
    r = random.Random(seed)
    for total in (1024, 4096):
        for ranks in (2, 4, 8):
            lengths = tuple(max(1, n // (131_072 // total)) for n in realistic_pack("mixed", r))
            plan = make_plan(padded_lengths(lengths, ranks), ranks, "planned")
            assert balance(plan) < 1.1


def test_plans_are_the_same_everywhere():
    """Ranks of other machines must find the same; a change of these digests is a change of every plan of a running job."""
    packs = [(1000, 333, 77, 602, 1, 35), (5,) * 40 + (1800, 48), (4096,), (900, 800, 700, 600, 500, 400, 196)]
    found = {
        layout: hashlib.sha256(repr([make_plan(p, 8, layout) for p in packs]).encode()).hexdigest()[:16]
        for layout in LAYOUTS
    }
    assert found == DIGESTS


DIGESTS = {
    "contiguous": "7e83a997bdfc4d4b",
    "zigzag": "36cc6c41463359a5",
    "per_document": "3c05346af2cff778",
    "planned": "b4f14b345eb80b0f",
}


def test_refusals():
    with pytest.raises(ParallelError, match=r"multiple of 4 x 2 ranks, found 2 documents of 12 tokens.*padded_lengths"):
        make_plan((5, 7), 4, "planned", 2)
    with pytest.raises(ParallelError, match="the shortest 0"):
        make_plan((8, 0), 2, "contiguous")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((((0, 0, 4),), ((0, 4, 7),)), "8 tokens of document 0, found 7"),
        ((((0, 0, 4),), ((0, 3, 8),)), "every token on one rank, found document 0: 3 to 8 after 4"),
        ((((0, 0, 3),), ((0, 4, 8),)), "every token on one rank"),
        ((((0, 0, 5),), ((0, 5, 8),)), "equally many tokens on every rank, found 3 to 5"),
        ((((0, 0, 2), (0, 2, 4)), ((0, 4, 8),)), "sorted and joined spans, found on rank 0"),
        ((((0, 6, 8), (0, 0, 2)), ((0, 2, 6),)), "sorted and joined spans"),
        ((((1, 0, 4),), ((0, 0, 4),)), "document 1: 0 to 4 after none"),
        ((((0, 0, 4), (0, 4, 4)), ((0, 4, 8),)), "every token on one rank"),
    ],
)
def test_damaged_plans_are_refused(spans, message):
    with pytest.raises(ParallelError, match=message):
        validate(spans, (8,))
