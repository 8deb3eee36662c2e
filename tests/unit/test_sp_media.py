"""Who encodes which media, and where the rows go: balance, locality, and rows that arrive where they are used."""

import numpy as np
import pytest
import torch

from mmscale.parallel.sp.media import TowerInput, plan_media, route_media

TOWERS = {"image": TowerInput(3, 2.0), "video": TowerInput(3, 2.0), "audio": TowerInput(4, 5.0)}


def loads(costs, owner, ranks):
    return np.bincount(owner, weights=costs, minlength=ranks)


def test_dearest_first_is_close_to_even(seed):
    """Longest first leaves at most one item between two ranks, and is even to 2 % when no item is large."""
    rng = np.random.default_rng(seed)
    for _ in range(200):
        ranks, n = int(rng.integers(1, 17)), int(rng.integers(1, 400))
        costs = rng.choice([1.0, 2.5, 7.0], n)
        load = loads(costs, plan_media(costs.tolist(), ranks), ranks)
        assert load.max() - load.min() <= costs.max()
        if n >= 200 and ranks <= 8:
            assert load.max() / load.mean() <= 1 + costs.min() / load.mean() + 1e-9


def test_every_modality_is_spread(seed):
    """Vision and audio inputs together are even, and neither is left to one rank."""
    rng = np.random.default_rng(seed)
    costs = [2.0] * 64 + [5.0] * 32
    owner = plan_media(costs, 4, rng.integers(0, 4, (96, 4)))
    assert loads(costs, owner, 4).tolist() == [72.0] * 4
    assert np.bincount(owner[:64]).tolist() == [16] * 4
    assert np.bincount(owner[64:]).tolist() == [8] * 4


def test_inputs_are_encoded_where_they_are_used():
    """Among equal loads the rank that uses the rows gets the input, so nothing has to travel."""
    used = np.repeat(np.eye(4, dtype=np.int64), 5, axis=0)[::-1] * 7
    assert plan_media([1.0] * 20, 4, used).tolist() == used.argmax(1).tolist()
    assert plan_media([1.0], 4, np.array([[0, 0, 3, 0]])).tolist() == [2]


def routed(inputs, routings, rank, rows):
    """What arrives at a rank when input i of a modality has the rows `rows[modality][i]`, by the tables alone."""
    arrived = []
    for origin, routing in enumerate(routings):
        own = [rows[m][i] for m in ("image", "video", "audio") for i in inputs[origin].get(m, ())]
        encoded = torch.cat([torch.zeros(0), *own])
        start = sum(routing.num_sent[:rank])
        arrived.append(encoded[routing.send_rows[start : start + routing.num_sent[rank]]])
    return torch.cat(arrived)


def random_case(rng):
    """A source index with media in it, some rows unused, some used twice, and positions dealt to ranks with padding."""
    total, ranks = int(rng.integers(20, 120)), int(rng.integers(2, 7))
    counts = {m: int(rng.integers(0, 9)) for m in TOWERS}
    counts = {m: n for m, n in counts.items() if n}
    num_rows = sum(TOWERS[m].rows * n for m, n in counts.items())
    source = np.arange(total)
    if num_rows:
        at = rng.permutation(total)[: int(rng.integers(0, total))]
        source[at] = total + rng.integers(0, num_rows, len(at))
    padded = total + -total % ranks
    return total, ranks, counts, source, rng.permutation(padded).reshape(ranks, -1)


def test_rows_arrive_where_they_are_used(seed):
    """Every position finds the row it had in the whole pack; a row is sent once per rank that uses it, others never."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        total, ranks, counts, source, holders = random_case(rng)
        numbers = iter(range(total, total + 10_000))  # a row's value is its number among all rows
        rows = {m: [torch.tensor([float(next(numbers)) for _ in range(TOWERS[m].rows)]) for _ in range(n)]
                for m, n in counts.items()}  # fmt: skip
        inputs, routings, sources = route_media(source, holders, counts, TOWERS)
        for m, n in counts.items():
            assert sorted(int(i) for own in inputs for i in own.get(m, ())) == list(range(n))
        for rank, held in enumerate(holders):
            arrived = routed(inputs, routings, rank, rows)
            whole = torch.cat([torch.from_numpy(held).float(), arrived])[torch.from_numpy(sources[rank])]
            expected = [source[t] if t < total else t for t in held]
            assert whole.tolist() == [float(x) for x in expected]
            assert routings[rank].num_received == tuple(r.num_sent[rank] for r in routings)
            used = {source[t] for t in held if t < total and source[t] >= total}
            assert len(arrived) == len(used) == len(set(arrived.tolist()))


def test_rows_that_nobody_uses_stay(seed):
    """A part-filled window has rows without a position."""
    source = np.arange(8)
    source[2:4] = [8, 10]
    _, routings, _ = route_media(source, [np.arange(4), np.arange(4, 8)], {"audio": 1}, TOWERS)
    assert [r.num_sent for r in routings] == [(2, 0), (0, 0)]
    assert routings[0].send_rows.tolist() == [0, 2]


@pytest.mark.parametrize("ranks", [2, 5])
def test_no_media(ranks):
    """Text alone makes empty tables."""
    held = np.arange(10 * ranks).reshape(ranks, 10)
    inputs, routings, sources = route_media(np.arange(10 * ranks), held, {}, TOWERS)
    assert inputs == [{}] * ranks
    assert all(r.send_rows.numel() == 0 and sum(r.num_received) == 0 for r in routings)
    assert all(s.tolist() == list(range(10)) for s in sources)
