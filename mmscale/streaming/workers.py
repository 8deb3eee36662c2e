"""Planned packs in, finished packs out, in the same order, through worker processes or in this process.

A worker that dies or hangs costs the sample it was at: another process takes its place and its tasks, and that sample becomes
filler like any other that fails. What ends the run is sent as a value and raised in the trainer's process.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NoReturn

from mmscale.config.env import set_env_default
from mmscale.errors import ConfigError, DataError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming import transport
from mmscale.streaming.make_pack import Divide, Fault, Source, make_pack
from mmscale.streaming.plan import Pack
from mmscale.streaming.process import LoaderProcess
from mmscale.types import PackedBatch

__all__ = ["Source", "read_packs"]

log = get_logger(__name__)

MAX_RESTARTS = 3
"""Restarts in one worker's place without a finished pack between them."""

MAX_RESTARTS_PER_1000 = 20
"""Restarts of all workers within 1000 packs."""

_LOOK_S = 0.25
"""While it waits, the trainer looks so often how its workers are."""


def read_packs(
    sources: Sequence[Source],
    packs: Iterator[Pack],
    num_workers: int,
    prefetch: int,
    timeout_s: float,
    divide: Divide | None = None,
) -> Generator[PackedBatch, None, None]:
    """The finished packs of `packs`, in order; close the generator to end its worker processes.

    Args:
        sources: what `Draw.source_idx` points into.
        packs: asked for in this process, `num_workers * prefetch` packs ahead.
        num_workers: processes; 0 works in this process.
        prefetch: packs that each worker prepares ahead.
        timeout_s: a sample that a worker decodes for longer, while the trainer waits for it, is given up.
        divide: see `make_pack`.

    Raises:
        DataError: a shard changed while it was read, or workers die again and again.
    """
    if not num_workers:
        for pack in packs:
            yield make_pack(sources, pack, divide=divide)
        return
    # The tokenizer's threads do not survive a fork; without this the library says so once per worker.
    set_env_default("TOKENIZERS_PARALLELISM", "false")
    tasks = (_Task(number, pack) for number, pack in enumerate(packs))
    with _Pool(sources, num_workers, timeout_s, divide) as pool:
        for task in islice(tasks, num_workers * prefetch):
            pool.give(task)
        while pool.is_busy:
            result = pool.next_result()
            for task in islice(tasks, 1):
                pool.give(task)
            yield result


@dataclass(frozen=True)
class _Task:
    """A pack to be made, its number in the run, and its documents at which a worker has ended."""

    number: int
    pack: Pack
    faults: Mapping[int, Fault] = field(default_factory=dict)


