"""Writes safetensors files of a bounded size, with the index that Hugging Face reads, holding one block of one tensor.

A file is 8 bytes with the length of its header, the header (JSON: type, shape and place of every tensor) and the bytes of the
tensors. The header needs shapes only, so it is written first and the tensors follow one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written: its name, shape and stored type (fp32, bf16 or fp16)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the stored values."""
        return math.prod(self.shape) * self.dtype.itemsize


def split_files(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """The entries in order, each in the file of the one before unless its values would pass `max_bytes` there.

    Example:
        >>> five = [Entry(str(i), (i,), torch.float32) for i in (1, 2, 3, 9, 1)]
        >>> [[e.name for e in file] for file in split_files(five, 12)]
        [['1', '2'], ['3'], ['9'], ['1']]
    """
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not files or size + entry.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.num_bytes
    return files


class SafetensorsWriter:
    """Writes the tensors named at construction, in that order; memory stays at a block of the tensor that is given."""

    def __init__(self, folder: Path, entries: Sequence[Entry], max_bytes: int) -> None:
        """Opens nothing yet.

        Args:
            entries: all tensors, with different names.
            max_bytes: largest sum of values in a file; a larger tensor has a file of its own.
        """
        self._folder = folder
        self._files = split_files(entries, max_bytes)
        self._places = self._all_places()
        self._open: IO[bytes] | None = None
        self.total_bytes = sum(entry.num_bytes for entry in entries)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor on the CPU, of any floating type; it is cast block by block.

        Raises:
            ValueError: it is not the tensor that comes next, or its shape is another.
        """
        index, is_first, entry = next(self._places)
        if (name, tuple(tensor.shape)) != (entry.name, entry.shape):
            raise ValueError(f"expected {entry.name} {entry.shape} next, found {name} {tuple(tensor.shape)}")
        if is_first:
            self._next_file(index)
        assert self._open is not None, "the first tensor of a file opens it"
        flat = tensor.detach().reshape(-1)
        for start in range(0, len(flat), _BLOCK_ELEMENTS):
            block = flat[start : start + _BLOCK_ELEMENTS].to(entry.dtype)
            self._open.write(block.view(torch.uint8).numpy().data)

    def close(self) -> int:
        """Writes the index when there are several files. Gives the number of tensors; all must have been written."""
        left = [entry.name for _, _, entry in self._places]
        assert not left, f"every tensor is written before the end, {left[:3]} are not"
        if self._open is not None:
            self._open.close()
        weight_map = {entry.name: self._name(i) for i, file in enumerate(self._files) for entry in file}
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        return len(weight_map)

    def _all_places(self) -> Iterator[tuple[int, bool, Entry]]:
        for i, file in enumerate(self._files):
            for k, entry in enumerate(file):
                yield i, k == 0, entry

    def _name(self, index: int) -> str:
        count = len(self._files)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _next_file(self, index: int) -> None:
        if self._open is not None:
            self._open.close()
        self._open = (self._folder / self._name(index)).open("xb")
        self._open.write(_header(self._files[index]))


def _header(entries: Sequence[Entry]) -> bytes:
    """The beginning of a file of these tensors; its length is a multiple of 8, as the format asks."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        content[entry.name] = {"dtype": _TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
