"""The account: indexed = delivered + skipped(by reason), per source and epoch, and what breaks it is an error."""

import json
import logging

import pytest

from mmscale.errors import DataError
from mmscale.streaming.plan import TOO_LONG, Draw, Drop, PlannedStep, PlanState
from mmscale.streaming.state import JUDGED_FROM, StreamFacts, StreamState
from mmscale.types import Skip


def facts(num_rows=6, max_bad=0.01, **unplanned):
    rows = {"a": num_rows, "b": 10_000}
    return StreamFacts({"shards": "x"}, ("a", "b"), rows, {"a": unplanned, "b": {}}, max_bad)


def step(rows, epoch=0, dropped=(), source_idx=0):
    draws = tuple(Draw(source_idx, row, epoch, 5) for row in rows)
    return PlannedStep((draws,), tuple(Drop(source_idx, r, epoch, TOO_LONG) for r in dropped), 0, PlanState(window=1))


def skip(row, epoch=0, reason="decode_image"):
    return Skip(f"a/0.tar:{row}", reason, "cut off", 512, "a", epoch)


def test_a_complete_epoch_is_told_and_forgotten(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    state = StreamState(facts(quarantined=4))
    with caplog.at_level(logging.INFO, "mmscale"):
        state = state.after(step([0, 1], dropped=[5]), [skip(1)])
        assert state.account == {("a", 0): {"delivered": 1, "decode_image": 1, TOO_LONG: 1}}
        state = StreamState.from_dict(json.loads(json.dumps(state.to_dict())), state.facts)
        state = state.after(step([2], epoch=1), [])
        state = state.after(step([2, 3, 4]), [skip(3), skip(2, reason="length")])
    assert state.account == {("a", 1): {"delivered": 1}}
    (line,) = [r.getMessage() for r in caplog.records]
    counts = f"(decode_image 2, length 1, quarantined 4, {TOO_LONG} 1)"
    assert line == f"epoch 0 of 'a': indexed 10 = delivered 2 + skipped 8 {counts}"
    assert (state.num_seen, state.num_skipped, state.num_bad) == (7, 4, 3)
    assert state.plan == PlanState(window=1) and state.num_epochs == pytest.approx(7 / 10_006)


def test_states_are_values():
    state = StreamState(facts())
    state.after(step([0]), [])
    assert state.account == {} and state.num_seen == 0


def test_a_sample_that_comes_twice_is_an_error():
    state = StreamState(facts(num_rows=2)).after(step([0]), [])
    with pytest.raises(DataError, match="expected 2 samples, each once, found 3"):
        state.after(step([1, 1]), [])


def test_a_skip_that_was_never_drawn_is_an_error():
    with pytest.raises(DataError, match="each once"):
        StreamState(facts()).after(step([0]), [skip(0), skip(1)])


def test_the_share_of_bad_samples_is_judged_late_and_not_for_long_ones():
    rows = range(JUDGED_FROM - 1)
    few = StreamState(facts(JUDGED_FROM * 2)).after(step(rows), [skip(r) for r in range(100)])
    with pytest.raises(DataError, match=r"max_bad=1\.0%.*100 of 1000 \(10\.0%\).*decode_image in 'a' 100"):
        few.after(step([0], source_idx=1), [])
    at_the_limit = [skip(r) for r in range(10)]
    state = StreamState(facts(JUDGED_FROM * 2)).after(step(range(JUDGED_FROM), dropped=range(1000, 1900)), at_the_limit)
    assert state.num_skipped == 910
