"""The plan: every row once per epoch, the right shares, a jump to any place, and packs that are full and alike."""

import json
import random
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mmscale.config.cost import predict_cost
from mmscale.config.schema import CostConfig
from mmscale.errors import CheckpointError, ConfigError, RefusedInputError
from mmscale.streaming.draws import MAX_AGE, PlanSource
from mmscale.streaming.pack import cost_imbalance
from mmscale.streaming.plan import TOO_LONG, TOO_MANY_IMAGES, Plan, PlanRules, PlanState, pack_features, plan_pass

COST = CostConfig(token=14e9, pair=262_144, vision_input=0.5e12)


def source(name, tokens, vision=None, share=1, **caps):
    tokens = np.asarray(tokens, np.uint32)
    vision = np.zeros(len(tokens), np.uint16) if vision is None else np.asarray(vision, np.uint16)
    reasons = {int(r): TOO_LONG for r in np.flatnonzero(tokens == 0)}
    return PlanSource(name, tokens, vision, np.zeros(len(tokens), np.uint16), reasons, Fraction(share), **caps)


def make_plan(sources, *, seq_len, plan_group, window=None, seed=0, shuffle_block=64, max_images=None, cost=COST):
    return Plan(sources, PlanRules(seq_len, plan_group, window, seed, shuffle_block, max_images, cost))


def take(plan, num_packs, state=None):
    """The next packs with their drops and places; fewer when the plan ends."""
    out = []
    for pack, dropped, after in plan.packs(state or PlanState()):
        out.append((pack, dropped, after))
        if len(out) == num_packs:
            break
    return out


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
    plan = make_plan([source("s", tokens)], seq_len=100, plan_group=4, window=32, seed=seed)
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
    plan = make_plan([source("s", [10] * 50)], seq_len=10, plan_group=4, window=50)
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
    make = lambda: make_plan(mix(seed), seq_len=1024, plan_group=4, window=128, seed=seed)  # noqa: E731
    straight = take(make(), 400)
    for cut in rng.sample(range(1, 399), 8):
        state = PlanState.from_dict(json.loads(json.dumps(straight[cut - 1][2].to_dict())))
        assert take(make(), 400 - cut, state) == straight[cut:]
    assert sum(len(d) for _, d, _ in straight) > 0
    other = take(make_plan(mix(seed), seq_len=1024, plan_group=4, window=128, seed=seed + 1), 400)
    assert [p for p, _, _ in other] != [p for p, _, _ in straight]


