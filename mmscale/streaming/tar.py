"""Every header of a tar read once: names, payload positions and a digest, without touching the payload.

The reader never ends early in silence: each header's checksum is checked, sizes are held against the bytes that exist,
the end marker is required and only zeros may follow it. (webdataset's default drops the rest of a damaged shard.)
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mmscale.errors import DataError
from mmscale.streaming.storage.local import LocalFile
from mmscale.streaming.storage.zstd import FrameTable, ZstdFile, read_frame_table

BLOCK = 512
MAX_NAME_BYTES = 512
MAX_MEMBER_BYTES = 1 << 30
# An extended header beyond this is not even looked at: its only use would be a member name of megabytes.
MAX_EXTENDED_BYTES = 1 << 20

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_REGULAR = (b"0", b"\0", b"7")
DIRECTORY = b"5"
EXTENDED = b"LKxg"
"""Types of the GNU and PAX headers that describe the member after them."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar. `offset` and `size`: its payload in bytes. `fault`: why it may not be used, empty = usable."""

    name: str
    offset: int
    size: int
    fault: str = ""


@dataclass(frozen=True, slots=True)
class TarScan:
    """All members of a tar in order, refused ones included. `headers`: hex digest over every header block."""

    members: list[Member]
    tar_size: int
    headers: str


