"""The next step's packs are made while this one computes, on the group of the replica and beside collectives of the main thread."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grids import grid

from mmscale.parallel.comm import sum_ints
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.share import Sharing
from mmscale.train.ahead import Ahead


def steps_of(num_steps: int, log: list[str], fault_at: int | None = None) -> Any:
    """A stream of steps without packs that notes in which thread it works."""
    try:
        for step in range(num_steps):
            if step == fault_at:
                raise ValueError(f"fault in step {step}")
            log.append(threading.current_thread().name)
            yield SimpleNamespace(packs=(), places=(), num_packs=0, step=step)
    finally:
        log.append(f"closed by {threading.current_thread().name}")


def go_ahead(mesh: Any, num_steps: int) -> tuple[list[int], list[str], bool]:
    """(steps in the order taken, log of the stream, whether a step was made while the main thread was busy)"""
    own, log, taken, was_early = grid(mesh, 1, mesh.world_size, 1), [], [], True
    with Ahead(steps_of(num_steps, log), Sharing(own)) as ahead:
        for step in range(num_steps):
            batch, shared = ahead.take()
            assert shared.batches == ()
            taken.append(batch.step)
            if step == num_steps - 1:
                break
            ahead.begin()
            ahead.begin()  # twice is once
            sum_ints(own, [step])
            until = time.monotonic() + 60
            while len(log) < step + 2 and time.monotonic() < until:
                time.sleep(0.001)
            was_early &= len(log) == step + 2
            if step % 2:
                ahead.settle()
    return taken, log, was_early


def fail_ahead(mesh: Any, rank: int) -> tuple[str, float]:
    """(what this rank raised, seconds that leaving took) when the stream of `rank` fails while its peer's thread waits for it."""
    own, log = grid(mesh, 1, mesh.world_size, 1), []
    started, said = time.monotonic(), ""
    try:
        with Ahead(steps_of(3, log, fault_at=1 if own.rank == rank else 2), Sharing(own)) as ahead:
            ahead.take()
            ahead.begin()
            sum_ints(own, [1])
            if own.rank == rank:
                ahead.take()
            raise RuntimeError("the peer has failed")
    except (ValueError, RuntimeError) as error:
        said = str(error)
    return said, time.monotonic() - started


@pytest.mark.parametrize("meets_ranks", [False, True])
def test_the_caller_makes_what_has_not_begun_and_what_ranks_agree_on(meets_ranks: bool) -> None:
    """The first step starts the loader's processes, which the kernel ends with the thread that started them."""
    log: list[str] = []
    main, early = threading.current_thread().name, "ahead"
    with Ahead(steps_of(4, log), Sharing(Mesh(0, 1, 0, 1, torch.device("cpu"))), meets_ranks=meets_ranks) as ahead:
        for step in range(4):
            assert ahead.take()[0].step == step
            if step != 1:
                ahead.begin()
        with pytest.raises(StopIteration):
            ahead.take()
    made_by = [main] * 4 if meets_ranks else [main, early, main, early]
    assert log == [*made_by, f"closed by {main if meets_ranks else early}"]


def test_steps_are_made_ahead_and_in_order(ranks) -> None:
    for taken, log, was_early in ranks(2).run(go_ahead, 6):
        assert taken == list(range(6)) and was_early
        assert log == [log[0], *["ahead"] * 5, "closed by ahead"] and log[0] != "ahead"


def test_a_fault_is_raised_where_it_is_taken_and_its_peers_are_not_waited_for(ranks) -> None:
    results = ranks(2).run(fail_ahead, 0)
    assert results[0][0] == "fault in step 1" and results[1][0] == "the peer has failed"
    assert all(seconds < 60 for _, seconds in results)


def test_a_failed_rank_ends_with_its_code_while_its_thread_waits() -> None:
    """What it waits for may end while Python takes itself down, and C++ would abort then."""
    code = """
import datetime, threading, time
import torch.distributed as dist
from mmscale.cli.main import _leave
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
wait = lambda: store.wait(["never"], datetime.timedelta(seconds=0.5))
threading.Thread(target=wait, name="ahead", daemon=True).start()
time.sleep(0.2)
_leave(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
