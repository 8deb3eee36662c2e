"""Checks the shards of a folder one by one, in this process or in several, and tells how many bytes are done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.data_tools.inspection.shard_check import ShardCheck, check_shard
from mmscale.errors import DataError
from mmscale.streaming.manifest import ShardEntry

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

_POLL_S = 0.5


def check_shards(
    folder: Path, todo: Sequence[ShardEntry], decode: bool, workers: int, on_done: Callable[[int], None]
) -> Iterator[tuple[ShardEntry, ShardCheck]]:
    """Each shard with what was found in it, as they get ready.

    Args:
        folder, todo: the dataset folder and the shards to check.
        decode: see `check_shard`.
        workers: processes; 0 works in this one.
        on_done: takes the bytes dealt with so far.

    Raises:
        DataError: a process died.
    """
    if workers:
        yield from _in_processes(folder, todo, decode, min(workers, len(todo) or 1), on_done)
        return
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_done(done)

    for entry in todo:
        yield entry, check_shard(folder, entry, decode, advance)


def _in_processes(
    folder: Path, todo: Sequence[ShardEntry], decode: bool, workers: int, on_done: Callable[[int], None]
) -> Iterator[tuple[ShardEntry, ShardCheck]]:
    # Not forked: the progress bar has a thread, and torch may have some.
    context = multiprocessing.get_context("spawn")
    counter: Synchronized[int] = context.Value("Q", 0)  # type: ignore[assignment]
    pool = ProcessPoolExecutor(workers, context, _init_worker, (counter,))
    try:
        entry_of: dict[Future[ShardCheck], ShardEntry] = {
            pool.submit(_check_in_worker, folder, entry, decode): entry for entry in todo
        }
        waiting = set(entry_of)
        while waiting:
            done, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
            on_done(counter.value)
            for future in done:
                yield entry_of[future], future.result()
    except BrokenProcessPool as error:
        text = f"{folder}: a process of the check died (out of memory, or a decoder crashed)"
        raise DataError(f"{text}; what is done is kept: run it again with fewer --workers, or without") from error
    finally:
        pool.shutdown(cancel_futures=True)


_counter: Synchronized[int] | None = None
"""In a worker process: the bytes that all of them have dealt with."""


def _init_worker(counter: Synchronized[int]) -> None:
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once and without a trace
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)


def _check_in_worker(folder: Path, entry: ShardEntry, decode: bool) -> ShardCheck:
    return check_shard(folder, entry, decode, _advance_all)


def _advance_all(num_bytes: int) -> None:
    assert _counter is not None, "_init_worker runs first"
    with _counter.get_lock():
        _counter.value += num_bytes
