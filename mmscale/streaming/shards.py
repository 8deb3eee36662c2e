"""Random access to the samples of a dataset folder, checked when it is opened and named when it fails.

A shard that is missing, not a tar, or not the indexed one is put aside by name (`ShardSet.quarantined`); its samples
count as skipped. A shard that changes or ends while it is read is a DataError with shard and offset.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np

from mmscale.errors import DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.streaming.index import MEMBER_COLUMNS, ShardIndex, decode_index, index_path, read_index
from mmscale.streaming.manifest import MANIFEST_NAME, Manifest, ShardEntry, file_sha256, idx_digest, read_manifest
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample
from mmscale.types import MODALITIES, Sample

log = get_logger(__name__)
T = TypeVar("T")

RETRY_DELAYS_S = (0.1, 0.5, 2.0)
MAX_OPEN_SHARDS = 128


class Shard:
    """Samples of one indexed tar by number. Opens the file, and in another process the index, at the first read."""

    def __init__(self, path: Path, index: ShardIndex, sha256: str = "") -> None:
        """`sha256`: hex digest of the tar as its manifest has it; empty where there is no manifest yet."""
        self._fd: int | None = None
        self.path = path
        self.sha256 = sha256
        self._index: ShardIndex | None = index
        self._num_samples = len(index)

    def __len__(self) -> int:
        return self._num_samples

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_index": None, "_fd": None}

    @property
    def index(self) -> ShardIndex:
        """The shard's index; read again after pickling."""
        if self._index is None:
            self._index = read_index(index_path(self.path))
        return self._index

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        return self.index.key(i)

    def offset(self, i: int) -> int:
        """Position in the tar of the payload of sample `i`'s first member, in bytes."""
        index = self.index
        return min(index.offset[index.first[i] : index.first[i + 1]])

    def members(self, i: int, keep: Callable[[str], bool] | None = None) -> list[tuple[str, bytes]]:
        """(extension, bytes) of sample `i`'s members, media first in natural order, optionally only some extensions.

        Raises:
            DataError: the file is gone, has another size than when it was indexed, or ends early.
        """
        index = self.index
        out = []
        for m in range(index.first[i], index.first[i + 1]):
            ext = index.exts[index.ext[m]]
            if keep is None or keep(ext):
                out.append((ext, self._read(index.offset[m], index.size[m], i)))
        return out

    def sizes(self, i: int) -> dict[str, int]:
        """Extension -> bytes of sample `i`'s members, from the index alone."""
        index = self.index
        return {index.exts[index.ext[m]]: index.size[m] for m in range(index.first[i], index.first[i + 1])}

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.close()

    def _read(self, offset: int, size: int, i: int) -> bytes:
        fd = self._fd if self._fd is not None else self._open()
        try:
            data = os.pread(fd, size, offset)
        except OSError:
            data = _try_again(lambda: os.pread(fd, size, offset), self.path)
        if len(data) != size:
            raise DataError(
                f"{self.path}: sample {self.key(i)!r} should have {size} bytes at offset {offset}, found {len(data)}; the "
                "shard was cut off while it was read: restore it and start again"
            )
        return data

    def _open(self) -> int:
        fd = self._fd = _retry(lambda: os.open(self.path, os.O_RDONLY), self.path)
        found, expected = os.fstat(fd).st_size, self.index.tar_size
        if found != expected:
            self.close()
            raise DataError(
                f"{self.path}: {found} bytes, {expected} when it was indexed; restore the shard, or index the folder again: "
                f"mmscale-data index {self.path.parent}"
            )
        return fd


