"""Which rank the others wait for, and whether it has been where it is for too long."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.train.heartbeat import PHASES, Beat, beat_path, read_beat


@dataclass(frozen=True, slots=True)
class Hang:
    """The rank that holds up the others, what it said last, and whether its process does not run."""

    beat: Beat
    is_halted: bool

    def to_dict(self, now: float) -> dict[str, Any]:
        """The hang as `hang-<node>.json` holds it. `now`: unix seconds."""
        beat = self.beat
        slowest = {
            "rank": beat.rank, "host": beat.host, "phase": beat.phase, "step": beat.step, "age_s": round(now - beat.at, 1),
            "halted": self.is_halted,
        }  # fmt: skip
        return {"at": now, "limit_s": beat.limit_s, "phase": beat.phase, "step": beat.step, "slowest": slowest}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Hang:
        """The hang in a record of `to_dict`; the process id is not kept."""
        slowest = record["slowest"]
        began = record["at"] - slowest["age_s"]
        beat = Beat(slowest["rank"], 0, slowest["host"], slowest["step"], slowest["phase"], began, record["limit_s"])
        return cls(beat, slowest["halted"])


def all_beats(folder: Path, world_size: int) -> list[Beat]:
    """What the ranks of a run said last; those of whom nothing can be read are left out."""
    found = (read_beat(beat_path(folder, rank)) for rank in range(world_size))
    return [beat for beat in found if beat is not None]


def is_overdue(beat: Beat, now: float) -> bool:
    """True when a rank has been in its phase for longer than it may. `now`: unix seconds."""
    return now - beat.at > beat.limit_s


def worst_of(hangs: Iterable[Hang]) -> Hang:
    """The rank that holds up the others.

    It is one whose process does not run, else the one that has come least far in the order of steps and phases. Of several at
    one place it is the one that came there last; inside a step they all look alike, and their stacks tell more.

    Example:
        >>> beats = [Beat(rank, 1, "n", 7, phase, 5.0, 9.0) for rank, phase in enumerate(("step", "data"))]
        >>> worst_of(Hang(beat, is_halted=False) for beat in beats).beat.rank
        1
    """
    return min(hangs, key=lambda h: (not h.is_halted, h.beat.step, PHASES.index(h.beat.phase), -h.beat.at))


def find_hang(own: Collection[Hang], folder: Path, world_size: int) -> Hang | None:
    """The slowest rank of the run, when it is overdue and one of this node's ranks is too; else None.

    A rank that waits for another one is not hung as long as that one is within its limit, which may be longer.

    Args:
        own: where this node's ranks are.
    """
    now = time.time()
    if not any(is_overdue(hang.beat, now) for hang in own):  # the common case: no file of another node is opened
        return None
    known = {hang.beat.rank for hang in own}
    others = [Hang(beat, is_halted=False) for beat in all_beats(folder, world_size) if beat.rank not in known]
    worst = worst_of([*own, *others])
    return worst if is_overdue(worst.beat, now) else None


def is_halted(pid: int) -> bool:
    """True when a process is stopped, or waits in the kernel where no signal reaches it (a dead file system)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it is gone
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t", "D")
