"""A process forked from the trainer that works for it until the trainer ends it or is gone, with a socket between the two."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

import torch

_LOOK_UP_S = 2.0
"""The process looks so often whether its trainer still lives."""

_END_S = 10.0
"""Seconds after which a killed process that does not go (it may hang in a file system) is left to itself."""

_PR_SET_PDEATHSIG = 1


class LoaderProcess:
    """A running process; `channel` is the trainer's end of the socket."""

    def __init__(self, work: Callable[..., None], *arguments: object) -> None:
        """Starts `work(channel, *arguments)` with the other end of the socket; nothing is pickled."""
        self.channel, theirs = socket.socketpair()
        by_main = threading.current_thread() is threading.main_thread()
        everything = (work, theirs, self.channel, by_main, arguments)
        self._process = multiprocessing.get_context("fork").Process(target=_run, args=everything, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def end(self) -> str:
        """Kills it if it still lives; gives how it ended."""
        self._process.kill()
        self._process.join(_END_S)
        self.channel.close()
        code = self._process.exitcode
        return signal.Signals(-code).name if code and code < 0 else f"exit code {code}"


def _run(
    work: Callable[..., None],
    channel: socket.socket,
    trainers: socket.socket,
    by_main: bool,
    arguments: tuple[object, ...],
) -> None:
    trainers.close()
    _settle_in(by_main)
    work(channel, *arguments)


def _settle_in(by_main: bool) -> None:
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
