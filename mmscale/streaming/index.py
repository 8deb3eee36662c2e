"""The sidecar of a shard: where each sample's members lie and how long they are, so that nothing is read to plan.

Layout of `NNNNNN.idx`, little-endian: magic (8 bytes), length of the header (u32), length of the key table (u32), header
(JSON: tar size, digest of all tar headers, extensions, counts, skipped, columns), the columns one after the other, the keys
(UTF-8, newline-separated). Within a sample the members stand in `member_order`, whatever their order in the tar.
For a `.tar.zst` all positions are those in the tar, and two columns say where its zstd frames begin.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mmscale.errors import DataError
from mmscale.logging import get_logger
from mmscale.streaming.media import Lengths, is_executable, member_order, modality_of, probe
from mmscale.streaming.storage.zstd import FrameTable
from mmscale.streaming.strict_json import JsonFault, parse_json
from mmscale.streaming.tar import Member, TarContent, TarScan, open_tar, scan_content, split_name

log = get_logger(__name__)

MAGIC = b"MMIDX\x00\x02\n"
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
    "keyframes": "<u4",
    "text_bytes": "<u4",
    "ext": "<u2",
}
"""Columns with one number per member. 0 = does not apply, or the header could not be read."""

_LAYOUT = {
    "first": "<u8",
    "frame_file": "<u8",
    "frame_content": "<u8",
    **{name: dtype for name, dtype in MEMBER_COLUMNS.items() if dtype != "<u2"},
    "key_end": "<u4",
    "ext": "<u2",
}
"""All columns in the order of the file, widest first: each is aligned to its width."""

_HEAD_BYTES = 16 << 10
"""The header of nearly every picture lies within."""


@dataclass(frozen=True)
class ShardIndex:
    """The content of one `.idx` file.

    `tar_size`: bytes of the tar, uncompressed. `columns`: `first` (u64 [samples + 1], first member of each sample) and
    `MEMBER_COLUMNS` ([members]). `exts`: extensions that the column `ext` points into. `key_table`: the keys,
    newline-separated UTF-8. `skipped`: samples and stray members that were refused when indexing, counted once per key, by
    reason. `frames`: those of a `.tar.zst`.
    """

    tar_size: int
    headers: str
    exts: tuple[str, ...]
    columns: Mapping[str, np.ndarray]
    key_table: bytes | memoryview
    skipped: Mapping[str, int]
    frames: FrameTable | None = None

    def __len__(self) -> int:
        return len(self.columns["first"]) - 1

    @property
    def file_size(self) -> int:
        """Bytes of the shard's file, compressed or not."""
        return self.frames.file_bytes if self.frames else self.tar_size

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
    def _key_end(self) -> memoryview:
        stored = self.columns.get("key_end")  # in what was read from a file: looking up a key need not read all keys
        return (_key_ends(self.key_table) if stored is None else stored).data

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        ends = self._key_end
        return str(self.key_table[ends[i - 1] + 1 if i else 0 : ends[i]], "utf-8")

    @property
    def keys(self) -> list[str]:
        """All keys in order."""
        return str(self.key_table, "utf-8").split("\n") if len(self) else []


def _key_ends(key_table: bytes | memoryview) -> np.ndarray:
    """Where each key ends, u32 [samples]; one empty key and no key at all look alike, which is why keys are not empty."""
    if not len(key_table):
        return np.zeros(0, "<u4")
    ends = np.flatnonzero(np.frombuffer(key_table, np.uint8) == ord("\n"))
    return np.append(ends, len(key_table)).astype("<u4")


def index_path(shard: Path) -> Path:
    """The sidecar's path: `000000.tar` or `000000.tar.zst` -> `000000.idx` (`.tar.idx` is another project's name)."""
    name = shard.name.removesuffix(".zst")
    return shard.with_name(name).with_suffix(".idx")


