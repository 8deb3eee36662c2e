"""A stop flag set by signals. Imports nothing heavy, so that the handler stands before torch is imported."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Whether the run was asked to stop, and by which signal. The trainer saves at the next step boundary and exits 0."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def install(self) -> StopFlag:
        """Takes over SIGTERM, SIGUSR1 (sent by schedulers before the time limit) and SIGINT; a second SIGINT quits at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = name
        # a bare write: a handler must not enter logging or buffered streams, whose locks the interrupted code may hold
        os.write(2, f"\n{name}: saving at the next step, then stopping\n".encode())
