"""Counts what a rank sends and how long it waits for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CommMeter:
    """Bytes sent by this rank, and seconds in which it did nothing but wait, by kind (`ulysses`, `ring`, `media`, ...).

    Bytes are those that leave the rank; what a rank keeps for itself in a collective does not count.
    """

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._calls: dict[str, int] = {}
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, kind: str, num_bytes: int) -> None:
        """Counts one collective of `kind` that sends `num_bytes`."""
        self._bytes[kind] = self._bytes.get(kind, 0) + num_bytes
        self._calls[kind] = self._calls.get(kind, 0) + 1

    @contextmanager
    def waiting(self, device: torch.device) -> Iterator[None]:
        """Times the body as exposed communication: host time on the CPU, time of the current stream on CUDA (no sync)."""
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self._pending.append((began, ended))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes sent since the last `take`, by kind."""
        return dict(self._bytes)

    @property
    def num_calls(self) -> dict[str, int]:
        """Collectives since the last `take`, by kind."""
        return dict(self._calls)

    def take(self) -> tuple[dict[str, int], float]:
        """(bytes by kind, exposed seconds) since the last call; starts again from zero. Waits for CUDA when it was timed."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self._seconds += sum(began.elapsed_time(ended) for began, ended in self._pending) / 1e3
        taken = (dict(self._bytes), self._seconds)
        self._bytes, self._calls, self._seconds, self._pending = {}, {}, 0.0, []
        return taken
