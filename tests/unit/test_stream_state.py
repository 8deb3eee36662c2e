"""The account: indexed = delivered + skipped(by reason), per source and epoch, and what breaks it is an error."""

import json
import logging
import random
from collections import Counter
from contextlib import closing
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mmscale.config.schema import CostConfig
from mmscale.errors import CheckpointError, DataError
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.plan import MAX_WINDOW, TOO_LONG, Draw, Drop, Plan, PlannedStep, PlanRules, PlanState
from mmscale.streaming.remix import SourceFacts
from mmscale.streaming.state import JUDGED_FROM, StreamFacts, StreamState, pack_json, unpack_json
from mmscale.types import Skip


def source_facts(num_rows, share="1/2", shards="x", max_samples=None, max_epochs=None, **unplanned):
    return SourceFacts(num_rows, unplanned, {"shards": shards}, share, max_samples, max_epochs)


def facts(num_rows=6, max_bad=0.01, in_a_row=200, **unplanned):
    sources = {"a": source_facts(num_rows, **unplanned), "b": source_facts(10_000)}
    return StreamFacts({"packing": "x"}, sources, max_bad, in_a_row)


def after(state, planned, skips=()):
    """The next state; ids are `a/0.tar:<row>`."""
    ids = [f"{tuple(state.facts.sources)[d.source_idx]}/0.tar:{d.row}" for pack in planned.packs for d in pack]
    return state.after(planned, skips, ids)


def step(rows, epoch=0, dropped=(), source_idx=0):
    draws = tuple(Draw(source_idx, row, epoch, 5) for row in rows)
    return PlannedStep((draws,), tuple(Drop(source_idx, r, epoch, TOO_LONG) for r in dropped), 0, PlanState(window=1))


def skip(row, epoch=0, reason="decode_image"):
    return Skip(f"a/0.tar:{row}", reason, "cut off", 512, "a", epoch)