@dataclass(frozen=True)
class Columns:
    """Length columns of all samples, to plan without reading. Row r has the members `first[r]:first[r + 1]`.

    `first`: int64 [rows + 1]. Per member, media of a sample first and in the order of `Sample.media`: `size` in bytes,
    `modality` int8 (index into MODALITIES, -1 = not a medium), `width`, `height` (pixels as displayed), `frames`,
    `fps_milli`, `rate_hz`, `audio_samples`, `text_bytes`; 0 = does not apply or unreadable header.
    """

    first: np.ndarray
    size: np.ndarray
    modality: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    fps_milli: np.ndarray
    rate_hz: np.ndarray
    audio_samples: np.ndarray
    text_bytes: np.ndarray


@dataclass(eq=False)
class ShardSet:
    """All usable samples of a dataset folder, numbered over its shards in manifest order.

    `quarantined`: shard name -> why it was put aside. `skipped`: what was refused when indexing or opening, by reason
    (`quarantined` = samples of shards put aside). `indexed == len(self) + sum(skipped.values())`.
    """

    folder: Path
    name: str
    fingerprint: str
    shards: tuple[Shard, ...]
    quarantined: Mapping[str, str]
    skipped: Counter[str]
    _starts: list[int] = field(init=False, repr=False)
    _open: OrderedDict[int, None] = field(init=False, repr=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._starts = [0, *accumulate(len(shard) for shard in self.shards)]

    @classmethod
    def open(cls, folder: Path, name: str) -> ShardSet:
        """The dataset in `folder`, every shard checked against manifest and index.

        Args:
            folder: has `manifest.json`.
            name: what sample ids start with, usually the path relative to the data root.

        Raises:
            RefusedInputError: no usable manifest, no usable shard, or no samples.
        """
        manifest = read_manifest(folder)
        shards, quarantined, skipped = _check_shards(folder, manifest)
        if not sum(len(shard) for shard in shards):
            reasons = "; ".join(f"{shard}: {reason}" for shard, reason in list(quarantined.items())[:3])
            raise RefusedInputError(
                f"{folder}: no usable sample in {len(manifest.shards)} shard(s). {reasons}".rstrip()
            )
        fingerprint = manifest.fingerprint
        if quarantined:
            used = tuple(entry for entry in manifest.shards if entry.name not in quarantined)
            fingerprint = Manifest(used).fingerprint
        return cls(folder, name, fingerprint, tuple(shards), quarantined, skipped)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, object]:
        state = {k: v for k, v in self.__dict__.items() if k != "columns"}
        return {**state, "_open": OrderedDict()}

    @property
    def indexed(self) -> int:
        """Samples that the shards hold, usable or not."""
        return len(self) + sum(self.skipped.values())

    def locate(self, row: int) -> tuple[int, int]:
        """Shard number and sample number in it of a row."""
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def id(self, row: int) -> str:
        """Id of a row: `"<name>/<shard>:<key>"`."""
        shard, i = self.locate(row)
        return f"{self.name}/{self.shards[shard].path.name}:{self.shards[shard].key(i)}"

    def offset(self, row: int) -> int:
        """Position of a row's first member in its tar, in bytes."""
        shard, i = self.locate(row)
        return self.shards[shard].offset(i)

    def members(self, row: int, keep: Callable[[str], bool] | None = None) -> list[tuple[str, bytes]]:
        """(extension, bytes) of a row's members, optionally only those whose extension `keep` accepts."""
        shard, i = self.locate(row)
        self._touch(shard)
        return self.shards[shard].members(i, keep)

    def read(self, row: int) -> Sample:
        """The sample of a row. Raises BadSampleError when it cannot be used, DataError when the shard has changed."""
        number, i = self.locate(row)
        shard = self.shards[number]
        return parse_sample(f"{self.name}/{shard.path.name}:{shard.key(i)}", self.members(row), shard.offset(i))

    @cached_property
    def columns(self) -> Columns:
        """The length columns over all shards."""
        parts = [shard.index for shard in self.shards]
        joined = {
            name: np.concatenate([part.columns[name] for part in parts])
            for name in MEMBER_COLUMNS
            if name not in ("offset", "ext")
        }
        codes = [np.array([*map(_modality_code, part.exts), -1], np.int8) for part in parts]
        modality = [code[part.columns["ext"]] for code, part in zip(codes, parts, strict=True)]
        starts = np.cumsum([0, *(len(part.columns["ext"]) for part in parts)])
        first = [
            part.columns["first"][:-1].astype(np.int64) + start for part, start in zip(parts, starts, strict=False)
        ]
        return Columns(np.concatenate([*first, starts[-1:]]), modality=np.concatenate(modality), **joined)

    def _touch(self, shard: int) -> None:
        """Keeps the number of open files bounded."""
        self._open[shard] = None
        self._open.move_to_end(shard)
        if len(self._open) > MAX_OPEN_SHARDS:
            oldest, _ = self._open.popitem(last=False)
            self.shards[oldest].close()


