"""Nested mixtures as flat sources with exact shares, and the refusals."""

import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from mmscale.config.mixture import check_mixture, leaf_sources, mixture_shares
from mmscale.config.schema import CostConfig, SourceConfig
from mmscale.errors import ConfigError
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.plan import Plan, PlanRules, PlanState


def leaf(**keys):
    return SourceConfig(path=keys.pop("path", "p"), **keys)


def group(sources, **keys):
    return SourceConfig(sources=sources, **keys)


NESTED = {
    "web": group({"docs": leaf(weight=3), "pages": leaf(weight=1)}, weight=0.5, template="plain"),
    "photos": leaf(weight=0.3),
    "clips": group({"a": leaf(repeat=2), "b": group({"x": leaf(), "y": leaf(template="own")})}, weight=0.2),
}
ROWS = {"web.docs": 10, "web.pages": 99, "photos": 5, "clips.a": 10, "clips.b.x": 20, "clips.b.y": 60}


def test_leaves_have_dotted_names_in_order_and_inherit_the_template():
    leaves = leaf_sources(NESTED)
    assert list(leaves) == ["clips.a", "clips.b.x", "clips.b.y", "photos", "web.docs", "web.pages"]
    assert [s.template for s in leaves.values()] == [None, None, "own", None, "plain", "plain"]


def test_a_weight_is_shared_out_and_sizes_count_their_repeats():
    shares = mixture_shares(NESTED, ROWS)
    assert shares == {
        "web.docs": Fraction(3, 8), "web.pages": Fraction(1, 8), "photos": Fraction(3, 10),
        "clips.a": Fraction(1, 25), "clips.b.x": Fraction(1, 25), "clips.b.y": Fraction(3, 25),
    }  # fmt: skip
    assert sum(shares.values()) == 1


def test_repeats_of_a_mixture_count_for_all_below_it():
    sources = {"a": leaf(), "g": group({"b": leaf(repeat=2), "c": leaf()}, repeat=3)}
    shares = mixture_shares(sources, {"a": 10, "g.b": 10, "g.c": 10})
    assert [shares[n] for n in ("a", "g.b", "g.c")] == [Fraction(1, 10), Fraction(6, 10), Fraction(3, 10)]


def shuffled(sources, rng):
    names = rng.sample(list(sources), len(sources))
    return {
        n: group(shuffled(sources[n].sources, rng), **plain(sources[n])) if sources[n].sources else sources[n]
        for n in names
    }


def plain(source):
    return {k: v for k, v in source.model_dump(exclude_defaults=True).items() if k != "sources"}


def plan_of(sources):
    shares = mixture_shares(sources, ROWS)
    made = []
    for name in leaf_sources(sources):
        tokens = np.full(ROWS[name], 10, np.uint32)
        none = np.zeros(ROWS[name], np.uint16)
        made.append(PlanSource(name, tokens, none, none, {}, shares[name]))
    return Plan(made, PlanRules(100, 4, 64, 0, 64, None, CostConfig(token=1, pair=0)))


def test_the_order_of_keys_says_nothing(seed):
    other = shuffled(NESTED, random.Random(seed))
    assert mixture_shares(other, ROWS) == mixture_shares(NESTED, ROWS)
    one, two = (zip(range(100), plan_of(s).packs(PlanState()), strict=False) for s in (NESTED, other))
    assert [p for _, (p, _, _) in one] == [p for _, (p, _, _) in two]


def test_the_drawn_ratio_is_within_a_percent_of_the_shares():
    plan = plan_of(NESTED)
    draws, packs = Counter(), plan.packs(PlanState())
    while sum(draws.values()) < 20_000:
        draws.update(plan.sources[d.source_idx].name for d in next(packs)[0])
    packs.close()
    for name, share in mixture_shares(NESTED, ROWS).items():
        assert draws[name] / sum(draws.values()) == pytest.approx(float(share), rel=0.01)


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ({"a": leaf(weight=1), "b": leaf()}, r"data\.sources: .*none on b"),
        ({"g": group({"a": leaf(weight=1), "b": leaf()})}, r"data\.sources\.g\.sources: .*none on b"),
        ({"a": leaf(weight=1, repeat=3)}, r"data\.sources\.a: repeat=3 beside weight=1.*weight=3"),
        ({"a": SourceConfig()}, r"data\.sources\.a: expected `path` or `sources`, found neither"),
        ({"a": SourceConfig(path="x", sources={"b": leaf()})}, "found both"),
        ({"g": group({})}, r"data\.sources\.g\.sources: expected at least one"),
        ({"g": group({"a": leaf()}, max_samples=5)}, r"data\.sources\.g\.max_samples=5.*on the sources below"),
        ({"g": group({"a": leaf()}, max_epochs=5)}, r"data\.sources\.g\.max_epochs=5"),
    ],
)
def test_what_is_no_mixture_is_refused(sources, text):
    with pytest.raises(ConfigError, match=text):
        check_mixture("data.sources", sources)


def test_two_names_that_become_one_are_refused():
    with pytest.raises(ConfigError, match=r"named 'a\.b'"):
        leaf_sources({"a": group({"b": leaf()}), "a.b": leaf()})


def test_a_good_mixture_passes():
    check_mixture("data.sources", NESTED)
