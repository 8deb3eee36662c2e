"""A value on its way to another process of the machine: one block of bytes, shared instead of copied when it is large.

The block holds a pickle and, outside of it, the bytes of every tensor and array, each part from a multiple of 64 bytes on. A
large block is an anonymous file in memory whose descriptor travels over the socket, and the receiver's tensors are views of
its pages. So nothing has a name that could be left behind, and a pack costs one descriptor however many tensors it has.
"""

from __future__ import annotations

import copyreg
import io
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SHARED_FROM_BYTES = 128 << 10
"""Smaller blocks go through the socket itself: below about this size a copy costs less than a file and its pages."""

_HEAD = struct.Struct("<Q")  # bytes of the block that follows, or whose descriptor comes along
_ALIGN = 64

Part = bytes | memoryview


def send(channel: socket.socket, value: object) -> None:
    """Sends `value`, waiting for room. Its tensors are of the CPU and of types that numpy has.

    Raises:
        EOFError: the other end is gone.
    """
    parts = _split(value)
    size = _size(parts)
    try:
        if size < SHARED_FROM_BYTES or not hasattr(os, "memfd_create"):
            channel.sendall(_message(parts, size))
        else:
            _send_shared(channel, parts, size)
    except (BrokenPipeError, ConnectionResetError):
        raise EOFError("the other end is gone") from None


def message(value: object) -> bytearray:
    """The bytes that `receive` understands, for a sender that must not wait."""
    parts = _split(value)
    return _message(parts, _size(parts))


@dataclass(frozen=True, slots=True)
class Block:
    """A value as bytes that are not yet in one place; its tensors are not copied and must not change until it is written."""

    parts: tuple[Part, ...]
    num_bytes: int

    @classmethod
    def of(cls, value: object) -> Block:
        """The block of `value`, whose tensors are as for `send`."""
        parts = _split(value)
        return cls(tuple(parts), _size(parts))

    def write(self, out: memoryview) -> None:
        """Copies the block to the beginning of `out`."""
        for start, part in _places(self.parts):
            out[start : start + len(part)] = part


def read_block(block: memoryview) -> Any:
    """The value of a written block. Its tensors are views of it, aligned when it begins at a multiple of 64 bytes."""
    return _join(block)


def receive(channel: socket.socket) -> Any:
    """The next value, which owns its memory; its tensors are writable and begin at multiples of 64 bytes.

    Raises:
        EOFError: the other end is gone, and with it what it had not sent as a whole.
    """
    try:
        head, files, _, _ = socket.recv_fds(channel, _HEAD.size, 1, socket.MSG_WAITALL)
        if len(head) < _HEAD.size:
            raise EOFError("the other end is closed")
        (size,) = _HEAD.unpack(head)
        block = _map(files[0], size) if files else _read(channel, size)
    except ConnectionResetError:
        raise EOFError("the other end is gone") from None
    return _join(memoryview(block))


def _split(value: object) -> list[Part]:
    """A table of sizes (int64: their number, then each in bytes), the pickle, and the buffers outside of it."""
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    pickler = pickle.Pickler(stream, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = _REDUCERS
    pickler.dump(value)
    parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
    return [struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts)), *parts]


def _join(block: memoryview) -> Any:
    (count,) = struct.unpack_from("<q", block)
    sizes = struct.unpack_from(f"<{count}q", block, 8)
    stream, *buffers = (block[start : start + size] for start, size in _starts([8 * (count + 1), *sizes])[1:])
    return pickle.loads(stream, buffers=buffers)  # noqa: S301  (from our own process)


def _reduce_tensor(tensor: torch.Tensor) -> tuple[object, tuple[np.ndarray]]:
    return _tensor, (tensor.contiguous().numpy(),)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


_REDUCERS: Mapping[type, Callable[[Any], Any]] = {**copyreg.dispatch_table, torch.Tensor: _reduce_tensor}


def _starts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, size) of each part."""
    starts, at = [], 0
    for size in sizes:
        starts.append((at, size))
        at += -(-size // _ALIGN) * _ALIGN
    return starts


def _places(parts: Sequence[Part]) -> Iterator[tuple[int, Part]]:
    return ((start, part) for (start, _), part in zip(_starts([*map(len, parts)]), parts, strict=True))


def _size(parts: Sequence[Part]) -> int:
    start, size = _starts([*map(len, parts)])[-1]
    return start + size


def _message(parts: Sequence[Part], size: int) -> bytearray:
    out = bytearray(_HEAD.size + size)
    out[: _HEAD.size] = _HEAD.pack(size)
    Block(tuple(parts), size).write(memoryview(out)[_HEAD.size :])
    return out


def _send_shared(channel: socket.socket, parts: Sequence[Part], size: int) -> None:
    file = os.memfd_create("mmscale-pack", os.MFD_CLOEXEC)
    try:
        os.truncate(file, size)
        for start, part in _places(parts):
            _write(file, part, start)
        socket.send_fds(channel, [_HEAD.pack(size)], [file])
    finally:
        os.close(file)


def _write(file: int, part: Part, start: int) -> None:
    left = memoryview(part)
    while left:  # one call writes at most 2 GiB
        written = os.pwrite(file, left, start)
        left, start = left[written:], start + written


def _map(file: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(file)


def _read(channel: socket.socket, size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    left = memoryview(block)
    while left:
        count = channel.recv_into(left)
        if not count:
            raise EOFError("the other end closed in the middle of a value")
        left = left[count:]
    return block
