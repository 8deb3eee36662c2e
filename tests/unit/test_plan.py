"""The plan: every row once per epoch, the right shares, a jump to any place, and packs that are full and alike."""

import json
import random
import time
from collections import Counter

import numpy as np
import pytest

from mmscale.errors import CheckpointError, ConfigError, RefusedInputError
from mmscale.streaming.plan import MAX_AGE, TOO_LONG, Plan, PlanSource, PlanState, mixture_shares, plan_pass


def source(name, tokens, media=None, weight=None):
    tokens = np.asarray(tokens, np.uint32)
    media = np.zeros_like(tokens) if media is None else np.asarray(media, np.uint32)
    return PlanSource(name, tokens, media, {int(r): TOO_LONG for r in np.flatnonzero(tokens == 0)}, weight)


def take(plan, num_packs, state=None):
    out = []
    for pack, dropped, after in plan.packs(state or PlanState()):
        out.append((pack, dropped, after))
        if len(out) == num_packs:
            return out
    raise AssertionError("unreachable")


def rows_by_epoch(packs, source_idx=0):
    seen = {}
    for pack, dropped, _ in packs:
        for d in [*pack, *dropped]:
            if d.source_idx == source_idx:
                seen.setdefault(d.epoch, []).append(d.row)
    return seen


@pytest.mark.parametrize("rows", [1, 7, 63, 64, 65])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_row_once_per_epoch_over_all_ranks(rows, dp_size, seed):
    tokens = np.random.default_rng(seed).integers(1, 40, rows)
    plan = Plan([source("s", tokens)], seq_len=100, plan_group=4, window=32, seed=seed)
    seen, steps = {}, plan.steps(PlanState(), 8)
    while any(len(seen.get(epoch, [])) < rows for epoch in (0, 1, 2)):
        step = next(steps)
        per_rank = [step.for_rank(r, dp_size) for r in range(dp_size)]
        assert len({len(p) for p in per_rank}) == 1
        assert Counter(p for own in per_rank for p in own) == Counter(step.packs)
        for draw in (d for own in per_rank for p in own for d in p):
            seen.setdefault(draw.epoch, []).append(draw.row)
            assert draw.tokens == tokens[draw.row]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(rows))
    assert all(len(set(r)) == len(r) for r in seen.values())
    if rows >= 63:
        assert seen[0] != sorted(seen[0]) and seen[0] != seen[1]


def test_rank_slots_rotate_and_keep_neighbours_together():
    plan = Plan([source("s", [10] * 50)], seq_len=10, plan_group=4, window=50)
    steps = plan.steps(PlanState(), 8)
    first, second = next(steps), next(steps)
    for step in (first, second):
        for j in range(2):
            assert {step.for_rank(r, 4)[j] for r in range(4)} == set(step.packs[4 * j : 4 * j + 4])
    assert first.for_rank(0, 4)[0] == first.packs[0] and second.for_rank(0, 4)[0] == second.packs[1]


