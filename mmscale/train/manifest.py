"""What makes a checkpoint folder whole: its name, its manifest, and the check of every byte against it. Imports no torch.

A folder `step_00000120` holds `manifest.json` (whose it is; bytes and sha256 of every other file), `trainer.json`, `.metadata`
(where each tensor lies; written by torch's distributed checkpoint) and one tensor file per rank that wrote.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.errors import SaveError
from mmscale.train.attempt import Lineage

FORMAT = "mmscale-checkpoint-2"
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
_FOLDER = re.compile(r"step_(\d{8,})")
_HASH_BLOCK_BYTES = 1 << 22
_DAMAGE = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EREMOTEIO, errno.ENOENT, errno.EISDIR, errno.ENOTDIR)
"""Errors of the system that mean that the content is lost, or that something else stands there."""


def folder_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps.

    Example:
        >>> folder_name(120)
        'step_00000120'
    """
    return f"step_{step:08d}"


def folder_step(name: str) -> int | None:
    """The step in a checkpoint folder's name, None when it is no such name."""
    match = _FOLDER.fullmatch(name)
    return int(match.group(1)) if match else None


def file_record(path: Path) -> dict[str, Any]:
    """`{"bytes": size, "sha256": hex}` of a file, as it stands in the manifest."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def manifest_text(step: int, token: str | None, files: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of `manifest.json`: whose checkpoint of which step it is, size and sha256 of its files, and a digest of all that.

    Args:
        token: of the attempt that wrote it; None = no attempt.
        files: name -> `file_record`.
    """
    body = {"format": FORMAT, "step": step, "attempt": token, "files": dict(sorted(files.items()))}
    return json.dumps({**body, "digest": _digest(body)}, indent=1)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises OSError when it cannot be read, ValueError when it is damaged."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _digest(manifest):
        raise ValueError("it has changed since it was written, or another version wrote it")
    if manifest["format"] != FORMAT or manifest["step"] != folder_step(path.name):
        raise ValueError(f"expected {FORMAT} of step {folder_step(path.name)}, found step {manifest['step']!r}")
    return manifest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(
    path: Path, lineage: Lineage | None = None, *, hashes: bool = True, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty when it is whole.

    Every file of the manifest must be there with its size and sha256, and no other file; with a `lineage`, one of the run's attempts
    must have written it. Cost: reads every byte; without `hashes` only the manifest.

    Args:
        share: (number, of how many): only every so many files are hashed, the others are somebody else's share.

    Raises SaveError when the file system does not let them be looked at, which is no damage.
    """
    try:
        manifest = read_manifest(path)
        stranger = None if lineage is None else lineage.problem(manifest["attempt"], manifest["step"])
        if stranger is not None:
            return [stranger]
        files = manifest["files"]
        wanted = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing, so the checkpoint was never completed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        _raise_unless_damage(path, error)
        return [f"{MANIFEST}: not readable as a manifest ({type(error).__name__}: {error})"]
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(wanted))]
    problems += [f"{name}: missing" for name in sorted(set(wanted) - present)]
    number, count = share
    for idx, name in enumerate(sorted(present & set(wanted))):
        problem = _file_problem(path / name, *wanted[name], hashes and idx % count == number)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def _file_problem(path: Path, num_bytes: int, sha256: str, hashes: bool) -> str | None:
    try:
        if not path.is_file() or path.is_symlink():
            return "not a plain file"
        size = path.stat().st_size
        if size != num_bytes:
            return f"expected {num_bytes} bytes, found {size}"
        if hashes and file_record(path)["sha256"] != sha256:
            return "its sha256 is not the manifest's: the content has changed"
    except OSError as error:
        _raise_unless_damage(path, error)
        return f"not readable ({error})"
    return None


def _raise_unless_damage(path: Path, error: Exception) -> None:
    """Raises SaveError when `error` says nothing about the content: no access, a mount that is gone, too many open files."""
    if isinstance(error, OSError) and error.errno not in _DAMAGE:
        raise SaveError(
            f"{path}: expected to read and check it, found {type(error).__name__}: {error}; fix the permissions or the mount and try again, "
            "the checkpoint is left as it is"
        ) from error
