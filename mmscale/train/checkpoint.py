"""Writes, finds and prunes checkpoints. A checkpoint is either complete and verified, or it does not exist.

checkpoints/
  step_00000120.tmp/     being written; removed at the next start
  step_00000120/         complete: the rename is the commit
  .bad-step_00000110-0/  rejected at a start, with the reason in the log
  latest                 name of the newest folder, for people; nothing here trusts it
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import mmscale
from mmscale.errors import CheckpointError
from mmscale.logging import get_logger
from mmscale.parallel.comm import barrier, broadcast_object, gather_objects
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.mesh import Mesh
from mmscale.train.checkpoint_reader import (
    FORMAT,
    MANIFEST,
    TRAINER,
    CheckpointReader,
    file_record,
    folder_name,
    folder_step,
    open_checkpoint,
    verify_checkpoint,
)
from mmscale.train.checkpoint_writer import write_chunks

__all__ = [
    "CheckpointReader",
    "find_checkpoint",
    "newest_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]

log = get_logger(__name__)
T = TypeVar("T")
_Stamp = tuple[tuple[str, int, int], ...]


def save_checkpoint(
    root: Path, step: int, engine: Engine, trainer_state: Mapping[str, Any], mesh: Mesh, keep_last: int
) -> Path:
    """The folder of the new checkpoint, complete on disk.

    Args:
        root: `<run.dir>/checkpoints`, on a file system that all ranks share.
        step: optimizer steps done.
        engine: gives the tensors.
        trainer_state: everything else that resume needs (data state, fingerprints); values that JSON can hold.
        mesh: all ranks call this function.
        keep_last: verified checkpoints to keep, this one included; at least 1.

    Raises:
        CheckpointError: on every rank, when the disk refuses or the engine's chunks do not make up every tensor; the previous
            checkpoints are untouched.

    A step that is already there and whole is left as it is.
    """
    final = root / folder_name(step)
    tmp = root / f"{final.name}.tmp"
    if _on_main(mesh, lambda: _prepare(final, tmp)):
        return final
    _write_tensors(tmp, engine, mesh)
    own = _attempt(lambda: {path.name: file_record(path) for path in sorted(tmp.glob(f"__{mesh.rank}_*"))})
    reports = gather_objects(mesh, own)

    def commit() -> None:
        files: dict[str, Any] = {}
        for records, error in reports or ():
            if error is not None:
                raise OSError(error)
            files.update(records or {})
        _commit(final, tmp, step, trainer_state, files, _layout(engine, mesh))
        _prune(root, keep_last)

    _on_main(mesh, commit)
    return final


def find_checkpoint(root: Path, mesh: Mesh) -> CheckpointReader | None:
    """The newest whole checkpoint under `root`, None when no checkpoint was ever written.

    Left-overs of interrupted saves are removed; folders that do not verify are renamed to `.bad-...` and logged.

    Raises:
        CheckpointError: on every rank, when checkpoints exist but none of them is whole.

    Distributed: every rank calls it; rank 0 looks, all ranks open what it found.
    """
    name = _on_main(mesh, lambda: _choose(root))
    barrier(mesh)
    return None if name is None else open_checkpoint(root / name, verify=False)


def newest_checkpoint(root: Path) -> CheckpointReader:
    """The newest whole checkpoint under `root`; nothing is renamed or removed, so a run may be writing there.

    Raises:
        CheckpointError: there is none.
    """
    folders = _folders(root)
    for path in folders:
        problems = verify_checkpoint(path)
        if not problems:
            return open_checkpoint(path, verify=False)
        log.warning("checkpoint %s is not whole: %s", path, "; ".join(problems[:3]))
    raise CheckpointError(
        f"expected a whole checkpoint in {root}, found {len(folders)} folders of which none verifies; "
        "check the path, or let the run save once"
    )


def _write_tensors(tmp: Path, engine: Engine, mesh: Mesh) -> None:
    try:
        write_chunks(tmp, engine.state_views(), engine.state_names, mesh.host_group)
    except OSError as error:
        raise _disk_error(str(error)) from error


def _prepare(final: Path, tmp: Path) -> bool:
    """True when the checkpoint is already there and whole; else makes room for it."""
    if final.exists():
        problems = _problems(final)
        if not problems:
            return True
        _set_aside(final, problems)
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    return False


def _commit(
    final: Path,
    tmp: Path,
    step: int,
    trainer_state: Mapping[str, Any],
    files: dict[str, Any],
    layout: Mapping[str, int | str],
) -> None:
    versions = {"mmscale": mmscale.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = {
        "step": step,
        "trainer": dict(trainer_state),
        "layout": dict(layout),
        "versions": versions,
    }
    _write_text(tmp / TRAINER, json.dumps(content, indent=1, sort_keys=True))
    _fsync(tmp / ".metadata")
    for name in (TRAINER, ".metadata"):
        files[name] = file_record(tmp / name)
    manifest = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    _write_text(tmp / MANIFEST, json.dumps(manifest, indent=1))
    _fsync(tmp)
    os.rename(tmp, final)
    _fsync(final.parent)
    _known_good[final] = _stamp(final)
    pointer = final.parent / "latest.tmp"
    _write_text(pointer, final.name + "\n")
    os.replace(pointer, final.parent / "latest")
    _fsync(final.parent)


def _layout(engine: Engine, mesh: Mesh) -> dict[str, int | str]:
    """What wrote the checkpoint, for people and bug reports; no reader needs it. Stage and the like stand in the config."""
    return {
        "engine": type(engine).__name__,
        "world_size": mesh.world_size,
        "dp_size": mesh.dp_size,
        "tensor": mesh.tensor.size,
        "ulysses": mesh.ulysses.size,
        "ring": mesh.ring.size,
    }


def _choose(root: Path) -> str | None:
    if not root.exists():
        return None
    for path in root.glob("*.tmp"):
        log.warning("removing %s, left over from an interrupted save", path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in _folders(root):
        problems = verify_checkpoint(path)
        if not problems:
            _known_good[path] = _stamp(path)
            return path.name
        _set_aside(path, problems)
    rejected = sorted(path.name for path in root.glob(".bad-step_*"))
    if rejected or (root / "latest").exists():
        raise CheckpointError(
            f"expected a whole checkpoint in {root}, found none, though the run has saved before (rejected: "
            f"{', '.join(rejected) or 'none, the folders are gone'}); restore one from a backup, or move {root} away to "
            "start again from step 0"
        )
    return None


def _prune(root: Path, keep_last: int) -> None:
    """Deletes what is older than the newest `keep_last` whole checkpoints; with fewer whole ones, nothing."""
    kept = 0
    for path in _folders(root):
        if kept >= max(keep_last, 1):
            # Renamed first: a kill half way through the deletion leaves a name that the next start removes.
            doomed = path.with_name(f"{path.name}.old.tmp")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
            _known_good.pop(path, None)
        elif not _problems(path):
            kept += 1


def _set_aside(path: Path, problems: list[str]) -> None:
    number = len(list(path.parent.glob(f".bad-{path.name}-*")))
    bad = path.with_name(f".bad-{path.name}-{number}")
    os.rename(path, bad)
    log.error("checkpoint %s is rejected and renamed to %s: %s", path.name, bad.name, "; ".join(problems[:5]))


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders under `root`, the newest first."""
    found = [(step, path) for path in root.glob("step_*") if (step := folder_step(path.name)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


_known_good: dict[Path, _Stamp] = {}
"""Folders that this process wrote or verified, so that each is hashed once while its files keep size and time."""


def _problems(path: Path) -> list[str]:
    stamp = _stamp(path)
    if _known_good.get(path) == stamp:
        return []
    problems = verify_checkpoint(path)
    if not problems:
        _known_good[path] = stamp
    return problems


def _stamp(path: Path) -> _Stamp:
    stats = (
        sorted((entry.name, entry.stat(follow_symlinks=False)) for entry in os.scandir(path)) if path.is_dir() else []
    )
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except (OSError, CheckpointError) as error:
        return None, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _on_main(mesh: Mesh, work: Callable[[], T]) -> T:
    """The result of `work`, run on rank 0, on every rank; its failure is raised on every rank too."""
    result: tuple[T | None, str | None, bool] = (None, None, False)
    if mesh.is_main:
        try:
            result = (work(), None, False)
        except OSError as error:
            result = (None, f"{type(error).__name__}: {error}", True)
        except CheckpointError as error:
            result = (None, str(error), False)
    value, error_text, is_disk = broadcast_object(mesh, result)
    if error_text is not None:
        raise _disk_error(error_text) if is_disk else CheckpointError(error_text)
    return value  # type: ignore[return-value]


def _disk_error(found: str) -> CheckpointError:
    return CheckpointError(
        f"expected to read and write the run's checkpoints folder, found {found}; make room or fix the permissions and start "
        "again: the run resumes from the newest whole checkpoint"
    )


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
