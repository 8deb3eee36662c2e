"""Whether a node is fit to train: asked before its ranks start. What is wrong with the node itself excludes it from the next attempt."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mmscale.config.schema import Config

PROBE_BYTES = 8 * 1024 * 1024
ANSWER_S = 60.0
"""A disk or a GPU that does not answer for so long is counted as broken."""

MAX_CLOCK_SKEW_S = 60.0
MAX_USED_MIB = 2048
"""GPU memory in use before the run starts, above which something else seems to run there."""

_NOT_THE_NODE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENOENT)
"""Errors of a shared folder that every node would meet."""

_NOT_SUPPORTED = ("[N/A]", "N/A", "[Not Supported]")
"""What nvidia-smi says of a sound device that does not count such errors, or shares its memory with the CPU."""

_GPU_QUERY = ("nvidia-smi", "--query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")  # fmt: skip


@dataclass
class Findings:
    """What a check found: `problems` make the node unfit, `warnings` do not."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_node(config: Config, num_ranks: int) -> Findings:
    """What is wrong with this node, for `num_ranks` ranks of a run. Takes ANSWER_S at most for each check that hangs."""
    found = Findings()
    floor_gb = config.run.watch.min_free_gb
    shared, own = _existing(Path(config.run.dir)), Path(tempfile.gettempdir())
    checks = {
        f"the run's disk ({shared})": lambda: _check_disk(shared, floor_gb, True, found),
        f"the temporary disk ({own})": lambda: _check_disk(own, floor_gb, False, found),
        "memory": lambda: _check_memory(floor_gb, found),
    }
    if config.run.device != "cpu" and shutil.which("nvidia-smi"):
        checks["the GPUs"] = lambda: _check_gpus(num_ranks, found)
    for name, check in checks.items():
        if not _answers(check):
            found.problems.append(f"{name}: no answer within {ANSWER_S:.0f} s")
    return found


def _answers(check: Callable[[], None]) -> bool:
    """Whether a check came to its end in time. It runs in a thread, as nothing else returns from a file system that hangs."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            check()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _check_disk(folder: Path, floor_gb: float, is_shared: bool, found: Findings) -> None:
    """Free space, and a file that is written, synced and read back; of a shared folder also its clock.

    A shared disk that is full or closed to the user is so on every node: the trainer's own refusal says more.
    """
    try:
        free_gb = shutil.disk_usage(folder).free / 1e9
        modified = _write_and_read_back(folder / f".mmscale-health-{os.uname().nodename}-{os.getpid()}")
    except OSError as error:
        text = f"{folder}: cannot write and read back {PROBE_BYTES >> 20} MiB: {error.strerror or error}"
        (found.warnings if is_shared and error.errno in _NOT_THE_NODE else found.problems).append(text)
        return
    if free_gb < floor_gb:
        text = f"{folder}: {free_gb:.2f} GB free, run.watch.min_free_gb={floor_gb:g}"
        (found.warnings if is_shared else found.problems).append(text)
    skew_s = time.time() - modified
    if is_shared and abs(skew_s) > MAX_CLOCK_SKEW_S:
        found.warnings.append(
            f"the clock of this node is {skew_s:+.0f} s off that of {folder}; times of hangs will be wrong"
        )


def _write_and_read_back(path: Path) -> float:
    """Writes PROBE_BYTES, reads them again and removes the file; gives its time of change. Raises OSError."""
    content = os.urandom(4096) * (PROBE_BYTES // 4096)
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            modified = os.fstat(file.fileno()).st_mtime
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk is read, not the cache
        if path.read_bytes() != content:
            raise OSError(errno.EIO, "other bytes came back than were written")
        return modified
    finally:
        path.unlink(missing_ok=True)


def _check_memory(floor_gb: float, found: Findings) -> None:
    available_gb = psutil.virtual_memory().available / 1e9
    if available_gb < floor_gb:
        found.problems.append(f"memory: {available_gb:.2f} GB free, run.watch.min_free_gb={floor_gb:g}")


def _check_gpus(num_ranks: int, found: Findings) -> None:
    """As many GPUs as ranks, none with memory errors."""
    try:
        done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, check=False, timeout=ANSWER_S / 2)
    except subprocess.TimeoutExpired:
        found.problems.append(f"nvidia-smi: no answer within {ANSWER_S / 2:.0f} s")
        return
    if done.returncode:
        found.problems.append(f"nvidia-smi: {(done.stdout + done.stderr).strip() or f'exit code {done.returncode}'}")
        return
    read_gpus(done.stdout.splitlines(), num_ranks, found)


def read_gpus(lines: Sequence[str], num_ranks: int, found: Findings) -> None:
    """Adds to `found` what nvidia-smi's lines (index, MiB in use, memory errors that were not corrected) tell."""
    if len(lines) < num_ranks:
        found.problems.append(f"{len(lines)} GPUs, {num_ranks} ranks")
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 3:
            found.problems.append(f"GPU: nvidia-smi says {line!r}")
            continue
        index, used, errors = cells
        if errors.isdecimal() and int(errors) > 0:
            found.problems.append(f"GPU {index}: {errors} memory errors that were not corrected")
        broken = [cell for cell in (used, errors) if not (cell.isdecimal() or cell in _NOT_SUPPORTED)]
        if broken:
            found.problems.append(f"GPU {index}: nvidia-smi says {broken[0]}")
        elif used.isdecimal() and int(used) > MAX_USED_MIB:
            found.warnings.append(f"GPU {index}: {used} MiB in use before the run starts")
