"""The sidecar of a shard: where each sample's members lie and how long they are, so that nothing is read to plan.

Layout of `NNNNNN.idx`, little-endian: magic (8 bytes), length of the header (u32), length of the key table (u32), header
(JSON: tar size, digest of all tar headers, extensions, counts, skipped, columns), the columns one after the other, the keys
(UTF-8, newline-separated). Within a sample the members stand in `member_order`, whatever their order in the tar.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mmscale.errors import DataError
from mmscale.streaming.media import Lengths, is_executable, member_order, modality_of, probe
from mmscale.streaming.strict_json import JsonFault, parse_json
from mmscale.streaming.tar import Member, TarScan, scan_tar, split_name

MAGIC = b"MMIDX\x00\x01\n"
TEXT_EXTENSIONS = ("json", "txt")

MEMBER_COLUMNS = {
    "offset": "<u8",
    "size": "<u8",
    "audio_samples": "<u8",
    "width": "<u4",
    "height": "<u4",
    "frames": "<u4",
    "fps_milli": "<u4",
    "rate_hz": "<u4",
    "text_bytes": "<u4",
    "ext": "<u2",
}
"""Columns with one number per member. 0 = does not apply, or the header could not be read."""


@dataclass(frozen=True)
class ShardIndex:
    """The content of one `.idx` file.

    `columns`: `first` (u64 [samples + 1], first member of each sample) and `MEMBER_COLUMNS` ([members]).
    `exts`: extensions that the column `ext` points into. `key_table`: the keys, newline-separated UTF-8.
    `skipped`: samples and stray members that were refused when indexing, counted once per key, by reason.
    """

    tar_size: int
    headers: str
    exts: tuple[str, ...]
    columns: Mapping[str, np.ndarray]
    key_table: bytes
    skipped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.columns["first"]) - 1

    # Single numbers are read through memoryviews: a numpy scalar costs more than the read of a small member.
    @cached_property
    def first(self) -> memoryview:
        """Column `first`, for one sample at a time."""
        return self.columns["first"].data

    @cached_property
    def offset(self) -> memoryview:
        """Column `offset`, for one member at a time."""
        return self.columns["offset"].data

    @cached_property
    def size(self) -> memoryview:
        """Column `size`, for one member at a time."""
        return self.columns["size"].data

    @cached_property
    def ext(self) -> memoryview:
        """Column `ext`, for one member at a time."""
        return self.columns["ext"].data

    @cached_property
    def _key_starts(self) -> memoryview:
        ends = np.flatnonzero(np.frombuffer(self.key_table, np.uint8) == ord("\n"))
        return np.concatenate([[0], ends + 1, [len(self.key_table) + 1]]).astype(np.int64).data

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        return self.key_table[self._key_starts[i] : self._key_starts[i + 1] - 1].decode("utf-8")

    @property
    def keys(self) -> list[str]:
        """All keys in order."""
        return self.key_table.decode("utf-8").split("\n") if len(self) else []


def index_path(tar: Path) -> Path:
    """The sidecar's path: `000000.tar` -> `000000.idx` (`.tar.idx` is another project's name)."""
    return tar.with_suffix(".idx")


def build_index(tar: Path) -> ShardIndex:
    """The index of a shard, from its headers and the headers of its media.

    Raises:
        DataError: the shard cannot be trusted as a whole: not a tar, without any file, cut off, damaged, or it holds a
            kind of file that runs code when loaded. The caller puts it aside by name.
    """
    scan = scan_tar(tar)
    if not scan.members:
        raise DataError(f"{tar}: expected the files of samples, found a tar without any; write it again, or remove it")
    samples, skipped = _group(scan.members)
    exts: dict[str, int] = {}
    rows: list[tuple[int, ...]] = []
    first = [0]
    with tar.open("rb") as file:
        for member in scan.members:
            _refuse_executable(tar, file.fileno(), member)
        for members in samples.values():
            for ext, member in members:
                rows.append(_row(file.fileno(), exts.setdefault(ext, len(exts)), ext, member))
            first.append(len(rows))
    return _assemble(scan, samples, first, rows, tuple(exts), skipped)


def _assemble(
    scan: TarScan,
    samples: Mapping[str, list[tuple[str, Member]]],
    first: list[int],
    rows: list[tuple[int, ...]],
    exts: tuple[str, ...],
    skipped: Mapping[str, int],
) -> ShardIndex:
    table = list(zip(*rows, strict=True)) if rows else [()] * len(MEMBER_COLUMNS)
    columns = {name: np.array(c, dtype) for (name, dtype), c in zip(MEMBER_COLUMNS.items(), table, strict=True)}
    columns["first"] = np.array(first, "<u8")
    return ShardIndex(scan.tar_size, scan.headers, exts, columns, "\n".join(samples).encode(), dict(skipped))


def _group(members: list[Member]) -> tuple[dict[str, list[tuple[str, Member]]], Counter[str]]:
    """Samples by key in tar order, and what is refused: a fault of any member takes its whole sample out, counted once."""
    samples: dict[str, list[tuple[str, Member]]] = {}
    faults: dict[str, str] = {}
    current = None
    for member in members:
        key, ext = split_name(member.name)
        if member.fault:
            faults.setdefault(key, member.fault)
            continue
        run = samples.setdefault(key, [])
        if run and key != current:
            faults.setdefault(key, "split_sample")
        elif any(ext == other for other, _ in run):
            faults.setdefault(key, "duplicate_member")
        run.append((ext, member))
        current = key
    for key in faults:
        samples.pop(key, None)
    for run in samples.values():
        run.sort(key=lambda item: member_order(item[0]))
    return samples, Counter(faults.values())


def _refuse_executable(tar: Path, fd: int, member: Member) -> None:
    ext = split_name(member.name)[1]
    head = os.pread(fd, 128, member.offset) if ext.endswith("npy") else b""
    if is_executable(ext, head):
        raise DataError(
            f"{tar}: the member {member.name!r} at offset {member.offset} is of a kind that runs code when loaded; nothing "
            "of this shard is used: write the shard again without such files"
        )


def _row(fd: int, ext_code: int, ext: str, member: Member) -> tuple[int, ...]:
    """The member's numbers in the order of MEMBER_COLUMNS."""
    lengths = probe(ext, os.pread(fd, member.size, member.offset)) if modality_of(ext) else Lengths()
    text_bytes = member.size if ext in TEXT_EXTENSIONS else 0
    return (member.offset, member.size, *lengths, text_bytes, ext_code)


