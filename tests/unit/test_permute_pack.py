"""The permutation is a bijection that looks random; packing loses nothing, overfills nothing and wastes little."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.streaming.draws import decode_numbers, encode_numbers
from mmscale.streaming.pack import cost_imbalance, pack_documents
from mmscale.streaming.permute import permute, shuffle_blocks, shuffled
from mmscale.streaming.state import pack_json


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


@given(st.integers(1, 5000), st.integers(1, 200), st.integers(0, 99))
def test_shuffled_blocks_are_a_bijection_and_stay_together(size, block, key):
    rows = shuffle_blocks(np.arange(size), size, block, f"{key}")
    assert sorted(rows.tolist()) == list(range(size))
    block = max(1, min(block, size // 1024))
    apart = (np.diff(rows) % size != 1).sum()
    assert apart <= size // block + 1  # a jump at most behind every block and before the rest
    assert (shuffle_blocks(np.arange(size)[size // 3 :], size, block, f"{key}") == rows[size // 3 :]).all()


def test_blocks_have_other_borders_in_every_epoch():
    orders = [shuffle_blocks(np.arange(70_000), 70_000, 64, f"{e}") for e in range(3)]
    borders = [set((o[np.flatnonzero(np.diff(o) != 1) + 1] % 64).tolist()) for o in orders]
    assert len({frozenset(b) for b in borders}) == 3
    assert all((a != b).mean() > 0.99 for a, b in pairwise(orders))
    assert abs(np.corrcoef(np.arange(70_000), orders[0])[0, 1]) < 0.05


def test_a_whole_shuffle_is_a_bijection_by_key():
    for size in (0, 1, 2, 1000):
        assert sorted(shuffled(size, "a").tolist()) == list(range(size))
    assert (shuffled(1000, "a") != shuffled(1000, "b")).mean() > 0.98
    assert abs(np.corrcoef(np.arange(1000), shuffled(1000, "a"))[0, 1]) < 0.1


def best_fit_decreasing(lengths, capacity):
    """The textbook algorithm, as the standard that the packing is held against."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


documents = st.integers(1, 64).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.tuples(st.integers(1, c), st.integers(0, 5)), max_size=200))
)


@given(documents, st.none() | st.integers(5, 12))
def test_packs_hold_everything_once_within_capacity(case, most):
    capacity, rows = case
    lengths, inputs = (np.array([r[i] for r in rows], np.int64) for i in (0, 1))
    packs = pack_documents(lengths, capacity, inputs, most)
    assert sorted(i for p in packs.lists() for i in p) == list(range(len(rows)))
    assert packs.sums(lengths).tolist() == [sum(lengths[p].tolist()) for p in packs.lists()]
    assert all(load <= capacity for load in packs.sums(lengths))
    assert all(p for p in packs.lists())
    if most is not None:
        assert all(total <= most for total in packs.sums(inputs))
    else:  # the two emptiest packs would have been one
        loads = sorted(packs.sums(lengths).tolist())
        assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(documents)
def test_as_few_packs_as_best_fit_decreasing_or_one_more(case):
    capacity, rows = case
    lengths = [r[0] for r in rows]
    assert len(pack_documents(np.array(lengths, np.int64), capacity)) <= best_fit_decreasing(lengths, capacity) + 1


def test_the_longest_that_fits_goes_in_next():
    # 7 leaves room for 3, not for 4; so 4 goes with 6
    assert pack_documents(np.array([6, 7, 3, 4]), 10).lists() == [[1, 2], [0, 3]]


def test_with_a_limit_both_resources_run_out_together():
    # by length alone the packs would be 50 + 50 with 4 inputs each, and the short ones without
    lengths, inputs = np.array([50, 50, 50, 50, 49, 49, 49, 49]), np.array([2, 2, 2, 2, 0, 0, 0, 0])
    assert len(pack_documents(lengths, 100, inputs, 2)) == 4
    assert len(pack_documents(lengths, 100)) == 4


def test_pack_count_stays_at_the_lower_bound():
    rng = np.random.default_rng(5)
    lengths = np.exp(rng.normal(np.log(300), 1.0, 5000)).astype(int).clip(16, 4096)
    assert len(pack_documents(lengths, 4096)) <= 1.005 * -(-lengths.sum() // 4096)


def test_some_packs_can_be_picked_and_reordered():
    packs = pack_documents(np.array([9, 5, 5, 3, 3, 3]), 10)
    assert packs.lists() == [[0], [1, 2], [3, 4, 5]]
    picked = packs[np.array([2, 0])]
    assert picked.lists() == [[3, 4, 5], [0]] and picked.sizes.tolist() == [3, 1]
    assert len(packs[np.array([], np.int64)]) == 0 and packs[np.array([], np.int64)].lists() == []


def test_imbalance_is_the_wait_for_the_dearest():
    assert cost_imbalance([2, 2, 3, 1], 2) == (1.25, 1.5)
    assert cost_imbalance([5, 5, 5, 5, 100], 4) == (1.0, 1.0)  # the rest of a turn says nothing


@given(st.lists(st.sets(st.integers(0, 1 << 45), max_size=100), max_size=5))
def test_numbers_survive_as_text(runs):
    arrays = [np.array(sorted(run), np.int64) for run in runs]
    found = decode_numbers(encode_numbers(arrays), [len(a) for a in arrays])
    assert [f.tolist() for f in found] == [a.tolist() for a in arrays]


def test_numbers_take_few_bits(seed):
    rng = np.random.default_rng(seed)
    for total, some, bits in ((1 << 16, 1 << 16, 1.0), (1 << 16, 1 << 15, 2.2), (1 << 16, 1 << 14, 3.6)):
        text = encode_numbers([np.sort(rng.choice(total, some, replace=False)) + 10**12])
        print(f"{some} of {total}: {len(text)} bytes")
        assert len(text) * 6.4 / some < bits + 0.1
    assert len(pack_json(encode_numbers([np.arange(1 << 16)]))) < 500  # all of a window


@pytest.mark.parametrize("text", ["", "not packed", "0" * 40])
def test_damaged_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        decode_numbers(text, [3])
    with pytest.raises(ValueError, match="expected 3 numbers, found 2"):
        decode_numbers(encode_numbers([np.array([1, 2])]), [3])
