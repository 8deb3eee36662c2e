from __future__ import annotations

from typing import Any

from mmscale.parallel.comm import (
    all_gather_objects,
    barrier,
    broadcast_object,
    gather_objects,
    max_ints,
    sum_floats,
    sum_ints,
)
from mmscale.parallel.mesh import Mesh


def all_collectives(mesh: Mesh) -> Any:
    rank = mesh.rank
    barrier(mesh)
    return (
        sum_ints(mesh, [rank, 2**40]),
        max_ints(mesh, [rank, -rank]),
        sum_floats(mesh, [10.0 ** (16 * (rank % 2)), 0.1]),
        gather_objects(mesh, {"rank": rank}),
        broadcast_object(mesh, f"from {rank}"),
        all_gather_objects(mesh, f"of {rank}"),
    )


def test_collectives_give_every_rank_the_same(ranks) -> None:
    results = ranks(4).run(all_collectives)
    for rank, (sums, largest, floats, gathered, sent, all_gathered) in enumerate(results):
        assert sums == [6, 2**42] and largest == [3, 0] and sent == "from 0"
        assert floats == [((1.0 + 1e16) + 1.0) + 1e16, ((0.1 + 0.1) + 0.1) + 0.1]
        assert all_gathered == [f"of {r}" for r in range(4)]
        assert gathered == ([{"rank": r} for r in range(4)] if rank == 0 else None)


def who(mesh: Mesh) -> Any:
    return mesh.rank, mesh.dp_rank, mesh.dp_size, mesh.world_size, mesh.is_main, mesh.host_group is mesh.grads.group


def test_each_rank_knows_its_place(ranks) -> None:
    assert ranks(2).run(who) == [(0, 0, 2, 2, True, True), (1, 1, 2, 2, False, True)]
