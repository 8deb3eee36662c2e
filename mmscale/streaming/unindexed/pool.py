"""The readers of one rank in processes of their own, their packs in turn, so that the order depends on their number only.

A process that dies or hangs costs the sample it was at: another takes its place, reads on from what its predecessor had sent,
and the sample is skipped by name.
"""

from __future__ import annotations

import json
import mmap
import select
import socket
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from mmscale.config.env import set_env_default
from mmscale.errors import ConfigError, DataError, MmscaleError
from mmscale.logging import get_logger
from mmscale.streaming import transport
from mmscale.streaming.process import LoaderProcess
from mmscale.streaming.unindexed.progress import Place, Progress, advance, place_of
from mmscale.streaming.unindexed.reader import Reader, Reading, ReadPack
from mmscale.streaming.workers import MAX_RESTARTS
from mmscale.types import Skip

log = get_logger(__name__)

_LOOK_S = 0.25
_AT_BYTES = 4096


def read_stream(
    reading: Reading, reader_idxs: Sequence[int], prefetch: int, timeout_s: float, in_processes: bool
) -> Generator[ReadPack, None, None]:
    """The packs of some readers in turn, until the first of them has no more; close the generator to end their processes.

    Args:
        reading: what all readers of the run share.
        reader_idxs: the readers of this rank.
        prefetch: packs that each process prepares ahead.
        timeout_s: a sample that is decoded for longer in a process is given up.
        in_processes: a process for each reader; False works in this one.

    Raises:
        DataError: a shard cannot be reached, too many bad samples, or processes that die again and again.
    """
    if not in_processes:
        turns = [Reader(reading, i, reading.dealt).packs() for i in reader_idxs]
        while True:
            for packs in turns:
                pack = next(packs, None)
                if pack is None:
                    return
                yield pack
    # The tokenizer's threads do not survive a fork; without this the library says so once per worker.
    set_env_default("TOKENIZERS_PARALLELISM", "false")
    workers: list[_Worker] = []
    try:
        for i in reader_idxs:
            workers.append(_Worker(reading, i, prefetch, timeout_s))
        while True:
            for worker in workers:
                pack = worker.next_pack()
                if pack is None:
                    return
                yield pack
    finally:
        for worker in workers:
            worker.end()


class _Ended(Exception):
    """A process has died, or hung and was killed. `at`: the sample that it was at and its id; None = none."""

    def __init__(self, at: tuple[Place, str] | None, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.at = at
        self.reason = reason


class _Worker:
    """A reader in a process. `_progress` has all that its packs held, so that another process can go on behind them."""

    def __init__(self, reading: Reading, reader_idx: int, prefetch: int, timeout_s: float) -> None:
        self._reading = reading
        self._reader_idx = reader_idx
        self._prefetch = prefetch
        self._timeout_s = timeout_s
        self._progress = reading.dealt
        self._lost: list[tuple[Place, Skip]] = []  # where processes ended, to be told with the next pack
        self._restarts = 0
        self._start()

    def next_pack(self) -> ReadPack | None:
        """The reader's next pack, None behind the last. Raises the error that ends the run."""
        while True:
            try:
                pack = self._receive()
                break
            except _Ended as end:
                self._replace(end)
        if isinstance(pack, MmscaleError):
            raise pack
        if pack is None:
            return None
        self._restarts = 0
        self._ask(1)
        if self._lost:
            batch = replace(pack.batch, skipped=(*(skip for _, skip in self._lost), *pack.batch.skipped))
            pack = replace(pack, batch=batch, taken=(*(place for place, _ in self._lost), *pack.taken))
            self._lost = []
        self._progress = advance(self._progress, pack.taken, pack.ended)
        return pack

    def end(self) -> str:
        """Kills the process if it still lives; gives how it ended."""
        return self._process.end()

    def _start(self) -> None:
        self._at = mmap.mmap(-1, _AT_BYTES)  # shared with the process: the sample that it is at
        progress = advance(self._progress, [place for place, _ in self._lost], [])
        self._process = LoaderProcess(_work, self._reading, self._reader_idx, progress, self._at)
        self._ask(self._prefetch)

    def _ask(self, num_packs: int) -> None:
        # when it is gone, that is noticed where its pack is awaited
        with suppress(BrokenPipeError, ConnectionResetError):
            self._process.channel.send(bytes(num_packs))

    def _receive(self) -> ReadPack | MmscaleError | None:
        at, waited_s = b"", 0.0
        while True:
            began = time.monotonic()
            try:
                if select.select([self._process.channel], [], [], _LOOK_S)[0]:
                    return transport.receive(self._process.channel)
            except EOFError:
                self._died()
            if not self._process.is_alive:
                self._died()
            now = self._at[:]
            if now != at:
                at, waited_s = now, 0.0
            # What the trainer has seen, not the clock: a run that was suspended has no slow samples.
            waited_s += min(time.monotonic() - began, 2 * _LOOK_S)
            if any(at[:4]) and waited_s > self._timeout_s:
                self.end()
                raise _Ended(_read_at(self._at), "decode_timeout", f"still being decoded after {self._timeout_s:g} s")

    def _died(self) -> NoReturn:
        ended = self.end()
        raise _Ended(_read_at(self._at), "worker_died", f"the loader process ended with {ended}")

    def _replace(self, end: _Ended) -> None:
        where = "between samples"
        if end.at is not None:
            place, sample_id = end.at
            where = f"at {sample_id}"
            source = self._reading.sources[place.source_idx]
            epoch, _ = place_of(place.unit, len(source.shards), f"{self._reading.seed}/{source.name}")
            self._lost.append((place, Skip(sample_id, end.reason, str(end), source=source.name, epoch=epoch)))
        log.warning("%s: %s, %s; another process takes its place", end.reason, end, where, all_ranks=True)
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise DataError(
                f"expected at most {MAX_RESTARTS} ends of a loader process without a pack between them, found one more, {where} "
                f"({end}); look for an out-of-memory kill and lower data.workers or data.prefetch, and start again"
            )
        self._start()


def _work(
    channel: socket.socket, reading: Reading, reader_idx: int, progress: Sequence[Progress], at: mmap.mmap
) -> None:
    """A process's life: a pack for every byte that comes, until the trainer closes its end."""
    packs = Reader(reading, reader_idx, progress, lambda here: _write_at(at, here)).packs()
    while channel.recv(1):
        result: ReadPack | MmscaleError | None
        try:
            result = next(packs, None)
        except DataError as error:
            result = error
        except MmscaleError as error:
            result = ConfigError(str(error))
        except Exception as error:  # the worker's border
            log.exception("unexpected failure in a loader process", all_ranks=True)
            result = DataError(f"a loader process failed with {type(error).__name__}: {error}; see its traceback above")
        transport.send(channel, result)


def _write_at(at: mmap.mmap, here: tuple[Place, str] | None) -> None:
    """The length last, and 0 = nowhere until then: a process may be killed at any point of this."""
    at[:4] = bytes(4)
    if here is not None:
        data = json.dumps([here[0], here[1][:512]]).encode()
        at[4 : 4 + len(data)] = data
        at[:4] = len(data).to_bytes(4, "little")


def _read_at(at: mmap.mmap) -> tuple[Place, str] | None:
    """What a process that is gone was at."""
    size = int.from_bytes(at[:4], "little")
    if not size:
        return None
    place, sample_id = json.loads(at[4 : 4 + size])
    return Place(*place), sample_id