def build_index(tar: Path) -> ShardIndex:
    """The index of a shard, from its headers and the headers of its media.

    Raises:
        DataError: the shard cannot be trusted as a whole: not a tar, without any file, cut off, damaged, not seekable, or it
            holds a kind of file that runs code when loaded. The caller puts it aside by name.
    """
    with open_tar(tar) as (content, frames):
        scan = scan_content(tar, content)
        if not scan.members:
            raise DataError(
                f"{tar}: expected the files of samples, found a tar without any; write it again, or remove it"
            )
        samples, skipped = _group(scan.members)
        exts: dict[str, int] = {}
        rows: list[tuple[int, ...]] = []
        first = [0]
        for member in scan.members:
            _refuse_executable(tar, content, member)
        for members in samples.values():
            for ext, member in members:
                rows.append(_row(content, exts.setdefault(ext, len(exts)), ext, member))
            first.append(len(rows))
    if frames is not None and any(map(modality_of, exts)):
        text = "%s: media in a compressed shard; it saves about 3 %% of JPEG files and makes reading many times slower"
        log.warning(f"{text}; compress text alone: mmscale-data reshard", tar)
    return _assemble(scan, frames, samples, first, rows, tuple(exts), skipped)


def _assemble(
    scan: TarScan,
    frames: FrameTable | None,
    samples: Mapping[str, list[tuple[str, Member]]],
    first: list[int],
    rows: list[tuple[int, ...]],
    exts: tuple[str, ...],
    skipped: Mapping[str, int],
) -> ShardIndex:
    table = list(zip(*rows, strict=True)) if rows else [()] * len(MEMBER_COLUMNS)
    columns = {name: np.array(c, dtype) for (name, dtype), c in zip(MEMBER_COLUMNS.items(), table, strict=True)}
    columns["first"] = np.array(first, "<u8")
    return ShardIndex(scan.tar_size, scan.headers, exts, columns, "\n".join(samples).encode(), dict(skipped), frames)


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


def _refuse_executable(tar: Path, content: TarContent, member: Member) -> None:
    ext = split_name(member.name)[1]
    head = content[member.offset : member.offset + 128] if ext.endswith("npy") else b""
    if is_executable(ext, head):
        raise DataError(
            f"{tar}: the member {member.name!r} at offset {member.offset} is of a kind that runs code when loaded; nothing "
            "of this shard is used: write the shard again without such files"
        )


def _row(content: TarContent, ext_code: int, ext: str, member: Member) -> tuple[int, ...]:
    """The member's numbers in the order of MEMBER_COLUMNS."""
    text_bytes = member.size if ext in TEXT_EXTENSIONS else 0
    return (member.offset, member.size, *_lengths(content, ext, member), text_bytes, ext_code)


def _lengths(content: TarContent, ext: str, member: Member) -> Lengths:
    start, end, modality = member.offset, member.offset + member.size, modality_of(ext)
    if modality is None:
        return Lengths()
    if modality == "video":  # its header may lie at its end, and all between is left alone
        return probe(ext, io.BufferedReader(_View(content, start, member.size)))
    if modality == "image" and member.size > _HEAD_BYTES:
        lengths = probe(ext, content[start : start + _HEAD_BYTES])
        if lengths.width:
            return lengths
    return probe(ext, content[start:end])


