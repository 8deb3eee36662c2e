"""What ranks find out about each other: a slow one, and a sum that is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from mmscale.config.schema import WatchConfig
from mmscale.errors import ParallelError
from mmscale.parallel.links import check_links
from mmscale.parallel.mesh import Mesh
from mmscale.train import straggler
from mmscale.train.straggler import StragglerReport


def train_with_a_slow_rank(mesh: Mesh, slow_rank: int) -> Any:
    events = []
    reporter = SimpleNamespace(event=lambda name, step, **details: events.append((name, step, details)))
    report = StragglerReport(mesh, WatchConfig(straggler_every=2, straggler_ratio=3.0), reporter)  # type: ignore[arg-type]
    width = dict(straggler.PROBE_WIDTH)
    try:
        if mesh.rank == slow_rank:
            straggler.PROBE_WIDTH["cpu"] = 8 * width["cpu"]  # 512 times the work
        for step in range(1, 7):
            report.after_step(step, 0.0, 1.0)
    finally:
        straggler.PROBE_WIDTH.update(width)
    return [(name, step, details["rank"], details["kind"]) for name, step, details in events]


def test_a_slow_rank_is_named_by_rank_0_from_the_second_look_on(ranks) -> None:
    named = ranks(2).run(train_with_a_slow_rank, 1)
    assert named == [[("straggler", 4, 1, "compute"), ("straggler", 6, 1, "compute")], []]


def first_sum(mesh: Mesh, broken_rank: int) -> Any:
    all_reduce = dist.all_reduce

    def wrong(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        result = all_reduce(tensor, *args, **kwargs)
        tensor[7] += mesh.rank == broken_rank  # a bit that flipped on the way
        return result

    dist.all_reduce = wrong
    try:
        check_links(mesh, 240)
    except ParallelError as error:
        return str(error)
    finally:
        dist.all_reduce = all_reduce
    return None


def test_the_first_sum_is_checked(ranks) -> None:
    assert ranks(2).run(first_sum, -1) == [None, None]
    sound, broken = ranks(2).run(first_sum, 1)
    assert sound is None
    assert "rank 1 on" in broken and "found 1 of 262144 numbers wrong" in broken