class TarContent(Protocol):
    """The bytes of a tar: its length and slices of it."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


@dataclass(slots=True)
class Extended:
    """What GNU and PAX headers say about the member that follows them; `fault`: why it may not be used."""

    name: bytes | None = None
    size: int | None = None
    fault: str = ""
    pax: dict[bytes, bytes] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member by WebDataset's rule: cut at the first dot of the base name.

    A name without an extension, or with nothing before the dot, gives an empty extension.

    Example:
        >>> split_name("d.1/a.0.JPG")
        ('d.1/a', '0.jpg')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, ext = base.partition(".")
    return (folder + slash + stem, ext.lower()) if stem else (name, "")


def name_fault(name: str) -> str:
    """Why a member name may not be used, as a fixed word; empty when it may."""
    if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        return "name_too_long"
    if name.startswith("/") or re.match(r"[A-Za-z]:[\\/]", name):
        return "name_absolute"
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        return "name_parent_folder"
    if _CONTROL.search(name):
        return "name_control_character"
    if "__" in name and any(
        w.startswith("__") and w.endswith("__") for part in parts for w in (part, *part.split("."))
    ):
        return "name_reserved"
    return "" if split_name(name)[1] else "name_without_extension"


def is_zstd_name(name: str) -> bool:
    """Whether a file is to be read as seekable zstd; one that is still being written (`.tmp`) counts too."""
    return name.removesuffix(".tmp").endswith(".zst")


@contextmanager
def open_tar(path: Path) -> Iterator[tuple[TarContent, FrameTable | None]]:
    """The content of a local `.tar` or seekable `.tar.zst`, and the frames of the latter.

    Raises:
        DataError: empty, or not seekable zstd.
    """
    size = path.stat().st_size
    if is_zstd_name(path.name):
        frames = read_frame_table(path)
        yield _ZstdContent(ZstdFile(LocalFile(path, size), frames, str(path))), frames
        return
    if size == 0:
        raise DataError(f"{path}: expected a tar, found 0 bytes; remove the file or copy it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data, None


class _ZstdContent:
    def __init__(self, file: ZstdFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return self._file.size()

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(len(self))
        return self._file.read(start, max(0, stop - start))


def scan_tar(path: Path) -> TarScan:
    """All members of a tar (ustar with prefix, GNU long names, PAX, base-256 sizes) by its headers alone.

    Raises:
        DataError: not a tar, empty, a damaged header, a cut-off file or a missing end marker; the text has the offset.
    """
    with open_tar(path) as (data, _):
        return scan_content(path, data)


def scan_content(path: Path, data: TarContent) -> TarScan:
    """Like `scan_tar`, of a tar that is open. `path`: for messages."""
    digest = hashlib.blake2b(digest_size=16)
    members = list(_members(path, data, digest))
    return TarScan(members, len(data), digest.hexdigest())


def _members(path: Path, data: TarContent, digest: hashlib.blake2b) -> Iterator[Member]:
    position, total, extended = 0, len(data), Extended()
    while True:
        header = data[position : position + BLOCK]
        if not header.strip(b"\0") and len(header) == BLOCK:
            _check_end(path, data, position)
            return
        digest.update(header)
        kind, size = read_header(path, header, position, total)
        start = position + BLOCK
        if extended.size is not None and kind not in EXTENDED:
            size = extended.size
        if start + size > total:
            raise DataError(
                f"{path}: the member at offset {position} has {size} bytes, but the file ends after {total - start} of "
                "them; the shard is cut off: copy it again"
            )
        if kind in EXTENDED:
            body = data[start : start + size] if size <= MAX_EXTENDED_BYTES else None
            read_extended(path, kind, body, position, extended)
        else:
            if kind != DIRECTORY:  # a folder holds no data; everything else is a member or is counted
                yield as_member(header, kind, start, size, extended)
            extended = Extended()
        position = start + (size + BLOCK - 1) // BLOCK * BLOCK


def read_header(path: Path | str, header: bytes, position: int, total: int) -> tuple[bytes, int]:
    """Type and payload size of a header block whose checksum is right.

    Args:
        path: the shard, for the message.
        position: of the block in the tar, of `total` bytes.

    Raises:
        DataError: the block is short, or not a header.
    """
    if len(header) < BLOCK:
        raise DataError(
            f"{path}: no end marker at offset {position} of {total} bytes; the shard is cut off: copy it again"
        )
    checksum = sum(header) - sum(header[148:156]) + 8 * 32
    try:
        stored = int(header[148:156].strip(b"\0 ") or b"0", 8)
        size = _number(header[124:136]) if stored == checksum else -1
    except ValueError:
        size = -1
    if size < 0:
        raise DataError(f"{path}: damaged or foreign tar header at offset {position}; copy the shard again")
    return header[156:157], size


def _number(octets: bytes) -> int:
    """A tar number: octal digits, or base 256 when the top bit is set."""
    return int.from_bytes(octets[1:], "big") if octets[0] & 0x80 else int(octets.strip(b"\0 ") or b"0", 8)


def _check_end(path: Path, data: TarContent, position: int) -> None:
    """Refuses anything but zeros after the end marker: a zeroed header in the middle must not hide what follows."""
    for start in range(position, len(data), 1 << 20):
        if data[start : start + (1 << 20)].strip(b"\0"):
            raise DataError(
                f"{path}: data follows the end marker at offset {position}; the shard is damaged or made of several tars "
                "joined: write it again as one tar"
            )


def read_extended(path: Path | str, kind: bytes, body: bytes | None, position: int, extended: Extended) -> None:
    """Takes name and size of the next member from a GNU (`L`, `K`) or PAX (`x`, `g`) header.

    Args:
        body: its payload; None = longer than MAX_EXTENDED_BYTES.
        position: of the header block in the tar, for the message.

    Raises:
        DataError: damaged PAX records.
    """
    if kind in b"Kg":  # link targets are never followed; global PAX records name no member
        return
    if body is None:
        extended.fault = "name_too_long"
        return
    if kind == b"L":
        extended.name = body.rstrip(b"\0")
        return
    try:
        extended.pax = dict(_pax_records(body))
        extended.name = extended.pax.get(b"path", extended.name)
        extended.size = int(extended.pax[b"size"]) if b"size" in extended.pax else None
        if extended.size is not None and extended.size < 0:
            raise ValueError("negative size")  # would lead the scan backwards, round and round
    except ValueError:
        raise DataError(f"{path}: damaged PAX header at offset {position}; copy the shard again") from None
    if any(name.startswith(b"GNU.sparse") for name in extended.pax):
        extended.fault = "not_regular"


def _pax_records(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position < len(body):
        space = body.index(b" ", position)
        length = int(body[position:space])
        if length < 5 or body[position + length - 1 : position + length] != b"\n":
            raise ValueError("PAX record")
        name, _, value = body[space + 1 : position + length - 1].partition(b"=")
        yield name, value
        position += length


def as_member(header: bytes, kind: bytes, start: int, size: int, extended: Extended) -> Member:
    """The member of a header block, its name taken from the extended headers before it where they have one."""
    raw = extended.name
    if raw is None:
        raw = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
        raw = prefix + b"/" + raw if prefix else raw
    try:
        name = raw.decode("utf-8")
        fault = extended.fault or name_fault(name)
    except UnicodeDecodeError:
        name, fault = raw.decode("utf-8", "backslashreplace"), "name_not_utf8"
    if not fault and kind not in _REGULAR:
        fault = "not_regular"
    if not fault and size > MAX_MEMBER_BYTES:
        fault = "member_too_large"
    return Member(name[:MAX_NAME_BYTES] if fault else name, start, size, fault)
