"""Writes and finds checkpoints. A checkpoint is either complete and verified, or it does not exist.

A save goes: copy of the state in host memory - plan of all ranks - each rank writes its file in a thread - rank 0 writes the manifest
and renames the folder. Only the first two and the last hold the training up, and only they talk to other ranks.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import mmscale
from mmscale.errors import CheckpointError, FencedError, MmscaleError, SaveError
from mmscale.logging import get_logger
from mmscale.parallel.comm import all_gather_objects, broadcast_object, gather_objects, on_main
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.mesh import Mesh
from mmscale.train.attempt import Attempt, Lineage, sync_folder
from mmscale.train.checkpoint_folders import (
    clear_left_overs,
    list_checkpoints,
    look_at,
    mark_whole,
    problems_of,
    prune,
    refuse_to_begin_again,
    reject,
    set_aside,
)
from mmscale.train.checkpoint_reader import CheckpointReader, open_checkpoint
from mmscale.train.checkpoint_writer import Part, Snapshot, StatePlan, write_part
from mmscale.train.manifest import MANIFEST, TRAINER, file_record, folder_name, manifest_text, verify_checkpoint

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "Saved",
    "find_checkpoint",
    "newest_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]

log = get_logger(__name__)
T = TypeVar("T")

RESERVE_BYTES = 1 << 20
"""Free space that a save leaves for its small files and those of the run."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A committed checkpoint. `num_bytes`: of all its files; `write_s`: the slowest rank's writing, in seconds."""

    path: Path
    num_bytes: int
    write_s: float


@dataclass(frozen=True, slots=True)
class _Save:
    """A checkpoint that is being written; `part` is None when it is there already."""

    step: int
    trainer_state: Mapping[str, Any]
    part: Future[Part] | None


