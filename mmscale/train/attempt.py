"""Who owns a run directory. Each start of the trainer is an attempt; the newest one owns the run, all others write nothing more.

attempts/<token>/   one small file per fact about an attempt, each written whole or not at all
OWNER               token of the newest attempt

A check of OWNER and the write that follows are two steps, so an older attempt may commit a checkpoint in between. It is told by
its manifest: an attempt's checkpoints count up to the step from which its successor went on (`Lineage`). Imports no torch: the
batch script asks here too.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmscale
from mmscale.errors import CheckpointError, DivergedError, FencedError, MmscaleError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.redact import redact_values

log = get_logger(__name__)

OWNER = "OWNER"
ATTEMPTS = "attempts"
DO_NOT_RESTART = "DO_NOT_RESTART"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` without secrets so that a reader finds the old file or the new one, never a part; folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(redact_values(content), ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`, for a text."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # a process id is not unique: nodes, containers
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Returns when the names in a folder are safe from a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None when there is no such file. Raises CheckpointError when it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(error).__name__}: {error}; repair it or restore the run directory"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(content).__name__}; restore the run directory"
        )
    return content


def read_record(path: Path) -> dict[str, Any]:
    """As `read_json`, for records that only tell of the past: empty when the file is missing or damaged, as others say enough."""
    try:
        return read_json(path) or {}
    except CheckpointError:
        return {}


def read_owner(folder: Path) -> str | None:
    """The token of the attempt that owns a run directory; None when no attempt has started there.

    The file is opened, never asked for its time only: NFS answers that for up to a minute from memory, and asks its server at each
    opening.
    """
    try:
        return (folder / OWNER).read_text(encoding="utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None


CAUSES = ("named", "killed", "other")
"""Kinds of errors, the most telling first: when one rank ends, the collectives of all others fail, often before it has said why."""


def record_error(folder: Path, rank: int, reason: str, cause: str) -> None:
    """Writes down why a rank has ended.

    Args:
        folder: of the attempt.
        reason: names the rank.
        cause: `named`, an error that mmscale raises on purpose; `killed`, by a signal from outside; `other`.
    """
    write_json(folder / f"error-{rank}.json", {"reason": reason, "cause": cause, "at": time.time()})


def first_cause(records: Iterable[Mapping[str, Any]]) -> str | None:
    """Why an attempt has failed, from the records of its ranks' ends; None when there is none.

    Example:
        >>> lost = {"reason": "rank 0: connection closed", "cause": "other", "at": 1.0}
        >>> first_cause([lost, {"reason": "rank 1: bad sample", "cause": "named", "at": 1.2}])
        'rank 1: bad sample'
    """
    found = sorted((CAUSES.index(one["cause"]), one["at"], one["reason"]) for one in records if one)
    return str(found[0][2]) if found else None


@dataclass(frozen=True, slots=True)
class Lineage:
    """Whose checkpoints count in a run.

    limits     token -> last step up to which its checkpoints count; None = no limit (the newest attempt)
    root_step  what lay there when the first attempt began counts up to this step, whoever wrote it, so that a run can go on
               from a copied checkpoint; None = no limit
    """

    limits: Mapping[str, int | None]
    root_step: int | None

    def problem(self, token: str | None, step: int) -> str | None:
        """Why a checkpoint of `step` with this token in its manifest does not count; None when it does.

        Example:
            >>> Lineage({"7.0": 20, "7.1": None}, 0).problem("7.0", 30)
            'written by attempt 7.0 after its successor went on from step 20'
        """
        known = token is not None and token in self.limits
        limit = self.limits[token] if known and token is not None else self.root_step
        if limit is None or step <= limit:
            return None
        if known:
            return f"written by attempt {token} after its successor went on from step {limit}"
        return f"written by {token or 'no attempt'}, which is none of this run's attempts"


def read_lineage(folder: Path, token: str) -> Lineage:
    """The attempts that led to `token`, by their records.

    Raises CheckpointError when the chain of attempts is broken: an attempt names a predecessor that left no record.
    """
    limits: dict[str, int | None] = {}
    limit: int | None = None
    root_step: int | None = None
    current: str | None = token
    while current is not None:
        path = folder / ATTEMPTS / current
        record = read_json(path / "start.json") or read_json(path / "claim.json")
        if record is None or current in limits:
            found = "none" if record is None else "that it is its own predecessor"
            raise CheckpointError(
                f"{path}: expected the record of an attempt that owned this run, found {found}; restore the folder `attempts`, "
                "or start another run.dir from the checkpoint that you trust"
            )
        limits[current] = limit
        # without a base it was killed before it had chosen a checkpoint, and wrote none
        base = record.get("base_step")
        if base is not None:
            limit = base if limit is None else min(limit, base)
            root_step = base
        current = record["predecessor"]
    return Lineage(limits, root_step)


class Attempt:
    """One start of the trainer on a run directory. Only rank 0 claims and writes.

    `token` is None until the attempt owns the directory.
    """

    def __init__(self, folder: Path, wanted: str | None = None) -> None:
        """Args:
        wanted: token given by the job script; None makes one up. One that has started before gets a suffix.
        """
        self.folder = folder
        self.token: str | None = None
        self._wanted = wanted
        self._predecessor: str | None = None

    def claim(self) -> None:
        """Makes this attempt the owner of the directory, which is created; nothing when it is already.

        From here on no other attempt commits anything. Raises RefusedInputError when the directory cannot be written.
        """
        if self.token is not None:
            return
        wanted = self._wanted or f"local.{socket.gethostname()}.{os.getpid()}.{int(time.time())}"
        try:
            token, number = wanted, 1
            while (self._path(token) / "claim.json").exists():
                number += 1
                token = f"{wanted}-{number}"
            self._predecessor = read_owner(self.folder)
            claim = {"token": token, "predecessor": self._predecessor, "at": time.time()}
            write_json(self._path(token) / "claim.json", claim)
            for folder in (self._path(token), self.folder / ATTEMPTS):
                sync_folder(folder)  # an owner without a record would break the chain of attempts for good
            write_text(self.folder / OWNER, token + "\n")
        except OSError as error:
            raise RefusedInputError(
                f"cannot write the run directory {self.folder}: {error.strerror}; set run.dir to a folder you may write"
            ) from error
        self.token = token  # the first `is_fenced` reads OWNER: another start may have written it already

    def started(self, base_step: int, world_size: int) -> None:
        """Records from which checkpoint the attempt goes on (0 = none).

        Only the first call counts: after a rollback the attempt goes on from a later checkpoint of its own, and those of its
        predecessors still count only up to the first. Raises FencedError when another attempt has taken over since.
        """
        assert self.token is not None, "an attempt claims first"
        if (self._path(self.token) / "start.json").exists():
            return
        self.check_owner()
        record = {
            "token": self.token, "predecessor": self._predecessor, "base_step": base_step, "at": time.time(),
            "host": socket.gethostname(), "pid": os.getpid(), "world_size": world_size, "mmscale": mmscale.__version__,
        }  # fmt: skip
        write_json(self._path(self.token) / "start.json", record)

    def ended(self, outcome: str, step: int | None = None, reason: str = "") -> None:
        """Records that the attempt ended by itself: `done`, `stopped`, `fenced`, `refused`, `diverged` or `failed`.

        One that was refused before it claimed the directory leaves a record only where the job script made a folder for it.
        """
        token = self.token or self._wanted
        if token is not None and self._path(token).is_dir():
            record = {"outcome": outcome, "step": step, "reason": reason, "at": time.time()}
            with _logged(self._path(token)):
                write_json(self._path(token) / "end.json", record)

    @contextmanager
    def recording(self, rank: int) -> Iterator[None]:
        """Records an error that ends this rank, on rank 0 the end of the attempt too, and lets it pass."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            token = self.token or self._wanted
            if token is not None and self._path(token).is_dir():
                cause = "named" if isinstance(error, MmscaleError) else "other"
                with _logged(self._path(token)):
                    record_error(self._path(token), rank, f"rank {rank}: {reason}", cause)
            if rank == 0:
                self.ended(_outcome(error), reason=reason)
            raise

    def is_fenced(self) -> bool:
        """True when another attempt owns the directory now. Cost: reads one small file."""
        return read_owner(self.folder) != self.token

    def check_owner(self) -> None:
        """Raises FencedError when another attempt owns the directory now."""
        if self.is_fenced():
            raise self.fence_error()

    def fence_error(self) -> FencedError:
        """What to raise once `is_fenced`."""
        return FencedError(
            f"{self.folder}: expected attempt {self.token} to own the run, found {read_owner(self.folder) or 'no owner'}: another "
            "start goes on with this run, and this one has stopped without writing more; nothing is to be done"
        )

    def lineage(self) -> Lineage:
        """Whose checkpoints count."""
        assert self.token is not None, "an attempt claims first"
        return read_lineage(self.folder, self.token)

    def _path(self, token: str) -> Path:
        return self.folder / ATTEMPTS / token


def _outcome(error: Exception) -> str:
    if isinstance(error, FencedError):
        return "fenced"
    if isinstance(error, DivergedError):
        return "diverged"
    return "refused" if isinstance(error, MmscaleError) and error.exit_code == 2 else "failed"


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Lets a disk that refuses the record of an end hide neither the end nor its cause."""
    try:
        yield
    except OSError as error:
        log.error("%s: how the attempt ended cannot be written there: %s", folder, error, all_ranks=True)