def test_a_complete_epoch_is_told_and_forgotten(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    state = StreamState(facts(quarantined=4))
    with caplog.at_level(logging.INFO, "mmscale"):
        state = after(state, step([0, 1], dropped=[5]), [skip(1)])
        assert state.account == {("a", 0): {"delivered": 1, "decode_image": 1, TOO_LONG: 1}}
        state = StreamState.from_dict(json.loads(json.dumps(state.to_dict())), state.facts)
        state = after(state, step([2], epoch=1))
        state = after(state, step([2, 3, 4]), [skip(3), skip(2, reason="length")])
    assert state.account == {("a", 1): {"delivered": 1}}
    (line,) = [r.getMessage() for r in caplog.records]
    counts = f"(decode_image 2, length 1, quarantined 4, {TOO_LONG} 1)"
    assert line == f"epoch 0 of 'a': indexed 10 = delivered 2 + skipped 8 {counts}"
    assert (state.num_seen, state.num_skipped, state.num_bad) == (7, 4, 3)
    assert state.plan == PlanState(window=1) and state.num_epochs == pytest.approx(7 / 10_006)


def test_states_are_values():
    state = StreamState(facts())
    after(state, step([0]))
    assert state.account == {} and state.num_seen == 0


def test_a_sample_that_comes_twice_is_an_error():
    state = after(StreamState(facts(num_rows=2)), step([0]))
    with pytest.raises(DataError, match="expected 2 samples, each once, found 3"):
        after(state, step([1, 1]))


def test_a_skip_that_was_never_drawn_is_an_error():
    with pytest.raises(DataError, match="each once"):
        after(StreamState(facts()), step([0]), [skip(0), skip(1)])


def test_the_share_of_bad_samples_is_judged_late_and_not_for_long_ones():
    rows = range(JUDGED_FROM - 1)
    few = after(StreamState(facts(JUDGED_FROM * 2)), step(rows), [skip(r) for r in range(100)])
    with pytest.raises(DataError, match=r"max_bad=1\.0%.*100 of 1000 \(10\.0%\).*decode_image in 'a' 100"):
        after(few, step([0], source_idx=1))
    at_the_limit = [skip(r) for r in range(10)]
    start = StreamState(facts(JUDGED_FROM * 2))
    state = after(start, step(range(JUDGED_FROM), dropped=range(1000, 1900)), at_the_limit)
    assert state.num_skipped == 910


def test_bad_samples_in_a_row_stop_the_run_by_name():
    state = after(StreamState(facts(20, in_a_row=4)), step([0, 1, 2, 3]), [skip(1), skip(2), skip(3)])
    assert state.bad_run == {"a": 3}
    state = StreamState.from_dict(json.loads(json.dumps(state.to_dict())), state.facts)
    with pytest.raises(DataError, match=r"'a'.*max_bad_in_a_row=4.*found 4.*a/0\.tar:4 \(decode_image: cut off\)"):
        after(state, step([4]), [skip(4)])
    good = after(state, step([4, 5, 6, 7]), [skip(r) for r in (5, 6, 7)])
    assert good.bad_run == {"a": 3}  # 4 was good
    other = after(state, step([0], source_idx=1))
    assert other.bad_run == {"a": 3}  # another source in between says nothing about this one
    assert after(other, step([4])).bad_run == {}


# A plan over sources that change at random: the rule of remix.py.


def plan_source(name, num_rows, **keys):
    rng = random.Random(name)
    tokens = np.array([rng.randint(1, 60) for _ in range(num_rows)], np.uint32)
    tokens[5::17] = 0
    reasons = dict.fromkeys(np.flatnonzero(tokens == 0).tolist(), "decode_image")
    none = np.zeros(num_rows, np.uint16)
    return PlanSource(name, tokens, none, none, reasons, **keys)


def facts_of(sources):
    described = {
        s.name: SourceFacts(s.num_rows, {}, {"lengths": s.digest}, str(s.share), s.max_samples, s.max_epochs)
        for s in sources
    }
    return StreamFacts({"packing": "x"}, described, 1.0, 10_000)


RULES = PlanRules(100, 4, 64, 0, 64, None, CostConfig(token=1, pair=0.01))


def run(sources, state, num_steps):
    """(state, what came as (source, epoch, row)) after some steps, through JSON as in a checkpoint."""
    facts = facts_of(sources)
    state = StreamState(facts) if state is None else StreamState.from_dict(json.loads(json.dumps(state)), facts)
    came = []
    steps = Plan(sources, RULES).steps(state.plan, 8)
    for planned, _ in zip(steps, range(num_steps), strict=False):
        came += [(sources[d.source_idx].name, d.epoch, d.row) for p in [*planned.packs, planned.dropped] for d in p]
        state = after(state, planned)
    return state.to_dict(), came


SIZES = {"a": 150, "b": 90, "c": 33, "d": 1, "e": 400}


def random_mixture(rng):
    names = ["a", *sorted(rng.sample("bcde", rng.randint(0, 3)))]
    caps = {n: rng.choice([None, None, max(1, SIZES[n] // 2)]) if n != "a" else None for n in names}
    return [plan_source(n, SIZES[n], share=Fraction(rng.randint(1, 9)), max_samples=caps[n]) for n in names]


def test_a_changed_mixture_keeps_every_sample_once_per_epoch(seed):
    rng = random.Random(seed)
    for _ in range(6):
        state, seen, before = None, Counter(), {}
        for _ in range(5):
            sources = random_mixture(rng)
            for s in sources:
                # a source that leaves and comes back begins anew
                if s.name not in before:
                    seen = Counter({key: n for key, n in seen.items() if key[0] != s.name})
            state, came = run(sources, state, rng.randint(1, 25))
            seen.update(came)
            assert max(seen.values()) == 1, [key for key, n in seen.items() if n > 1]
            before = {s.name: s for s in sources}
        # 'a' was there all the time: its epochs are complete up to the first that is open
        first_open = min((int(e) for e in unpack_json(state["packed"])["account"].get("a", {})), default=0)
        counts = Counter(epoch for name, epoch, _ in seen if name == "a")
        assert all(counts[epoch] == SIZES["a"] for epoch in range(first_open))


def test_an_added_source_and_new_shares_hold_from_the_resume_on(caplog, monkeypatch, seed):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    one = [plan_source("a", 1500, share=Fraction(1)), plan_source("b", 900, share=Fraction(1))]
    two = [
        plan_source("a", 1500, share=Fraction(1)),
        plan_source("b", 900, share=Fraction(5)),
        plan_source("c", 3000, share=Fraction(4)),
    ]
    state, first = run(one, None, 30 + seed % 7)
    with caplog.at_level(logging.WARNING, "mmscale"):
        state, second = run(two, state, 150)
    text = caplog.text
    assert "'c' is new" in text and "'b': share" in text
    assert max(Counter([*first, *second]).values()) == 1
    counts = Counter(name for name, _, _ in second)
    assert counts["b"] / len(second) == pytest.approx(0.5, abs=0.03)
    assert counts["c"] / len(second) == pytest.approx(0.4, abs=0.03)
    whole = Counter((n, e) for n, e, _ in [*first, *second])
    assert whole["a", 0] <= 1500 and whole["b", 0] == 900 and min(e for n, e, _ in second if n == "c") == 0


def test_an_unchanged_mixture_goes_on_exactly_and_a_removed_source_leaves(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    both = [plan_source("a", 150), plan_source("b", 90)]
    straight = run(both, None, 20)[1]
    state, first = run(both, None, 9)
    assert first + run(both, state, 11)[1] == straight
    with caplog.at_level(logging.WARNING, "mmscale"):
        state, rest = run(both[:1], state, 10)
    assert {name for name, _, _ in rest} == {"a"}
    assert "'b' was removed" in caplog.text and "of 'b' ends unfinished" in caplog.text
    stored = unpack_json(state["packed"])
    assert set(stored["account"]) | set(stored["plan"]["carry"]["runs"]) <= {"a"}
    seen = Counter(key for key in [*first, *rest] if key[0] == "a")
    assert max(seen.values()) == 1
    assert sum(n for (_, e, _), n in seen.items() if e == 0) == 150  # what was carried came too


def test_other_data_under_the_same_name_is_refused():
    state, _ = run([plan_source("a", 150)], None, 3)
    with pytest.raises(CheckpointError, match=r"source 'a'.*lengths \("):
        run([plan_source("a", 151)], state, 1)


@pytest.mark.parametrize("num_sources", [50, 300])
def test_the_largest_state_is_below_64_kb(num_sources, seed):
    rng = np.random.default_rng(seed)
    sources = []
    for i in range(num_sources):
        tokens = rng.integers(20, 40, 20_000).astype(np.uint32)
        none = np.zeros(20_000, np.uint16)
        sources.append(
            PlanSource(f"a rather long name of a source {i}", tokens, none, none, {}, Fraction(i % 7 + 1, 7))
        )
    # packs of 1,100 documents: groups that no window holds, so that as much as possible is carried
    rules = PlanRules(32_768, 256, None, 0, 64, None, CostConfig(token=1, pair=1e-4))
    account = {(s.name, e): {"delivered": 10**6 + e, "decode_image": 99} for s in sources for e in (0, 1)}
    assert Plan(sources, rules).window == MAX_WINDOW
    state = StreamState(facts_of(sources), account=account)
    sizes, carried = [], []
    for change in range(4):  # each at the second pack of a window, when nearly all of it is left
        last_window = state.plan.window + (1 if change else 2)
        with closing(Plan(sources, rules).packs(state.plan)) as places:
            for number, (_, _, place) in enumerate(places):
                is_last = (place.window, place.pack) >= (last_window, 2)
                if number % 10 == 0 or is_last:
                    data = json.dumps(replace(state, plan=place).to_dict())
                    sizes.append(len(data))
                    carried.append(len(place.carry))
                if is_last:
                    break
        sources = [replace(s, share=s.share * (1 + (i + change) % 3)) for i, s in enumerate(sources)]
        state = replace(StreamState.from_dict(json.loads(data), facts_of(sources)), account=account)
    print(f"{max(sizes)} bytes, {max(carried)} documents carried")
    assert max(carried) > 50_000
    assert max(sizes) < 65_536


def test_a_state_of_another_form_is_refused():
    state = after(StreamState(facts()), step([0])).to_dict()
    other = {**state, "fingerprint": {"packing": "y"}, "packed": None}
    with pytest.raises(CheckpointError, match=r"another packing \(y then, x now\)"):  # not what the form lacks
        StreamState.from_dict(other, facts())
    for broken in ("", "00", "0" * 20, pack_json([]), pack_json({"sources": {}}), 3, None):
        with pytest.raises(CheckpointError, match="packed"):
            StreamState.from_dict({**state, "packed": broken}, facts())


def test_a_cap_of_all_rows_is_no_other_set_of_samples():
    state, first = run([plan_source("a", 150)], None, 2)
    _, second = run([plan_source("a", 150, max_samples=1000)], state, 10)
    assert max(Counter([*first, *second]).values()) == 1
    assert sum(epoch == 0 for _, epoch, _ in [*first, *second]) == 150  # its epoch went on
