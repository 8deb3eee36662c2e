"""Opens a checkpoint folder: verification, then one tensor at a time, on one process."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from enum import Enum, EnumType
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from mmscale.errors import CheckpointError
from mmscale.train.coverage import Box, coverage_problem
from mmscale.train.manifest import TRAINER, verify_checkpoint

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


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


def _member(kind: object, name: object) -> Enum:
    """The member `name` of an enumeration, and nothing else that `getattr` could reach."""
    if isinstance(kind, EnumType) and isinstance(name, str) and name in kind.__members__:
        return cast(Enum, kind[name])
    raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which no checkpoint metadata needs")


class _MetadataUnpickler(pickle.Unpickler):
    """Reads torch's checkpoint metadata, which is a pickle, and refuses every name that such metadata does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.0 to 3.11.3 write a member of an enumeration
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint metadata needs")
