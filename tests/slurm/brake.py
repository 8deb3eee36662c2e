"""Makes a run slow for a while, with the configuration that all others have, so that what takes SLURM half a minute hits it at work."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType

import psutil

from mmscale.train.heartbeat import beat_path, read_beat

LOOK_EVERY_S = 0.02


class Brake:
    """While it is held, a run makes one step per `pause_s`: its rank 0 is halted for so long once in each step."""

    def __init__(self, run: Path, pause_s: float = 1.5) -> None:
        """
        Args:
            run: the run directory.
            pause_s: less than `run.watch.hang_floor_s`, or the run is taken for hung.
        """
        self._path, self._pause_s = beat_path(run, 0), pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._hold_back, daemon=True)

    def __enter__(self) -> Brake:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._is_over.set()
        self._thread.join()

    def _hold_back(self) -> None:
        seen = (0, 0)
        while not self._is_over.wait(LOOK_EVERY_S):
            beat = read_beat(self._path)
            if beat is None or beat.phase != "step" or seen == (beat.pid, beat.step):
                continue
            seen = (beat.pid, beat.step)
            with contextlib.suppress(psutil.NoSuchProcess):  # the rank has ended, which the test is about
                rank = psutil.Process(beat.pid)
                rank.suspend()
                self._is_over.wait(self._pause_s)
                rank.resume()