def encode_index(index: ShardIndex) -> bytes:
    """The bytes of an `.idx` file; equal shards give equal bytes."""
    header = {
        "tar_size": index.tar_size,
        "headers": index.headers,
        "exts": index.exts,
        "samples": len(index),
        "members": len(index.columns["offset"]),
        "skipped": dict(sorted(index.skipped.items())),
        "columns": [["first", "<u8"], *MEMBER_COLUMNS.items()],
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % 8)  # the columns, widest first, are aligned to their width
    columns = b"".join(index.columns[name].tobytes() for name in ("first", *MEMBER_COLUMNS))
    return MAGIC + struct.pack("<II", len(text), len(index.key_table)) + text + columns + index.key_table


def decode_index(data: bytes, path: Path) -> ShardIndex:
    """The index in the bytes of `path`. Raises DataError when they are not a whole and consistent index."""
    try:
        return _decode(data)
    except (JsonFault, ValueError, KeyError, TypeError, struct.error) as e:
        raise DataError(f"{path}: not a usable index ({e}); build it again: mmscale-data index {path.parent}") from None


def _decode(data: bytes) -> ShardIndex:
    if data[:8] != MAGIC:
        raise ValueError("wrong magic number or version")
    header_size, keys_size = struct.unpack_from("<II", data, 8)
    header = parse_json(data[16 : 16 + header_size])
    if header["columns"] != [["first", "<u8"], *map(list, MEMBER_COLUMNS.items())]:
        raise ValueError("unknown columns")
    if not isinstance(header["skipped"], dict) or not all(isinstance(ext, str) for ext in header["exts"]):
        raise ValueError("wrong types in the header")
    position, columns = 16 + header_size, {}
    for name, dtype in header["columns"]:
        count = header["samples"] + 1 if name == "first" else header["members"]
        columns[name] = np.frombuffer(data, dtype, count, position)
        position += columns[name].nbytes
    if len(data) != position + keys_size:
        raise ValueError(f"{len(data)} bytes, expected {position + keys_size}")
    keys = data[position:]
    index = ShardIndex(header["tar_size"], header["headers"], tuple(header["exts"]), columns, keys, header["skipped"])
    _check(index)
    return index


def _check(index: ShardIndex) -> None:
    """An index is input like any other: no number in it may lead outside the shard."""
    first, offset, size = (index.columns[name] for name in ("first", "offset", "size"))
    if first[0] != 0 or first[-1] != len(offset) or not (first[1:] > first[:-1]).all():
        raise ValueError("samples without members")
    if (offset > index.tar_size).any() or (size > index.tar_size - offset).any():
        raise ValueError("a member beyond the end of the shard")
    if len(offset) and index.columns["ext"].max() >= len(index.exts):
        raise ValueError("an unknown extension")
    if len(index) and index.key_table.count(b"\n") + 1 != len(index):
        raise ValueError("the number of keys")
    index.key_table.decode("utf-8")


def write_index(index: ShardIndex, path: Path) -> None:
    """Writes an `.idx` file: whole, or not at all."""
    write_atomic(path, encode_index(index))


def read_index(path: Path) -> ShardIndex:
    """The index in an `.idx` file. Raises DataError when it is missing, damaged or of another version."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: no index ({e.strerror}); build it: mmscale-data index {path.parent}") from None
    return decode_index(data, path)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file by `data` so that a reader or a crash never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
