"""The agent of one node: starts its ranks, hands signals on, watches for death and hangs. Imports no torch.

    health check -> ranks -> every 0.25 s: signals, dead ranks; every second: heartbeats

It never starts a rank again: the job script does that, with everything new.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmscale.cluster.health import check_node
from mmscale.cluster.watch import Hang, find_hang, is_halted, worst_of
from mmscale.config.env import AgentLink, Launch, node_name_from_env, rank_environment
from mmscale.config.schema import Config
from mmscale.logging import get_logger
from mmscale.train.attempt import ATTEMPTS, read_json, record_error, write_json, write_text
from mmscale.train.heartbeat import RECORD_BYTES, Beat, parse_beat
from mmscale.train.signals import STACKS_SIGNAL, STOP_SIGNALS

log = get_logger(__name__)

POLL_S = 0.25
LOOK_EVERY_S = 1.0
GRACE_S = 5.0
"""After the death of a rank the others, whose collectives fail, may say for so long what they found."""

SPREAD_S = 2.0
"""From the discovery of a hang to the end of the ranks: the agents of the other nodes look once a second and take their stacks too."""

STACKS_S = 1.0
CONSEQUENCES = (signal.SIGABRT, signal.SIGTERM)
"""How ranks end because another one has: libraries abort their process when a collective fails, SLURM ends all tasks of the step."""

KILL_S = 10.0
"""A killed process that does not go for so long hangs in the kernel and is left to it."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a run, and the address of rank 0."""

    rank: int
    num_nodes: int
    ranks_per_node: int
    master_addr: str
    master_port: int

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.num_nodes * self.ranks_per_node


class Rank:
    """A rank that this agent has started."""

    def __init__(self, node: Node, local_rank: int, arguments: Sequence[str], attempt: str) -> None:
        """Starts `mmscale train` with `arguments`."""
        self.number = node.rank * node.ranks_per_node + local_rank
        self.stacks = os.memfd_create(f"stacks of rank {self.number}")
        self._beats = os.memfd_create(f"heartbeat of rank {self.number}")
        launch = Launch(
            self.number, local_rank, node.world_size, node.master_addr, node.master_port, node.ranks_per_node
        )
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mmscale", "train", *arguments],
            env=rank_environment(launch, AgentLink(os.getpid(), self.stacks, self._beats), attempt),
            pass_fds=[self.stacks, self._beats],
            process_group=0,  # a terminal's Ctrl-C comes to the agent alone, which hands it on
        )
        self.beat: Beat | None = None

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def was_killed(self) -> bool:
        """True when it was ended by a signal that is no consequence of another rank's end."""
        code = self.process.returncode
        return code is not None and code < 0 and -code not in CONSEQUENCES

    @property
    def in_setup(self) -> bool:
        """True while the rank has nothing to save."""
        return self.beat is None or self.beat.phase == "setup"

    def look(self) -> None:
        """Reads the rank's heartbeat."""
        self.beat = parse_beat(os.pread(self._beats, RECORD_BYTES, 0)) or self.beat

    def beat_or(self, setup_limit_s: float) -> Beat:
        """What the rank said last; before its first word, that it starts up."""
        silent = Beat(self.number, self.process.pid, socket.gethostname(), 0, "setup", self.started, setup_limit_s)
        return self.beat or silent

    def stack_text(self) -> str:
        """The stacks that the rank has printed so far."""
        return os.pread(self.stacks, 1 << 20, 0).decode(errors="replace")


