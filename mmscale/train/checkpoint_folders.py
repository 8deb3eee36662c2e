"""The checkpoint folders of a run: which of them count, which are set aside, which are deleted. Imports no torch.

checkpoints/
  step_00000120.4711.0.tmp/  being written by attempt 4711.0; removed at the next start
  step_00000120/             complete: the rename is the commit
  .bad-step_00000110-0/      rejected, with the reason in the log
  latest                     name of the newest folder, for people; nothing here trusts it
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mmscale.errors import CheckpointError
from mmscale.logging import get_logger
from mmscale.train.attempt import Attempt, Lineage
from mmscale.train.manifest import folder_step, verify_checkpoint

log = get_logger(__name__)
_Stamp = tuple[tuple[str, int, int], ...]

_whole: dict[Path, _Stamp] = {}
"""Folders that this process wrote or verified, so that each is hashed once while its files keep size and time."""


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, the newest first."""
    found = [(step, path) for path in root.glob("step_*") if (step := folder_step(path.name)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def problems_of(path: Path, lineage: Lineage | None) -> list[str]:
    """As `verify_checkpoint`; hashes a folder once only."""
    stamp = _stamp(path)
    problems = verify_checkpoint(path, lineage, hashes=_whole.get(path) != stamp)
    if not problems:
        _whole[path] = stamp
    return problems


def mark_whole(path: Path) -> None:
    """Notes that this process has just written the folder, so that nobody hashes it again."""
    _whole[path] = _stamp(path)


def clear_left_overs(root: Path, attempt: Attempt | None) -> list[Path]:
    """The checkpoint folders, the newest first; what interrupted saves have left is removed.

    Raises:
        FencedError: another attempt owns the run, so nothing may be changed here.
    """
    for path in root.glob("*.tmp"):
        _check_owner(attempt)
        log.warning("removing %s, left over from an interrupted save", path)
        # an attempt that has not noticed yet that it lost the run may still write there; what stays is in nobody's way
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return list_checkpoints(root)


def look_at(path: Path, attempt: Attempt | None) -> tuple[list[str], bool]:
    """What is wrong with a folder as far as its manifest and the sizes of its files tell, and whether its content is known already.

    Args:
        attempt: the one that looks; None = every whole folder counts.
    """
    lineage = None if attempt is None else attempt.lineage()
    return verify_checkpoint(path, lineage, hashes=False), _whole.get(path) == _stamp(path)


def reject(path: Path, problems: list[str], attempt: Attempt | None) -> None:
    """Sets a folder aside. Raises FencedError when another attempt owns the run."""
    _check_owner(attempt)
    set_aside(path, problems)


def refuse_to_begin_again(root: Path) -> None:
    """Raises CheckpointError when the run has saved before, as none of its checkpoints is whole."""
    rejected = sorted(path.name for path in root.glob(".bad-step_*"))
    if rejected or (root / "latest").exists():
        raise CheckpointError(
            f"expected a whole checkpoint in {root}, found none, though the run has saved before (rejected: "
            f"{', '.join(rejected) or 'none, the folders are gone'}); restore one from a backup, or move {root} away to "
            "start again from step 0"
        )


def set_aside(path: Path, problems: list[str]) -> None:
    """Renames a folder that does not count, so that its step can be saved again."""
    names = (path.with_name(f".bad-{path.name}-{number}") for number in itertools.count())
    bad = next(name for name in names if not name.exists())  # some may have been removed to make room
    os.rename(path, bad)
    log.error("checkpoint %s is rejected and renamed to %s: %s", path.name, bad.name, "; ".join(problems[:5]))


def prune(
    root: Path, keep_last: int, keep_every: int | None = None, lineage: Lineage | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> None:  # fmt: skip
    """Deletes what is older than the newest `keep_last` folders that count, but for multiples of `keep_every` steps.

    With fewer that count, nothing is deleted. Raises OSError.
    """
    kept = 0
    for path in list_checkpoints(root):
        if wants_stop():
            return
        if kept < max(keep_last, 1):
            kept += not problems_of(path, lineage)
        elif keep_every is None or (folder_step(path.name) or 0) % keep_every:
            # Renamed first: a kill half way through the deletion leaves a name that the next start removes.
            doomed = path.with_name(f"{path.name}.old.tmp")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
            _whole.pop(path, None)


def _check_owner(attempt: Attempt | None) -> None:
    if attempt is not None:
        attempt.check_owner()


def _stamp(path: Path) -> _Stamp:
    stats = (
        sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(path)) if path.is_dir() else []
    )
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
