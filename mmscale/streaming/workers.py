"""Planned packs in, finished packs out, in the same order, through worker processes or in this process.

A worker that dies or hangs costs the sample it was at: another process takes its place and its tasks, and that sample becomes
filler like any other that fails. What ends the run is sent as a value and raised in the trainer's process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import mmap
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import NoReturn

import torch

from mmscale.config.env import set_env_default
from mmscale.errors import ConfigError, DataError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming import transport
from mmscale.streaming.make_pack import Fault, Source, make_pack
from mmscale.streaming.plan import Pack
from mmscale.types import PackedBatch

__all__ = ["Source", "read_packs"]

log = get_logger(__name__)

MAX_RESTARTS = 3
"""Restarts in one worker's place without a finished pack between them."""

MAX_RESTARTS_PER_1000 = 20
"""Restarts of all workers within 1000 packs."""

_LOOK_S = 0.25
"""While it waits, the trainer looks so often how its workers are."""

_LOOK_UP_S = 2.0
"""A worker looks so often whether its trainer still lives."""

_END_S = 10.0
"""Seconds after which a killed process that does not go (it may hang in a file system) is left to itself."""

_PR_SET_PDEATHSIG = 1


def read_packs(
    sources: Sequence[Source], packs: Iterator[Pack], num_workers: int, prefetch: int, timeout_s: float
) -> Generator[PackedBatch, None, None]:
    """The finished packs of `packs`, in order; close the generator to end its worker processes.

    Args:
        sources: what `Draw.source_idx` points into.
        packs: asked for in this process, `num_workers * prefetch` packs ahead.
        num_workers: processes; 0 works in this process.
        prefetch: packs that each worker prepares ahead.
        timeout_s: a sample that a worker decodes for longer, while the trainer waits for it, is given up.

    Raises:
        DataError: a shard changed while it was read, or workers die again and again.
    """
    if not num_workers:
        for pack in packs:
            yield make_pack(sources, pack)
        return
    # The tokenizer's threads do not survive a fork; without this the library says so once per worker.
    set_env_default("TOKENIZERS_PARALLELISM", "false")
    tasks = (_Task(number, pack) for number, pack in enumerate(packs))
    with _Pool(sources, num_workers, timeout_s) as pool:
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
    """A process with its place in the pool, the tasks that it owes, oldest first, and the trainer's end of the socket."""

    def __init__(self, sources: Sequence[Source], timeout_s: float) -> None:
        self._sources = sources
        self._timeout_s = timeout_s
        self.owed: deque[_Task] = deque()
        self.restarts = 0
        self.start()

    def start(self) -> None:
        """Starts a process, which begins with the oldest task owed."""
        self._at = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared with the process: the document that it is at
        self._at[0] = -1
        self._channel, others = socket.socketpair()
        self._unsent = bytearray().join(transport.message(task) for task in self.owed)
        by_main = threading.current_thread() is threading.main_thread()
        arguments = (self._sources, others, self._at, by_main, self._channel)
        self._process = multiprocessing.get_context("fork").Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        others.close()

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
                    result = transport.receive(self._channel)
                    break
            except EOFError:
                self._died()
            if not self._process.is_alive():
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
        self._process.kill()
        self._process.join(_END_S)
        self._channel.close()
        code = self._process.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"

    def _died(self) -> NoReturn:
        ended = self.end()
        raise _WorkerEnded(self._at[0], Fault("worker_died", f"the loader process ended with {ended}"))

    def _push(self) -> None:
        """Sends what the socket takes of the tasks: a trainer that waited here could wait for one who waits for it."""
        try:
            while self._unsent:
                del self._unsent[: self._channel.send(self._unsent, socket.MSG_DONTWAIT)]
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass  # full, or gone, which is noticed where its result is awaited

    def _has_news(self) -> bool:
        """Whether something came within `_LOOK_S`, the end of the process included."""
        self._push()
        poll = select.poll()
        poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        return any(events & ~select.POLLOUT for _, events in poll.poll(_LOOK_S * 1000))


class _Pool:
    """Worker processes that take tasks in turn, so that their results come in the order of the tasks."""

    def __init__(self, sources: Sequence[Source], num_workers: int, timeout_s: float) -> None:
        self._sources = sources
        self._workers = [_Worker(sources, timeout_s) for _ in range(num_workers)]
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


def _work(
    sources: Sequence[Source], channel: socket.socket, at: memoryview, by_main: bool, trainers: socket.socket
) -> None:
    """A worker's life: tasks in, results out, until the trainer closes its end."""
    trainers.close()
    settle_in(by_main)

    def start(document: int) -> None:
        at[0] = document

    while True:
        try:
            task: _Task = transport.receive(channel)
            transport.send(channel, _result(sources, task, start))
        except EOFError:
            return


def _result(sources: Sequence[Source], task: _Task, start: Callable[[int], None]) -> PackedBatch | MmscaleError:
    try:
        return make_pack(sources, task.pack, task.faults, start)
    except DataError as error:
        return error
    except MmscaleError as error:
        return ConfigError(str(error))
    except Exception as error:  # the worker's border
        log.exception("unexpected failure in a loader process", all_ranks=True)
        ids = ", ".join(sources[d.source_idx].shards.id(d.row) for d in task.pack[:3])
        found = f"found {type(error).__name__}: {error}"
        return DataError(f"expected a pack of {ids}, ..., {found}; the traceback is in the log above")


def settle_in(by_main: bool) -> None:
    """Makes a forked process a worker; `by_main`: the main thread forked it.

    It leaves signals to the trainer, which finishes its step and saves, and for that still needs its workers. SIGTERM ends it
    only when the trainer itself sends it (Python does when it exits) or is gone; a thread waits for that, so that it works
    while the main thread sits in a decoder. Where it can, the kernel does it too, for a decoder that lets no thread run.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if by_main and sys.platform == "linux":  # the signal comes at the end of the thread that forked, not of its process
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_trainer, args=(os.getppid(),), daemon=True).start()
    faulthandler.enable(2)  # a decoder's crash shows where it was
    gc.freeze()  # or the first collection would copy every page of the trainer's objects
    torch.set_num_threads(1)


def _end_with_trainer(trainer_pid: int) -> None:
    while os.getppid() == trainer_pid:
        info = signal.sigtimedwait({signal.SIGTERM}, _LOOK_UP_S)
        if info is not None and info.si_pid == trainer_pid:
            break
    os._exit(0)
