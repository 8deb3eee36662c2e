"""Where a rank is and how long it may stay there: one small file per rank, read by the agent that watches it.

Imports no torch. The limit of a phase is learned: `hang_factor` times the longest seen since the start-up, never below
`hang_floor_s`; what has not been seen yet may take `setup_limit_s`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mmscale.config.env import AgentLink
from mmscale.config.schema import WatchConfig
from mmscale.logging import get_logger

log = get_logger(__name__)

FOLDER = "heartbeats"
RECORD_BYTES = 256
SELF_ABORT_DELAY_S = 30.0
"""How much later than the agent a rank ends itself: the agent can name the slowest rank, and a rank without agent still ends."""

REARM_S = 1.0
"""The alarm by which a rank ends itself is exact to this; setting it starts a thread, which costs more than the rest of a beat."""

PHASES = ("setup", "data", "step", "eval", "save", "stop")
"""In the order in which they follow each other within a step."""

SHARED_DISK_PHASES = {"save": 3.0}
"""Phases whose time hangs on a file system that others use too: the floor of their limit is so many times higher."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank said last. `at`: unix seconds at which `phase` began; `limit_s`: how long it may last."""

    rank: int
    pid: int
    host: str
    step: int
    phase: str
    at: float
    limit_s: float


class Limits:
    """How long each phase may last, learned from how long it took."""

    def __init__(self, watch: WatchConfig) -> None:
        self._watch = watch
        self._longest: dict[str, float] = {}

    def learn(self, phase: str, seconds: float) -> None:
        """Notes that `phase` took `seconds`. After a start-up everything is new: all other phases are forgotten."""
        if phase == "setup":
            self._longest.clear()
        else:
            self._longest[phase] = max(seconds, self._longest.get(phase, 0.0))

    def limit_s(self, phase: str) -> float:
        """How long `phase` may last, in seconds."""
        longest = self._longest.get(phase)
        if longest is None:
            return self._watch.setup_limit_s
        floor_s = self._watch.hang_floor_s * SHARED_DISK_PHASES.get(phase, 1.0)
        return max(floor_s, self._watch.hang_factor * longest)


class Heartbeat:
    """Says in which phase one rank is; begins with `setup`. Cost of `phase`: one write of 256 bytes."""

    def __init__(self, folder: Path, rank: int, watch: WatchConfig, agent: AgentLink | None = None) -> None:
        """Args:
        folder: the run directory; nothing is written there before `publish`.
        agent: that watches this rank; it does not depend on the run directory, in which the other nodes' agents look.
        """
        self._agent = agent
        self._path = beat_path(folder, rank)
        who = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()}
        self._head = json.dumps(who)[:-1]
        self._watch, self._limits = watch, Limits(watch)
        self._file: int | None = None
        self._is_refused = False
        self._alarm_at = 0.0
        self._name, self._since = "setup", time.monotonic()
        self.phase("setup", 0)

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the watch of the rank over itself; the file stays, and says where the rank was."""
        faulthandler.cancel_dump_traceback_later()
        self._close()

    def publish(self) -> None:
        """Makes the file that the agent reads; called once the run directory belongs to this attempt, and after a rollback."""
        self._close()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            self._say_unwritten(error)
        self._write()

    def phase(self, name: str, step: int) -> None:
        """Says that `name` (one of PHASES) of `step` begins now."""
        now = time.monotonic()
        self._limits.learn(self._name, now - self._since)
        self._name, self._since = name, now
        limit_s = self._limits.limit_s(name)
        text = f'{self._head}, "step": {step}, "phase": "{name}", "at": {time.time():.3f}, "limit_s": {limit_s:.1f}}}'
        self._record = text.encode().ljust(RECORD_BYTES - 1) + b"\n"
        self._write()
        self._arm(now, limit_s)

    def _write(self) -> None:
        if self._agent is not None:
            os.pwrite(self._agent.beat_fd, self._record, 0)
        if self._file is not None:
            try:
                os.pwrite(self._file, self._record, 0)
            except OSError as error:  # a disk that refuses must not end a run that trains
                self._say_unwritten(error)

    def _say_unwritten(self, error: OSError) -> None:
        if not self._is_refused:
            self._is_refused = True
            log.warning(
                "%s cannot be written: %s; training goes on, other nodes do not see this rank",
                self._path,
                error,
                all_ranks=True,
            )

    def _arm(self, now: float, limit_s: float) -> None:
        """The second net, for a rank whose agent is gone: a thread in C prints all stacks and ends the process.

        Not before `setup_limit_s`: this rank may wait for another one, which has a longer limit, and only the agent sees both.
        """
        alarm_at = now + max(limit_s, self._watch.setup_limit_s) + SELF_ABORT_DELAY_S
        if abs(alarm_at - self._alarm_at) > REARM_S:
            self._alarm_at = alarm_at
            faulthandler.dump_traceback_later(alarm_at - now, exit=True, file=2)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def clear_beats(folder: Path) -> None:
    """Removes the heartbeats of earlier attempts from a run directory, whose ranks may still hold them open."""
    for path in (folder / FOLDER).glob("rank_*.json"):
        path.unlink(missing_ok=True)


def beat_path(folder: Path, rank: int) -> Path:
    """The heartbeat file of a rank in a run directory."""
    return folder / FOLDER / f"rank_{rank:05d}.json"


def read_beat(path: Path) -> Beat | None:
    """What a rank said last; None when the file is not there, cannot be read, or holds no whole record."""
    try:
        return parse_beat(path.read_bytes())
    except OSError:
        return None


def parse_beat(record: bytes) -> Beat | None:
    """The beat in a record; None when it is none or not whole."""
    try:
        beat = Beat(**json.loads(record))
    except (ValueError, TypeError):
        return None
    return beat if beat.phase in PHASES else None