class _WorkerEnded(Exception):
    """A worker has died, or hung and was killed. `document`: the number in its pack that it was at, -1 = none."""

    def __init__(self, document: int, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.document = document
        self.fault = fault


class _Worker:
    """A process with its place in the pool, and the tasks that it owes, oldest first."""

    def __init__(self, sources: Sequence[Source], timeout_s: float, divide: Divide | None) -> None:
        self._sources = sources
        self._timeout_s = timeout_s
        self._divide = divide
        self.owed: deque[_Task] = deque()
        self.restarts = 0
        self.start()

    def start(self) -> None:
        """Starts a process, which begins with the oldest task owed."""
        self._at = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared with the process: the document that it is at
        self._at[0] = -1
        self._unsent = bytearray().join(transport.message(task) for task in self.owed)
        self._process = LoaderProcess(_work, self._sources, self._at, self._divide)

    def give(self, task: _Task) -> None:
        """Adds a task; never waits."""
        self.owed.append(task)
        self._unsent += transport.message(task)
        self._push()

    def result(self) -> PackedBatch | MmscaleError:
        """What came of the oldest task owed. Raises _WorkerEnded; the process is gone then."""
        at, waited_s = -1, 0.0
        while True:
            began = time.monotonic()
            try:
                if self._has_news():
                    result = transport.receive(self._process.channel)
                    break
            except EOFError:
                self._died()
            if not self._process.is_alive:
                self._died()
            if at != self._at[0]:
                at, waited_s = self._at[0], 0.0
            # What the trainer has seen, not the clock: a run that was suspended has no slow samples.
            waited_s += min(time.monotonic() - began, _LOOK_S)
            if at >= 0 and waited_s > self._timeout_s:
                self.end()
                raise _WorkerEnded(at, Fault("decode_timeout", f"still being decoded after {self._timeout_s:g} s"))
        self.owed.popleft()
        self.restarts = 0
        return result

    def end(self) -> str:
        """Kills the process if it still lives; gives how it ended."""
        return self._process.end()

    def _died(self) -> NoReturn:
        ended = self.end()
        raise _WorkerEnded(self._at[0], Fault("worker_died", f"the loader process ended with {ended}"))

    def _push(self) -> None:
        """Sends what the socket takes of the tasks: a trainer that waited here could wait for one who waits for it."""
        try:
            while self._unsent:
                del self._unsent[: self._process.channel.send(self._unsent, socket.MSG_DONTWAIT)]
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass  # full, or gone, which is noticed where its result is awaited

    def _has_news(self) -> bool:
        """Whether something came within `_LOOK_S`, the end of the process included."""
        self._push()
        poll = select.poll()
        poll.register(self._process.channel, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        return any(events & ~select.POLLOUT for _, events in poll.poll(_LOOK_S * 1000))


class _Pool:
    """Worker processes that take tasks in turn, so that their results come in the order of the tasks."""

    def __init__(self, sources: Sequence[Source], num_workers: int, timeout_s: float, divide: Divide | None) -> None:
        self._sources = sources
        self._workers = [_Worker(sources, timeout_s, divide) for _ in range(num_workers)]
        self._owner = os.getpid()
        self._given = self._taken = 0
        self._ends: deque[tuple[int, str]] = deque()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_error: object) -> None:
        if os.getpid() == self._owner:  # and not a fork of it that cleans up what it inherited
            for worker in self._workers:
                worker.end()

    @property
    def is_busy(self) -> bool:
        """Whether results are still to come."""
        return self._taken < self._given

    def give(self, task: _Task) -> None:
        """Gives a task to the worker whose turn it is."""
        self._workers[self._given % len(self._workers)].give(task)
        self._given += 1

    def next_result(self) -> PackedBatch:
        """The pack of the oldest task. Raises the error that ends the run."""
        worker = self._workers[self._taken % len(self._workers)]
        while True:
            try:
                result = worker.result()
                break
            except _WorkerEnded as end:
                self._replace(worker, end)
        self._taken += 1
        if isinstance(result, MmscaleError):
            raise result
        return result

    def _replace(self, worker: _Worker, end: _WorkerEnded) -> None:
        """Another process in the place of one that has ended; the document that it was at had its one try."""
        task, where = worker.owed[0], "between samples"
        if end.document >= 0:
            draw = task.pack[end.document]
            where = f"at {self._sources[draw.source_idx].shards.id(draw.row)}"
            worker.owed[0] = replace(task, faults={**task.faults, end.document: end.fault})
        log.warning("%s: %s, %s; another one takes its place", end.fault.reason, end, where, all_ranks=True)
        worker.restarts += 1
        self._ends.append((task.number, f"{where} ({end})"))
        while self._ends[0][0] <= task.number - 1000:
            self._ends.popleft()
        if worker.restarts > MAX_RESTARTS or len(self._ends) > MAX_RESTARTS_PER_1000:
            raise DataError(_too_many([text for _, text in self._ends]))
        worker.start()


def _too_many(ends: Sequence[str]) -> str:
    most = (
        f"at most {MAX_RESTARTS} ends of loader processes per finished pack and {MAX_RESTARTS_PER_1000} in 1000 packs"
    )
    found = f"found {len(ends)}: {'; '.join(ends)}"
    remedy = (
        "look for an out-of-memory kill and lower data.workers or data.prefetch, or remove the samples; start again"
    )
    return f"expected {most}, {found}; {remedy}"


def _work(channel: socket.socket, sources: Sequence[Source], at: memoryview, divide: Divide | None) -> None:
    """A worker's life: tasks in, results out, until the trainer closes its end."""

    def start(document: int) -> None:
        at[0] = document

    while True:
        try:
            task: _Task = transport.receive(channel)
            transport.send(channel, _result(sources, task, start, divide))
        except EOFError:
            return


def _result(
    sources: Sequence[Source], task: _Task, start: Callable[[int], None], divide: Divide | None
) -> PackedBatch | MmscaleError:
    try:
        return make_pack(sources, task.pack, task.faults, start, divide)
    except DataError as error:
        return error
    except MmscaleError as error:
        return ConfigError(str(error))
    except Exception as error:  # the worker's border
        log.exception("unexpected failure in a loader process", all_ranks=True)
        ids = ", ".join(sources[d.source_idx].shards.id(d.row) for d in task.pack[:3])
        found = f"found {type(error).__name__}: {error}"
        return DataError(f"expected a pack of {ids}, ..., {found}; the traceback is in the log above")