class _View(io.RawIOBase):
    """One member of an open tar as a file to read."""

    def __init__(self, content: TarContent, start: int, size: int) -> None:
        super().__init__()
        self._content, self._start, self._size, self._position = content, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"seek to {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._start + min(self._position, self._size)
        data = self._content[start : min(start + len(buffer), self._start + self._size)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def encode_index(index: ShardIndex) -> bytes:
    """The bytes of an `.idx` file; equal shards give equal bytes."""
    columns = {**index.columns, "key_end": _key_ends(index.key_table)}
    columns["frame_file"], columns["frame_content"] = (
        (index.frames.file, index.frames.content) if index.frames else (np.zeros(0, "<u8"),) * 2
    )
    header = {
        "tar_size": index.tar_size,
        "headers": index.headers,
        "exts": index.exts,
        "samples": len(index),
        "members": len(columns["offset"]),
        "frames": len(columns["frame_file"]),
        "skipped": dict(sorted(index.skipped.items())),
        "columns": list(_LAYOUT.items()),
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % 8)
    body = b"".join(columns[name].astype(dtype, copy=False).tobytes() for name, dtype in _LAYOUT.items())
    return MAGIC + struct.pack("<II", len(text), len(index.key_table)) + text + body + index.key_table


def decode_index(data: bytes | mmap.mmap, path: Path | str, *, is_checked: bool = False) -> ShardIndex:
    """The index in the bytes of `path`; its columns and keys stay views of `data`.

    Args:
        path: for the message.
        is_checked: these bytes have been checked before, so that only the header is parsed.

    Raises:
        DataError: they are not a whole and consistent index.
    """
    try:
        index = _decode(data)
        if not is_checked:
            _check(index)
    except (JsonFault, ValueError, KeyError, TypeError, struct.error) as e:
        folder = str(path).rpartition("/")[0]
        raise DataError(f"{path}: not a usable index ({e}); build it again: mmscale-data index {folder}") from None
    return index


def _decode(data: bytes | mmap.mmap) -> ShardIndex:
    if data[:8] != MAGIC:
        raise ValueError("wrong magic number or version")
    header_size, keys_size = struct.unpack_from("<II", data, 8)
    header = parse_json(data[16 : 16 + header_size])
    if header["columns"] != [list(column) for column in _LAYOUT.items()]:
        raise ValueError("unknown columns")
    if not isinstance(header["skipped"], dict) or not all(isinstance(ext, str) for ext in header["exts"]):
        raise ValueError("wrong types in the header")
    counts = {"first": header["samples"] + 1, "key_end": header["samples"]}
    counts.update(frame_file=header["frames"], frame_content=header["frames"])
    position, columns = 16 + header_size, {}
    for name, dtype in _LAYOUT.items():
        columns[name] = np.frombuffer(data, dtype, counts.get(name, header["members"]), position)
        position += columns[name].nbytes
    if len(data) != position + keys_size:
        raise ValueError(f"{len(data)} bytes, expected {position + keys_size}")
    frame_file, frame_content = columns.pop("frame_file"), columns.pop("frame_content")
    frames = FrameTable(frame_file, frame_content) if len(frame_file) else None
    keys = memoryview(data)[position:]
    return ShardIndex(
        header["tar_size"], header["headers"], tuple(header["exts"]), columns, keys, header["skipped"], frames
    )


def _check(index: ShardIndex) -> None:
    """An index is input like any other: no number in it may lead outside the shard."""
    first, offset, size = (index.columns[name] for name in ("first", "offset", "size"))
    if first[0] != 0 or first[-1] != len(offset) or not (first[1:] > first[:-1]).all():
        raise ValueError("samples without members")
    if (offset > index.tar_size).any() or (size > index.tar_size - offset).any():
        raise ValueError("a member beyond the end of the shard")
    if len(offset) and index.columns["ext"].max() >= len(index.exts):
        raise ValueError("an unknown extension")
    if not np.array_equal(index.columns["key_end"], _key_ends(index.key_table)):
        raise ValueError("the number of keys")
    str(index.key_table, "utf-8")
    if index.frames is not None:
        _check_frames(index.frames, index.tar_size)


def _check_frames(frames: FrameTable, tar_size: int) -> None:
    grows = (frames.file[1:] > frames.file[:-1]).all() and (frames.content[1:] >= frames.content[:-1]).all()
    if not grows or frames.content[0] != 0 or frames.content_bytes != tar_size:
        raise ValueError("zstd frames that do not make up the tar")


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


def map_index(path: Path) -> ShardIndex:
    """Like `read_index` for a file whose content was checked before: mapped, so that only what is used takes memory."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:  # ValueError: an empty file
        raise DataError(f"{path}: no index ({e}); build it: mmscale-data index {path.parent}") from None
    return decode_index(data, path, is_checked=True)


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