class Agent:
    """The agent of one node and its ranks."""

    def __init__(self, config: Config, node: Node, arguments: Sequence[str], attempt: str | None) -> None:
        """Args:
        arguments: of `mmscale train`.
        attempt: token given by the job script; None makes one up.
        """
        self._config, self._node, self._arguments = config, node, arguments
        self._run = Path(config.run.dir)
        self._host = socket.gethostname()
        self._attempt = attempt or f"local.{self._host}.{os.getpid()}.{int(time.time())}"
        self._folder = self._run / ATTEMPTS / self._attempt
        self._ranks: list[Rank] = []

    def run(self) -> int:
        """Starts the ranks and waits for their end; gives the exit code: 0 all ended well, 2 refused input, 1 anything else.

        STOP_SIGNALS are blocked when it is called, so that the ranks start with them blocked.
        """
        if not self._is_healthy():
            return 1
        try:
            for local_rank in range(self._node.ranks_per_node):
                self._ranks.append(Rank(self._node, local_rank, self._arguments, self._attempt))
            return self._watch()
        finally:
            self._kill()

    def _is_healthy(self) -> bool:
        found = check_node(self._config, self._node.ranks_per_node)
        node = node_name_from_env() or self._host
        self._note("health", {"host": self._host, "node": node, "problems": found.problems, "warnings": found.warnings})
        for text in found.warnings:
            log.warning("node %s: %s", node, text, all_ranks=True)
        if found.problems:
            log.error(
                "node %s is not fit to train: %s; repair it, or start without it", node, "; ".join(found.problems)
            )
        return not found.problems

    def _watch(self) -> int:
        """Waits until all ranks have ended, one has failed, or they hang."""
        looked = 0.0
        while True:
            received = signal.sigtimedwait(STOP_SIGNALS, POLL_S)
            # a process that was frozen and wakes up may be told of a signal of number 0
            if received is not None and received.si_signo in STOP_SIGNALS and self._hand_on(received.si_signo):
                return 0
            codes = [rank.process.poll() for rank in self._ranks]
            if any(codes):
                return self._after_death()
            if all(code == 0 for code in codes):
                return 0
            if time.monotonic() - looked >= LOOK_EVERY_S:
                looked = time.monotonic()
                hang = self._find_hang()
                if hang is not None:
                    self._report_hang(hang)
                    return 1

    def _hand_on(self, number: int) -> bool:
        """Passes a signal to the ranks; True when there was nothing to save, and they were ended."""
        name = signal.Signals(number).name
        self._note("signal", {"signal": name})
        self._look()
        if all(rank.in_setup for rank in self._ranks):
            log.info("node %d: %s during start-up, nothing to save", self._node.rank, name, all_ranks=True)
            self._kill()
            return True
        for rank in self._ranks:
            if rank.is_alive:
                rank.process.send_signal(number)
        return False

    def _after_death(self) -> int:
        """Names the ranks that failed first, and gives the others time to say what they found."""
        self._look()
        for rank in self._ranks:
            if rank.process.returncode:
                log.error("%s; the other ranks are ended", self._death_text(rank))
            if rank.was_killed:
                self._record(partial(record_error, self._folder, rank.number, self._death_text(rank), "killed"))
        _wait(lambda: not any(rank.is_alive for rank in self._ranks), GRACE_S)
        refused = any(rank.process.returncode == 2 for rank in self._ranks)
        self._kill()
        return 2 if refused else 1

    def _death_text(self, rank: Rank) -> str:
        code = rank.process.returncode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        beat = rank.beat_or(0.0)
        last = f"its last word, {time.time() - beat.at:.1f} s ago: step {beat.step}, phase {beat.phase}"
        return f"rank {rank.number} (process {rank.process.pid} on {self._host}) {how}; {last}"

    def _look(self) -> None:
        for rank in self._ranks:
            rank.look()

    def _find_hang(self) -> Hang | None:
        """The rank that holds up the run, as this agent or that of another node sees it."""
        self._look()
        places, theirs = self._places(), self._hangs_of_others()
        return worst_of([*theirs, *places]) if theirs else find_hang(places, self._run, self._node.world_size)

    def _places(self) -> list[Hang]:
        """Where the ranks of this node are."""
        limit_s = self._config.run.watch.setup_limit_s
        return [Hang(rank.beat_or(limit_s), is_halted(rank.process.pid)) for rank in self._ranks if rank.is_alive]

    def _hangs_of_others(self) -> list[Hang]:
        """What the agents of other nodes have found."""
        if self._node.num_nodes == 1:
            return []
        own = f"hang-{self._node.rank}.json"
        paths = [path for path in self._folder.glob("hang-*.json") if path.name != own]
        return [Hang.from_dict(record) for path in paths if (record := read_json(path)) is not None]

    def _report_hang(self, hang: Hang) -> None:
        """Takes the stacks of this node's ranks and says which rank of the run holds up the others."""
        alive = [rank for rank in self._ranks if rank.is_alive]
        places = self._places()
        for rank in alive:
            rank.process.send_signal(STACKS_SIGNAL)
        self._note("hang", hang.to_dict(time.time()))
        _wait(lambda: len(self._hangs_of_others()) == self._node.num_nodes - 1, SPREAD_S)
        for rank in alive:
            rank.process.send_signal(signal.SIGCONT)  # a stopped process prints its stacks only now
        _wait(lambda: all(rank.stack_text() for rank in alive), STACKS_S)
        hang = worst_of([hang, *self._hangs_of_others()])  # another node may know of a process that does not run
        beat, now = hang.beat, time.time()
        log.error(
            "hang: rank %d on %s is at step %d, phase %s since %.0f s, the limit is %.0f s%s; the stacks of this node's ranks follow, and "
            "the ranks are ended",
            beat.rank, beat.host, beat.step, beat.phase, now - beat.at, beat.limit_s, " (its process does not run)" if hang.is_halted else "",
        )  # fmt: skip
        text = "\n".join(_stack_text(rank, place) for rank, place in zip(alive, places, strict=True))
        log.error("%s", text)
        name = f"stacks-{self._node.rank}.txt"
        self._record(lambda: write_text(self._folder / name, text))
        self._note("hang", {**hang.to_dict(now), "stacks": name})

    def _note(self, kind: str, content: Mapping[str, Any]) -> None:
        """Writes what happened on this node into the attempt's folder."""
        path = self._folder / f"{kind}-{self._node.rank}.json"
        self._record(lambda: write_json(path, {"at": time.time(), **content}))

    def _record(self, write: Callable[[], None]) -> None:
        """Writes a file of the attempt, which has a folder once the job script or rank 0 has made one."""
        if not self._folder.is_dir():
            return
        try:
            write()
        except OSError as error:  # a full disk must not end a run that trains
            log.warning("%s: %s; what happened on this node is in the log only", self._folder, error, all_ranks=True)

    def _kill(self) -> None:
        """Ends all ranks at once."""
        for rank in self._ranks:
            if rank.is_alive:
                rank.process.kill()
        if not _wait(lambda: not any(rank.is_alive for rank in self._ranks), KILL_S):
            alive = [rank.process.pid for rank in self._ranks if rank.is_alive]
            log.error("processes %s do not end when killed; the node hangs in its kernel", alive)


def _stack_text(rank: Rank, place: Hang) -> str:
    beat = place.beat
    state = ", its process did not run" if place.is_halted else ""
    head = f"--- rank {rank.number}, process {rank.process.pid} on {beat.host}: step {beat.step}, phase {beat.phase}{state}"
    return f"{head}\n{rank.stack_text() or 'no stack: it did not answer'}"


def _wait(is_true: Callable[[], bool], limit_s: float) -> bool:
    """Whether it became true within `limit_s` seconds."""
    limit = time.monotonic() + limit_s
    while not is_true():
        if time.monotonic() > limit:
            return False
        time.sleep(POLL_S / 5)
    return True
