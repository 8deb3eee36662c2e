"""A stop flag set by signals, and the tie of a rank to the agent that started it.

Imports nothing heavy, so that the handlers stand before torch is imported.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from types import FrameType

from mmscale.config.env import AgentLink

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STACKS_SIGNAL = signal.SIGUSR2
"""Makes a rank print the stacks of all its threads."""

_STANDARD_ERROR = 2
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Whether the run was asked to stop, and by which signal. The trainer saves at the next step boundary and exits 0."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def install(self) -> StopFlag:
        """Takes over SIGTERM, SIGUSR1 (sent by schedulers before the time limit) and SIGINT; a second SIGINT quits at once.

        An agent starts its ranks with these signals blocked, so that one that comes before this waits here and is not lost.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.signal_name == "SIGINT":
            raise KeyboardInterrupt
        self.signal_name = name
        # a bare write: a handler must not enter logging or buffered streams, whose locks the interrupted code may hold
        os.write(_STANDARD_ERROR, f"\n{name}: saving at the next step, then stopping\n".encode())


def tie_to_agent(agent: AgentLink | None) -> None:
    """Lets STACKS_SIGNAL print this process's stacks, and ends the process when its agent is gone.

    In C: it works while Python is stuck. Without the tie, ranks whose agent was killed would train on beside the next attempt.

    Args:
        agent: None = this process was started by something else; its stacks go to standard error.
    """
    file = _STANDARD_ERROR if agent is None else agent.stacks_fd
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)
    if agent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent.pid:  # it was gone before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