class CheckpointWriter:
    """Writes the checkpoints of one engine, one after the other.

    Distributed: every rank calls every method at the same point, but `is_written` and `close`.
    """

    def __init__(
        self, root: Path, engine: Engine, mesh: Mesh, attempt: Attempt | None = None, token: str | None = None
    ) -> None:
        """Args:
        root: `<run.dir>/checkpoints`, on a file system that all ranks share.
        attempt: that writes; once it is fenced it commits nothing. None = nobody else writes here.
        token: for the manifest where there is no attempt.
        """
        self._root, self._engine, self._mesh, self._attempt = root, engine, mesh, attempt
        # rank 0's: it alone claims the run directory and so knows the token
        self._token = broadcast_object(mesh, token if attempt is None else attempt.token)
        self._snapshot, self._plan = Snapshot(), StatePlan(mesh, engine.state_names)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pruner = ThreadPoolExecutor(1, thread_name_prefix="prune")  # its own: no save waits for a long deletion
        self._save: _Save | None = None
        self._lineage: Lineage | None = None
        self._pruning: Future[None] | None = None

    def snapshot(self) -> None:
        """Copies the engine's state into host memory; what is written next."""
        self._snapshot.take(self._engine.state_views())
        self._plan.agree(self._snapshot.items)

    def begin(self, step: int, trainer_state: Mapping[str, Any]) -> None:
        """Starts to write the snapshot as the checkpoint of `step`.

        Raises, on every rank and before anything is written:
            SaveError: no room, or the folder cannot be made.
            FencedError: another attempt owns the run.
        """
        assert self._save is None, "one save at a time"
        needed = gather_objects(self._mesh, self._snapshot.bytes_needed)
        is_there = on_main(self._mesh, lambda: _on_disk(lambda: self._prepare(step, sum(needed or ()))))
        tmp = self._tmp(step)
        part = None if is_there else self._thread.submit(write_part, tmp, self._mesh.rank, self._snapshot)
        self._save = _Save(step, trainer_state, part)

    @property
    def is_written(self) -> bool:
        """True when this rank has written its part of the checkpoint that was begun."""
        return self._save is not None and (self._save.part is None or self._save.part.done())

    def commit(self) -> Saved:
        """Waits until all ranks have written the checkpoint that was begun, and makes it visible.

        Raises, on every rank, after which the checkpoint does not exist:
            SaveError: the disk refused on some rank.
            FencedError: another attempt owns the run.
        """
        save, self._save = self._save, None
        assert save is not None, "a save is begun first"
        if save.part is None:
            return Saved(self._root / folder_name(save.step), 0, 0.0)
        reports = gather_objects(self._mesh, self._outcome(save.part))
        return on_main(self._mesh, lambda: _on_disk(lambda: self._commit_or_remove(save, reports or [])))

    def prune(self, keep_last: int, keep_every: int | None = None) -> None:
        """Deletes old checkpoints in the background, see `prune` of `checkpoint_folders`."""
        if not self._mesh.is_main:
            return
        if self._pruning is not None:
            if not self._pruning.done():
                return  # the next save prunes what has come together
            self._pruning.result()  # raises what was not foreseen
        self._pruning = self._pruner.submit(self._prune, keep_last, keep_every)

    def close(self) -> None:
        """Gives up what is under way, and waits for the thread, which may still be pruning. Needs no other rank."""
        self._snapshot.cancel()
        self._thread.shutdown()
        self._pruner.shutdown()
        if self._save is not None and self._mesh.is_main:
            shutil.rmtree(self._tmp(self._save.step), ignore_errors=True)  # else the next start removes it
        self._save = None

    def _tmp(self, step: int) -> Path:
        """Where `step` is written. Two attempts never share it."""
        names = (folder_name(step), self._token, "tmp")
        return self._root / ".".join(name for name in names if name is not None)

    def _prepare(self, step: int, num_bytes: int) -> bool:
        """True when the checkpoint is already there and whole; else makes room for it."""
        self._check_owner()
        final, tmp = self._root / folder_name(step), self._tmp(step)
        if final.exists():
            problems = problems_of(final, self._own_lineage())
            if not problems:
                return True
            self._check_owner()  # again: hashing takes long, and the owner's checkpoint would look like a stranger's
            set_aside(final, problems)
        if tmp.exists():
            shutil.rmtree(tmp)
        self._root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._root).free
        if free < num_bytes + RESERVE_BYTES:
            raise OSError(f"{free / 1e6:,.1f} MB free for a checkpoint of {num_bytes / 1e6:,.1f} MB")
        tmp.mkdir()
        return False

    def _outcome(self, part: Future[Part]) -> tuple[Part | None, str | None]:
        """This rank's part, or why the disk refused it."""
        try:
            return part.result(), None
        except (OSError, RuntimeError) as error:
            refusal = _disk_cause(error)
            if refusal is None:
                raise
            return None, f"{_reason(refusal)} (rank {self._mesh.rank})"

    def _commit_or_remove(self, save: _Save, reports: list[tuple[Part | None, str | None]]) -> Saved:
        try:
            return self._commit(save, reports)
        except (OSError, FencedError):
            shutil.rmtree(self._tmp(save.step), ignore_errors=True)  # else the next start removes it
            raise

    def _commit(self, save: _Save, reports: list[tuple[Part | None, str | None]]) -> Saved:
        failures = [error for _, error in reports if error is not None]
        if failures:
            raise OSError("; ".join(failures[:3]))
        parts = [part for part, _ in reports if part is not None]
        final, tmp = self._root / folder_name(save.step), self._tmp(save.step)
        self._plan.write_metadata(tmp, [part.places for part in parts])
        _write_text(tmp / TRAINER, json.dumps(self._content(save), indent=1, sort_keys=True))
        files = {name: record for part in parts for name, record in part.files.items()}
        files |= {name: file_record(tmp / name) for name in (TRAINER, ".metadata")}
        _write_text(tmp / MANIFEST, manifest_text(save.step, self._token, files))
        sync_folder(tmp)
        self._check_owner()
        os.rename(tmp, final)  # refuses when another attempt has put its own there
        sync_folder(self._root)
        mark_whole(final)
        self._point_at(final)
        return Saved(final, sum(record["bytes"] for record in files.values()), max(part.seconds for part in parts))

    def _content(self, save: _Save) -> dict[str, Any]:
        """What `trainer.json` holds. The layout is for people and bug reports; no reader needs it."""
        mesh = self._mesh
        layout = {
            "engine": type(self._engine).__name__, "world_size": mesh.world_size, "dp_size": mesh.dp_size,
            "tensor": mesh.tensor.size, "ulysses": mesh.ulysses.size, "ring": mesh.ring.size,
        }  # fmt: skip
        versions = {"mmscale": mmscale.__version__, "torch": torch.__version__, "python": platform.python_version()}
        return {"step": save.step, "trainer": dict(save.trainer_state), "layout": layout, "versions": versions}

    def _point_at(self, final: Path) -> None:
        pointer = self._root / "latest.tmp"
        try:
            _write_text(pointer, final.name + "\n")
            os.replace(pointer, self._root / "latest")
        except OSError as error:  # the checkpoint stands; `latest` is for people
            log.warning("%s: cannot be written: %s", self._root / "latest", error)

    def _prune(self, keep_last: int, keep_every: int | None) -> None:
        try:
            prune(self._root, keep_last, keep_every, self._own_lineage(), self._is_fenced)
        except (OSError, CheckpointError) as error:
            log.error("old checkpoints in %s cannot be deleted: %s; the next save tries again", self._root, error)

    def _own_lineage(self) -> Lineage | None:
        if self._lineage is None and self._attempt is not None:
            self._lineage = self._attempt.lineage()
        return self._lineage

    def _check_owner(self) -> None:
        if self._attempt is not None:
            self._attempt.check_owner()

    def _is_fenced(self) -> bool:
        return self._attempt is not None and self._attempt.is_fenced()