def _modality_code(ext: str) -> int:
    modality = modality_of(ext)
    return MODALITIES.index(modality) if modality else -1


def _check_shards(folder: Path, manifest: Manifest) -> tuple[list[Shard], dict[str, str], Counter[str]]:
    shards: list[Shard] = []
    quarantined, skipped = dict(manifest.quarantined), Counter[str]()
    listed_ns = (folder / MANIFEST_NAME).stat().st_mtime_ns
    for entry in manifest.shards:
        try:
            index = _check_shard(folder, entry, listed_ns)
        except DataError as e:
            quarantined[entry.name] = str(e)
            skipped["quarantined"] += entry.samples
        else:
            shards.append(Shard(folder / entry.name, index, entry.sha256))
            skipped.update(index.skipped)
    listed = {entry.name for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed and path.name not in quarantined:
            quarantined[path.name] = f"{path}: not in {MANIFEST_NAME}; to use it run: mmscale-data index {folder}"
    for name, reason in quarantined.items():
        log.warning("shard %s is put aside: %s", name, reason)
    return shards, quarantined, skipped


def _check_shard(folder: Path, entry: ShardEntry, listed_ns: int) -> ShardIndex:
    """The index of a shard that is the one in the manifest. Raises DataError when it is not."""
    path = folder / entry.name
    remedy = f"restore the shard, or index the folder again: mmscale-data index {folder}"
    try:
        stat = path.stat()
        data = index_path(path).read_bytes()
    except OSError as e:
        raise DataError(f"{e.filename}: {e.strerror}; {remedy}") from None
    if stat.st_size != entry.bytes:
        raise DataError(f"{path}: {stat.st_size} bytes, the manifest says {entry.bytes}; {remedy}")
    if idx_digest(data) != entry.idx_digest:
        raise DataError(f"{index_path(path)}: not the index that the manifest names; {remedy}")
    index = decode_index(data, index_path(path))
    if index.tar_size != entry.bytes or len(index) != entry.samples:
        raise DataError(f"{index_path(path)}: {len(index)} samples, the manifest says {entry.samples}; {remedy}")
    # Reading a whole shard to hash it is for those that were touched; `mmscale-data verify` makes the manifest newer.
    if stat.st_mtime_ns >= listed_ns and _retry(lambda: file_sha256(path), path) != entry.sha256:
        raise DataError(f"{path}: modified after indexing (its sha256 differs); {remedy}")
    return index


def _retry(action: Callable[[], T], path: Path) -> T:
    """The result of a file operation, tried again when it fails."""
    try:
        return action()
    except OSError:
        return _try_again(action, path)


def _try_again(action: Callable[[], T], path: Path) -> T:
    """The result of a file operation that has failed once; shared file systems have hiccups. DataError in the end."""
    error = None
    for delay_s in RETRY_DELAYS_S:
        time.sleep(delay_s)
        try:
            return action()
        except OSError as e:
            error = e
    tries, reason = len(RETRY_DELAYS_S) + 1, error.strerror if error else "no retry is set"
    raise DataError(f"{path}: cannot be read after {tries} tries ({reason}); restore the shard and start again")
