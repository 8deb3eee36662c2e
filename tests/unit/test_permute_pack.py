"""The permutation is a bijection that looks random; packing loses nothing, overfills nothing and wastes little."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.streaming.pack import MEDIA_ROW_COST, TOKEN_COST, best_fit_decreasing, document_costs
from mmscale.streaming.permute import permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size):
    for key in ("a", "b", "0/x/17"):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permutation_depends_on_the_key_and_not_on_the_chunk():
    whole = permute(np.arange(1000), 1000, "seed/0")
    assert (permute(np.arange(300, 500), 1000, "seed/0") == whole[300:500]).all()
    assert (permute(np.arange(1000), 1000, "seed/1") != whole).mean() > 0.98


def test_permutation_does_not_follow_the_index():
    rows = permute(np.arange(10_000), 10_000, "any")
    assert abs(np.corrcoef(np.arange(10_000), rows)[0, 1]) < 0.05
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(9_999), np.arange(1, 10_000))[0, 1]) > 0.99  # the same measure, on a sorted order


def test_small_sets_have_many_orders():
    orders = {tuple(permute(np.arange(3), 3, f"{e}").tolist()) for e in range(60)}
    assert len(orders) == 6


@given(st.integers(1, 64).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=200))))
def test_packs_hold_everything_once_within_capacity(case):
    capacity, lengths = case
    packs = best_fit_decreasing(lengths, capacity)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    loads = sorted(sum(lengths[i] for i in p) for p in packs)
    assert all(load <= capacity for load in loads)
    # the two emptiest packs would have been one
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


def test_best_fit_takes_the_tightest_pack():
    #        6 leaves 4, 7 leaves 3, so 3 must go with 7 and 4 with 6
    assert best_fit_decreasing([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


def test_pack_count_stays_at_the_lower_bound():
    rng = np.random.default_rng(5)
    lengths = np.exp(rng.normal(np.log(300), 1.0, 5000)).astype(int).clip(16, 4096).tolist()
    packs = best_fit_decreasing(lengths, 4096)
    assert len(packs) <= 1.005 * -(-sum(lengths) // 4096)


def test_cost_counts_tokens_pairs_and_media():
    costs = document_costs(np.array([3, 0]), np.array([2, 0]))
    assert costs.tolist() == [3 * TOKEN_COST + 9 + 2 * MEDIA_ROW_COST, 0]
