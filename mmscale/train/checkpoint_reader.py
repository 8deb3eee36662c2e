"""Opens a checkpoint folder: verification against its manifest, then one tensor at a time, on one process.

A folder `step_00000120` holds `manifest.json` (bytes and sha256 of every other file), `trainer.json`, `.metadata` (where
each tensor lies; written by torch's distributed checkpoint) and one tensor file per rank that wrote.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from mmscale.errors import CheckpointError
from mmscale.train.coverage import Box, coverage_problem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FORMAT = "mmscale-checkpoint-1"
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
_FOLDER = re.compile(r"step_(\d{8,})")
_HASH_BLOCK_BYTES = 1 << 22


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


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; empty when it is whole.

    Every file of the manifest must be there with its size and sha256, and no other file. Cost: reads every byte.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        step, files = manifest["step"], dict(manifest["files"])
        if manifest["format"] != FORMAT or step != folder_step(path.name):
            return [f"{MANIFEST}: expected {FORMAT} of step {folder_step(path.name)}, found step {step!r}"]
        wanted = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing, so the checkpoint was never completed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: not readable as a manifest ({type(error).__name__}: {error})"]
    problems = [f"{name}: not in the manifest" for name in sorted(present - set(wanted))]
    problems += [f"{name}: missing" for name in sorted(set(wanted) - present)]
    for name in sorted(present & set(wanted)):
        problem = _file_problem(path / name, *wanted[name])
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def _file_problem(path: Path, num_bytes: int, sha256: str) -> str | None:
    try:
        if not path.is_file() or path.is_symlink():
            return "not a plain file"
        size = path.stat().st_size
        if size != num_bytes:
            return f"expected {num_bytes} bytes, found {size}"
        if file_record(path)["sha256"] != sha256:
            return "its sha256 is not the manifest's: the content has changed"
    except OSError as error:
        return f"not readable ({error})"
    return None


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint folder opened for reading; tensors are read when asked for, so memory stays at one tensor.

    Open it with `open_checkpoint`, which verifies first.
    """

    path: Path
    step: int
    trainer: dict[str, Any]

    @property
    def names(self) -> frozenset[str]:
        """State names of all tensors, see `parallel/engines/base.py`."""
        return frozenset(self._metadata.state_dict_metadata)

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole tensor called `name`, without reading it. Raises CheckpointError when there is none."""
        return self._entry(name).size

    def read(self, name: str) -> Tensor:
        """The whole tensor called `name`, on the CPU. Raises CheckpointError when there is none or it is damaged.

        Cost: memory of the tensor, and of its largest chunk beside it when it was written in several.
        """
        entry = self._entry(name)
        if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._read_chunk(name, entry.chunks[0])
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            places = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[places] = self._read_chunk(name, chunk)
        return whole

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"expected a tensor {name} in {self.path}, found {'none' if entry is None else 'something else'}; "
                "use the version of mmscale and the model that wrote it"
            )
        problem = coverage_problem(entry.size, [Box(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks])
        if problem is not None:
            raise _damaged(self.path / ".metadata", f"{name}: {problem}, in a tensor of shape {list(entry.size)}")
        return entry

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise _damaged(self.path / ".metadata", f"{name}: no place of the chunk at {list(chunk.offsets)}")
        if "/" in info.relative_path:
            raise CheckpointError(f"expected a file name for {name} in {self.path}, found {info.relative_path!r}")
        try:
            with (self.path / info.relative_path).open("rb") as file:
                # torch reads through this view straight into the tensor; from bytes it would hold both
                view = cast(IO[bytes], _FilePart(file, info.offset, info.length))
                value = torch.load(view, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise _damaged(self.path / info.relative_path, f"{name}: {error}") from error
        if not isinstance(value, Tensor) or value.shape != chunk.sizes:
            raise _damaged(self.path / info.relative_path, f"{name} is not a tensor of shape {list(chunk.sizes)}")
        return value

    @cached_property
    def _metadata(self) -> Metadata:
        path = self.path / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        # A damaged pickle can raise nearly anything while it builds its objects; each of these means the same.
        except (
            OSError,
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
        ) as e:
            raise _damaged(path, f"{type(e).__name__}: {e}") from e
        if not isinstance(metadata, Metadata):
            raise _damaged(path, f"found a {type(metadata).__name__}")
        return metadata


class _FilePart(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        wanted = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(wanted)
        self._position += count
        return count


def open_checkpoint(path: Path, verify: bool = True) -> CheckpointReader:
    """A reader of the checkpoint folder `path`, by default after verification of every file.

    Raises:
        CheckpointError: the folder is not a whole checkpoint; the text lists what is wrong.
    """
    problems = verify_checkpoint(path) if verify else []
    if problems:
        raise _damaged(path, "; ".join(problems[:5]))
    try:
        content = json.loads((path / TRAINER).read_bytes())
        return CheckpointReader(path, int(content["step"]), dict(content["trainer"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path / TRAINER, f"{type(error).__name__}: {error}") from error


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"expected a whole checkpoint at {path}, found: {found}; use another checkpoint of the run")


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA_MODULE, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch's checkpoint metadata, which is a pickle, and refuses every name that such metadata does not need."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint metadata needs")