def test_steps_of_any_size_and_rank_count_are_one_pack_stream():
    packs = [p for p, _, _ in take(make_plan(mix(), seq_len=1024, plan_group=4, window=128), 96)]
    for global_batch in (1, 3, 4, 8, 32):
        steps = make_plan(mix(), seq_len=1024, plan_group=4, window=128).steps(PlanState(), global_batch)
        got = [p for _ in range(96 // global_batch) for p in next(steps).packs]
        assert got == packs


def test_unusable_rows_are_reported_once_per_epoch():
    tokens = [5, 0, 7, 0, 9, 1]
    packs = take(make_plan([source("s", tokens)], seq_len=16, plan_group=2, window=6), 60)
    drops = [d for _, dropped, _ in packs for d in dropped]
    assert {d.reason for d in drops} == {TOO_LONG}
    epochs = rows_by_epoch(packs)
    for epoch in range(5):
        assert sorted(epochs[epoch]) == list(range(6))
    assert Counter((d.epoch, d.row) for d in drops).most_common(1)[0][1] == 1


def test_shares_decide_the_draws_and_each_source_keeps_its_epochs():
    sources = [source("a", [10] * 40, share=3), source("b", [10] * 1000, share=1)]
    packs = take(make_plan(sources, seq_len=40, plan_group=4, window=200), 5000)
    draws = Counter(d.source_idx for p, _, _ in packs for d in p)
    assert sum(draws.values()) == 20_000
    assert draws[0] / 20_000 == pytest.approx(0.75, abs=0.001)
    epochs = rows_by_epoch(packs)
    assert len(epochs) > 300 and all(sorted(epochs[e]) == list(range(40)) for e in range(300))


def test_shares_hold_from_the_first_draws_on():
    shares = [Fraction(1, 2), Fraction(1, 3), Fraction(7, 60), Fraction(1, 20)]
    sources = [source(f"{i}", [10] * (50 + i), share=share) for i, share in enumerate(shares)]
    plan = make_plan(sources, seq_len=10, plan_group=1, window=60)
    packs = take(plan, 20 * plan.window)
    for n in range(plan.window, len(packs) + 1, plan.window):
        draws = Counter(d.source_idx for p, _, _ in packs[:n] for d in p)
        assert all(abs(draws[i] - n * share) <= 1 for i, share in enumerate(shares))


def by_size(sources):
    return [replace(s, share=Fraction(s.num_rows)) for s in sources]


def test_shares_by_size_end_all_epochs_together():
    packs = take(make_plan(by_size(mix()), seq_len=1024, plan_group=4, window=128), 700)
    epochs = [max(rows_by_epoch(packs, s)) for s in range(3)]
    assert max(epochs) - min(epochs) <= 1 and min(epochs) > 0


@pytest.mark.parametrize("used", [1, 3, 50])
def test_a_fixed_part_of_a_source_is_used(used, seed):
    sources = [source("s", [10] * 5000, max_samples=used)]
    seen = rows_by_epoch(take(make_plan(sources, seq_len=20, plan_group=2, seed=seed), 300))
    assert len({frozenset(seen[e]) for e in range(5)}) == 1 and len(set(seen[0])) == len(seen[0]) == used
    others = rows_by_epoch(take(make_plan(sources, seq_len=20, plan_group=2, seed=seed + 1), 300))
    assert used == 50 or set(others[0]) != set(seen[0]) or used == 1
    assert used < 50 or set(others[0]) != set(seen[0])


def test_when_a_source_ends_the_others_go_on_in_proportion():
    sources = [source("a", [10] * 30, share=6, max_epochs=2), source("b", [10] * 200, share=2), source("c", [10] * 100)]
    packs = take(make_plan(sources, seq_len=10, plan_group=1, window=50), 2000)
    assert sorted(rows_by_epoch(packs, 0)) == [0, 1] and all(len(r) == 30 for r in rows_by_epoch(packs, 0).values())
    late = Counter(d.source_idx for p, _, _ in packs[-900:] for d in p)
    assert late[0] == 0 and late[1] / late[2] == pytest.approx(2, rel=0.01)
    for s, rows in ((1, 200), (2, 100)):
        epochs = rows_by_epoch(packs, s)
        assert all(sorted(epochs[e]) == list(range(rows)) for e in range(max(epochs)))


@pytest.mark.parametrize("global_batch", [1, 4, 8])
def test_when_all_sources_have_ended_everything_has_come(global_batch, seed):
    tokens = np.random.default_rng(seed).integers(1, 60, 501)
    sources = [source("a", tokens, max_epochs=2), source("b", [7, 0, 9], max_epochs=3)]
    make = lambda: make_plan(sources, seq_len=100, plan_group=4, window=100, seed=seed)  # noqa: E731
    steps = list(make().steps(PlanState(), global_batch))
    assert all(len(s.packs) == global_batch for s in steps) and all(p for s in steps[:-1] for p in s.packs)
    seen = Counter((d.source_idx, d.epoch, d.row) for s in steps for p in [*s.packs, s.dropped] for d in p)
    expected = [(0, e, r) for e in range(2) for r in range(501)] + [(1, e, r) for e in range(3) for r in range(3)]
    assert seen == Counter(expected)
    assert list(make().steps(steps[-1].state_after, global_batch)) == []
    middle = PlanState.from_dict(json.loads(json.dumps(steps[len(steps) // 2].state_after.to_dict())))
    assert list(make().steps(middle, global_batch)) == steps[len(steps) // 2 + 1 :]


def test_the_order_of_equal_documents_mixes_the_sources():
    sources = [source("a", [10] * 500), source("b", [10] * 500)]
    packs = [p for p, _, _ in take(make_plan(sources, seq_len=100, plan_group=4), 80)]
    alone = sum(len({d.source_idx for d in p}) == 1 for p in packs)
    assert alone <= 4  # of 80 packs of ten; two in 1024 by chance


def test_a_limit_on_images_is_kept_and_costs_little_fill(seed):
    rng = np.random.default_rng(seed)
    images = rng.choice(5, 20_000, p=(0.3, 0.5, 0.1, 0.05, 0.05))
    tokens = np.exp(rng.normal(5, 0.8, 20_000)).astype(int).clip(8, 1500) + images * 144
    needed = images.mean() / tokens.mean() * 4096  # images in a pack when nothing limits them
    for most in (round(needed * 1.1), round(needed * 1.5)):
        plan = make_plan([source("s", tokens, images)], seq_len=4096, plan_group=8, max_images=most)
        packs = [p for p, _, _ in take(plan, 800)]
        assert max(int(images[[d.row for d in p]].sum()) for p in packs) <= most
        fill = sum(d.tokens for p in packs for d in p) / 4096 / len(packs)
        print(f"at most {most} images ({needed:.1f} needed): fill {fill:.4f}")
        assert fill >= 0.995


def test_images_beyond_the_limit_cost_fill_but_nothing_is_lost():
    images = [4] * 300  # one document in a pack, though eight would fit
    plan = make_plan([source("s", [10] * 300, images)], seq_len=80, plan_group=4, max_images=7)
    epochs = rows_by_epoch(take(plan, 800))
    assert all(sorted(epochs[e]) == list(range(300)) for e in (0, 1))


def test_windows_are_planned_ahead_and_shared(monkeypatch):
    planned = []
    whole = Plan._plan_window
    monkeypatch.setattr(Plan, "_plan_window", lambda self, *place: planned.append(place[0]) or whole(self, *place))
    make = lambda: make_plan([source("shared", [10] * 4000)], seq_len=100, plan_group=4, window=400)  # noqa: E731
    packs = make().packs(PlanState())
    first = [next(packs) for _ in range(10)]
    packs.close()  # waits for the window that is under way
    assert planned == [0, 1]
    assert take(make(), 10) == first
    assert planned[:2] == [0, 1] and 0 not in planned[2:]  # an equal plan finds the first two


def test_a_source_without_usable_rows_is_refused_with_the_reasons():
    with pytest.raises(RefusedInputError, match=r"'s'.*too_long 2.*raise data\.seq_len=8, or"):
        make_plan([source("s", [0, 0])], seq_len=8, plan_group=1, window=8)
    many = replace(source("s", [0]), reasons={0: TOO_MANY_IMAGES})
    with pytest.raises(RefusedInputError, match=r"raise data\.max_images_per_pack=2, or"):
        make_plan([many], seq_len=8, plan_group=1, max_images=2)
    capped = replace(source("s", [0] * 999 + [5]), max_samples=1)
    with pytest.raises(RefusedInputError, match=r"none among the 1 of max_samples .*too_long 999"):
        make_plan([capped], seq_len=8, plan_group=1)


def test_a_damaged_state_is_refused():
    with pytest.raises(CheckpointError, match="since"):
        PlanState.from_dict({"window": 0, "pack": 0, "step": 0})
    with pytest.raises(CheckpointError, match="drawn"):
        PlanState.from_dict({"window": 0, "pack": 0, "step": 0, "since": 0})


def test_a_cost_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"data\.cost"):
        make_plan([source("s", [5])], seq_len=8, plan_group=1, cost=CostConfig(token=0, pair=0))


def test_a_length_that_never_packs_well_is_not_carried_for_ever():
    # 0.52 of a pack: two of them never share one, nothing else is small enough to fill it
    tokens = [52] * 400
    plan = make_plan([source("s", tokens)], seq_len=100, plan_group=8, window=100)
    epochs = rows_by_epoch(take(plan, 1200))
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(400))
    carries = {after.window: after.carry for _, _, after in take(plan, 1200)}
    waited = Counter(n for carry in carries.values() for _, _, numbers in carry.items() for n in numbers.tolist())
    assert 1 < max(waited.values()) <= MAX_AGE + 1
    assert max(map(len, carries.values())) <= 100 + 8


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
    return (text + rows)[fits], num_images[fits]


@pytest.mark.parametrize(("kind", "least"), [("sft", 0.999), ("video", 0.995)])
def test_fill_and_cost_balance_on_invented_mixes(kind, least):
    tokens, images = invented(kind, 40_000, 4096)
    plan = make_plan([source("s", tokens, images)], seq_len=4096, plan_group=64)
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
    cost = predict_cost(COST, np.array([pack_features(p, plan.sources) for p in packs]))
    balance, _ = cost_imbalance(cost, 64)
    random_balance, _ = cost_imbalance(np.random.default_rng(1).permutation(cost), 64)
    state_bytes = len(json.dumps(state.to_dict()))
    print(
        f"{kind}: fill {fill:.4f}, max/mean {balance:.4f} (random {random_balance:.4f}), {cpu_us:.1f} us, {state_bytes} B"
    )
    assert fill >= least
    assert balance <= 1.01 < random_balance
    assert state_bytes < 16_000


def test_planning_a_large_set_starts_at_once():
    tokens = np.random.default_rng(0).integers(10, 2000, 3_000_000).astype(np.uint32)
    started = time.process_time()
    take(make_plan([source("s", tokens)], seq_len=4096, plan_group=64, window=4096), 64)
    assert time.process_time() - started < 2.0


def test_a_pass_holds_every_usable_row_once_in_a_fixed_order():
    sources = [source("a", [5, 0, 7, 3]), source("b", list(range(1, 30)))]
    rules = PlanRules(32, 1, 10, 0, 64, None, COST)
    packs, dropped = plan_pass(sources, rules)
    draws = [(d.source_idx, d.row) for p in packs for d in p]
    assert sorted(draws) == sorted([(0, 0), (0, 2), (0, 3), *((1, r) for r in range(29))])
    assert all(sum(d.tokens for d in p) <= 32 for p in packs)
    assert [(d.source_idx, d.row, d.reason) for d in dropped] == [(0, 1, TOO_LONG)]
    assert plan_pass(sources, rules) == (packs, dropped)
    assert plan_pass([source("a", [0])], rules)[0] == ()
    assert sum(map(len, plan_pass([source("b", [5] * 30, max_samples=7)], rules)[0])) == 7