def save_checkpoint(
    root: Path,
    step: int,
    engine: Engine,
    trainer_state: Mapping[str, Any],
    mesh: Mesh,
    keep_last: int,
    token: str | None = None,
) -> Path:
    """The folder of the new checkpoint, complete on disk. A step that is already there and whole is left as it is.

    Args:
        root: `<run.dir>/checkpoints`, on a file system that all ranks share.
        step: optimizer steps done.
        engine: gives the tensors.
        trainer_state: everything else that resume needs (data state, fingerprints); values that JSON can hold.
        mesh: all ranks call this function.
        keep_last: verified checkpoints to keep, this one included; at least 1.
        token: of the attempt that writes, for the manifest; None = no attempt.

    Raises, on every rank, with the previous checkpoints untouched:
        SaveError: the disk refuses.
        CheckpointError: the engine's chunks do not make up every tensor.
    """
    writer = CheckpointWriter(root, engine, mesh, token=token)
    try:
        writer.snapshot()
        writer.begin(step, trainer_state)
        saved = writer.commit()
        if mesh.is_main:
            prune(root, keep_last)
    finally:
        writer.close()
    return saved.path


def find_checkpoint(root: Path, mesh: Mesh, attempt: Attempt | None = None) -> CheckpointReader | None:
    """The newest whole checkpoint under `root`, None when no checkpoint was ever written.

    Left-overs of interrupted saves are removed; folders that do not verify are renamed to `.bad-...` and logged.

    Args:
        attempt: that looks, and owns the run: checkpoints of strangers and of attempts that had lost the run do not count. None =
            every whole one counts.

    Raises:
        CheckpointError: on every rank, when checkpoints exist but none of them is whole.
        FencedError: on every rank, when another attempt has taken over.

    Distributed: every rank calls it; each one hashes its share of the files, as one alone would take longer than others may wait.
    """
    for path in on_main(mesh, lambda: _on_disk(lambda: clear_left_overs(root, attempt))):
        if _counts(path, mesh, attempt):
            return open_checkpoint(path, verify=False)
    on_main(mesh, lambda: refuse_to_begin_again(root))
    return None


def _counts(path: Path, mesh: Mesh, attempt: Attempt | None) -> bool:
    """Whether a folder is whole and of this run; one that is not is set aside."""
    problems, is_known = on_main(mesh, lambda: _on_disk(lambda: look_at(path, attempt)))
    if not problems and not is_known:
        problems = _hash_together(path, mesh)
    work = partial(reject, path, problems, attempt) if problems else partial(mark_whole, path)
    on_main(mesh, lambda: _on_disk(work))
    return not problems


def _hash_together(path: Path, mesh: Mesh) -> list[str]:
    """As `verify_checkpoint`; every rank hashes some of the files."""
    own: list[str] | MmscaleError
    try:
        own = verify_checkpoint(path, share=(mesh.rank, mesh.world_size))
    except MmscaleError as error:
        own = error
    found = all_gather_objects(mesh, own)
    for one in found:
        if isinstance(one, MmscaleError):
            raise one
    return list(dict.fromkeys(problem for one in found if not isinstance(one, MmscaleError) for problem in one))


def newest_checkpoint(root: Path) -> CheckpointReader:
    """The newest whole checkpoint under `root`; nothing is renamed or removed, so a run may be writing there.

    Raises:
        CheckpointError: there is none.
    """
    folders = list_checkpoints(root)
    for path in folders:
        problems = verify_checkpoint(path)
        if not problems:
            return open_checkpoint(path, verify=False)
        log.warning("checkpoint %s is not whole: %s", path, "; ".join(problems[:3]))
    raise CheckpointError(
        f"expected a whole checkpoint in {root}, found {len(folders)} folders of which none verifies; "
        "check the path, or let the run save once"
    )


def _on_disk(work: Callable[[], T]) -> T:
    try:
        return work()
    except OSError as error:
        raise SaveError(
            f"expected to read and write the run's checkpoints folder, found {_reason(error)}; make room or fix the permissions "
            "and start again: the run resumes from the newest whole checkpoint"
        ) from error


def _disk_cause(error: BaseException | None) -> OSError | None:
    """The error of the disk behind `error`: torch's archive writer raises a RuntimeError of its own after it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _reason(error: OSError) -> str:
    """What the system said, with the name of its kind; a text of ours as it is."""
    return str(error) if error.errno is None else f"{type(error).__name__}: {error}"


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
