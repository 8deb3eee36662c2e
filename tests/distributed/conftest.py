from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # also handed on to the spawned ranks

from gloo_ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2)` gives two gloo processes, started at the first use and kept for the tests of a file."""
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if (
            world_size not in pools or pools[world_size].is_closed
        ):  # a failed test ends its pool, not the tests after it
            pools[world_size] = Ranks(world_size)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()