def mix(seed=0):
    rng = np.random.default_rng(seed)
    long = rng.integers(1, 900, 300)
    long[::40] = 0  # unusable rows
    return [source("a", rng.integers(1, 300, 501)), source("b", long, long // 2), source("tiny", [37])]


def test_a_restart_anywhere_gives_the_same_packs_and_drops(seed):
    rng = random.Random(seed)
    make = lambda: Plan(mix(seed), seq_len=1024, plan_group=4, window=128, seed=seed)  # noqa: E731
    straight = take(make(), 400)
    for cut in rng.sample(range(1, 399), 8):
        state = PlanState.from_dict(json.loads(json.dumps(straight[cut - 1][2].to_dict())))
        assert take(make(), 400 - cut, state) == straight[cut:]
    assert sum(len(d) for _, d, _ in straight) > 0
    other = take(Plan(mix(seed), seq_len=1024, plan_group=4, window=128, seed=seed + 1), 400)
    assert [p for p, _, _ in other] != [p for p, _, _ in straight]


def test_steps_of_any_size_and_rank_count_are_one_pack_stream():
    packs = [p for p, _, _ in take(Plan(mix(), seq_len=1024, plan_group=4, window=128), 96)]
    for global_batch in (1, 3, 4, 8, 32):
        steps = Plan(mix(), seq_len=1024, plan_group=4, window=128).steps(PlanState(), global_batch)
        got = [p for _ in range(96 // global_batch) for p in next(steps).packs]
        assert got == packs


def test_unusable_rows_are_reported_once_per_epoch():
    tokens = [5, 0, 7, 0, 9, 1]
    packs = take(Plan([source("s", tokens)], seq_len=16, plan_group=2, window=6), 60)
    drops = [d for _, dropped, _ in packs for d in dropped]
    assert {d.reason for d in drops} == {TOO_LONG}
    epochs = rows_by_epoch(packs)
    for epoch in range(5):
        assert sorted(epochs[epoch]) == list(range(6))
    assert Counter((d.epoch, d.row) for d in drops).most_common(1)[0][1] == 1


def test_weights_decide_the_share_of_draws_and_each_source_keeps_its_epochs():
    sources = [source("a", [10] * 40, weight=3.0), source("b", [10] * 1000, weight=1.0)]
    packs = take(Plan(sources, seq_len=40, plan_group=4, window=200), 500)
    draws = Counter(d.source_idx for p, _, _ in packs for d in p)
    assert draws[0] / sum(draws.values()) == pytest.approx(0.75, abs=0.01)
    epochs = rows_by_epoch(packs)
    assert len(epochs) > 30 and all(sorted(epochs[e]) == list(range(40)) for e in range(30))


def test_without_weights_all_sources_end_their_epochs_together():
    packs = take(Plan(mix(), seq_len=1024, plan_group=4, window=128), 300)
    epochs = [max(rows_by_epoch(packs, s)) for s in range(3)]
    assert max(epochs) - min(epochs) <= 1
    assert mixture_shares(mix())[0] == pytest.approx(501 / 802)


def test_weights_on_some_sources_only_are_refused():
    with pytest.raises(ConfigError, match="b"):
        mixture_shares([source("a", [1], weight=1.0), source("b", [1])])


def test_a_source_without_usable_rows_is_refused_with_the_reasons():
    with pytest.raises(RefusedInputError, match=r"'s'.*too_long 2"):
        Plan([source("s", [0, 0])], seq_len=8, plan_group=1, window=8)


def test_a_damaged_state_is_refused():
    with pytest.raises(CheckpointError, match="carry"):
        PlanState.from_dict({"window": 0, "pack": 0, "step": 0})


def test_a_length_that_never_packs_well_is_not_carried_for_ever():
    # 0.52 of a pack: two of them never share one, nothing else is small enough to fill it
    tokens = [52] * 400
    plan = Plan([source("s", tokens)], seq_len=100, plan_group=8, window=100)
    epochs = rows_by_epoch(take(plan, 1200))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(400))
    states = [after for _, _, after in take(plan, 1200)]
    assert all(age <= MAX_AGE + 1 for s in states for _, age, *_ in s.carry)
    assert max(sum(len(c) - 2 for c in s.carry) for s in states) <= 100 + 8


def invented(kind, n, seq_len, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "sft":
        text = np.exp(rng.normal(np.log(180), 1.0, n)).astype(int).clip(16, 8192)
        num_images = rng.choice([0, 1, 2, 3, 4], n, p=[0.15, 0.70, 0.08, 0.04, 0.03])
    else:
        text = np.exp(rng.normal(np.log(250), 1.1, n)).astype(int).clip(16, 16384)
        num_images = np.where(rng.random(n) < 0.10, rng.integers(8, 65, n), rng.integers(1, 7, n))
    rows = num_images * rng.choice([144, 196, 576, 729], n)
    fits = text + rows <= seq_len
    return (text + rows)[fits], rows[fits]


@pytest.mark.parametrize(("kind", "least"), [("sft", 0.999), ("video", 0.995)])
def test_fill_and_cost_balance_on_invented_mixes(kind, least):
    tokens, media = invented(kind, 20_000, 4096)
    plan = Plan([source("s", tokens, media)], seq_len=4096, plan_group=64, window=4096)
    started = time.process_time()
    packs, drawn = [], 0
    for pack, _, after in plan.packs(PlanState()):
        state = after
        packs.append(pack)
        drawn += len(pack)
        if drawn > len(tokens):
            break
    cpu_us = (time.process_time() - started) / drawn * 1e6
    fill = sum(d.tokens for p in packs for d in p) / (4096 * len(packs))
    cost = np.array([sum(d.tokens * (53_406 + d.tokens) + 3_052 * media[d.row] for d in p) for p in packs], float)
    by_step = cost[: len(cost) // 64 * 64].reshape(-1, 64)
    balance = by_step.max(1).sum() / by_step.mean(1).sum()
    shuffled = np.random.default_rng(1).permutation(by_step.ravel()).reshape(-1, 64)
    random_balance = shuffled.max(1).sum() / shuffled.mean(1).sum()
    state_bytes = len(json.dumps(state.to_dict()))
    print(
        f"{kind}: fill {fill:.4f}, max/mean {balance:.4f} (random {random_balance:.4f}), {cpu_us:.1f} us, {state_bytes} B"
    )
    assert fill >= least
    assert balance <= 1.01 < random_balance
    assert state_bytes < 16_000


def test_planning_a_large_set_starts_at_once():
    tokens = np.random.default_rng(0).integers(10, 2000, 3_000_000).astype(np.uint32)
    big = PlanSource("s", tokens, np.zeros_like(tokens), {})
    started = time.process_time()
    take(Plan([big], seq_len=4096, plan_group=64, window=4096), 64)
    assert time.process_time() - started < 2.0


def test_a_pass_holds_every_usable_row_once_in_a_fixed_order():
    sources = [source("a", [5, 0, 7, 3]), source("b", list(range(1, 30)))]
    packs, dropped = plan_pass(sources, seq_len=32, window=10)
    draws = [(d.source_idx, d.row) for p in packs for d in p]
    assert sorted(draws) == sorted([(0, 0), (0, 2), (0, 3), *((1, r) for r in range(29))])
    assert all(sum(d.tokens for d in p) <= 32 for p in packs)
    assert [(d.source_idx, d.row, d.reason) for d in dropped] == [(0, 1, TOO_LONG)]
    assert plan_pass(sources, seq_len=32, window=10) == (packs, dropped)
    assert plan_pass([source("a", [0])], seq_len=32, window=10)[0] == ()
