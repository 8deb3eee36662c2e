"""Random access to the samples of a dataset folder, checked when it is opened and named when it fails.

A shard that is missing, not a tar, or not the indexed one is put aside by name (`ShardSet.quarantined`); its samples
count as skipped. A shard that changes or ends while it is read is a DataError with shard and offset. Opening keeps counts
only: indexes and files are opened when a sample is read, and a bounded number of them stays open.
"""

from __future__ import annotations

import resource
import weakref
from bisect import bisect_right
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from mmscale.config.schema import CacheConfig
from mmscale.errors import BadSampleError, DataError, RefusedInputError
from mmscale.logging import get_logger
from mmscale.redact import bare_url
from mmscale.streaming.folder import DatasetFolder, LocalFolder, open_folder, split_pattern
from mmscale.streaming.index import MEMBER_COLUMNS, ShardIndex
from mmscale.streaming.manifest import MANIFEST_NAME, Manifest, ShardEntry, file_sha256, select_shards
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.storage.local import LocalFile
from mmscale.streaming.storage.source import ByteSource, Range, in_threads, retry
from mmscale.streaming.storage.zstd import ZstdFile
from mmscale.types import MODALITIES, Sample

log = get_logger(__name__)

MAX_OPEN_SHARDS = 512

Keep = Callable[[str], bool]
"""Says of an extension whether the member is wanted."""


class OpenShards:
    """Bounds how many shards are open: the one opened longest ago is closed first."""

    def __init__(self) -> None:
        # Weak, or a set that nobody uses any more would stay open until the next garbage collection.
        self._shards: OrderedDict[str, weakref.ref[Shard]] = OrderedDict()

    def __reduce__(self) -> tuple[type[OpenShards], tuple[()]]:
        return OpenShards, ()

    def add(self, shard: Shard) -> None:
        """Takes note of a shard that has just been opened."""
        self._shards[shard.name] = weakref.ref(shard)
        while len(self._shards) > MAX_OPEN_SHARDS:
            oldest = self._shards.popitem(last=False)[1]()
            if oldest is not None:
                oldest.close()


class Shard:
    """Samples of one indexed tar by number. Opens index and file at the first read, in every process for itself."""

    def __init__(
        self,
        folder: DatasetFolder,
        entry: ShardEntry,
        opened: OpenShards | None = None,
        index: ShardIndex | None = None,
    ) -> None:
        """A shard that is opened later.

        Args:
            entry: as in the manifest of `folder`.
            opened: shared by the shards of a set.
            index: kept in memory and used instead of the one beside the shard.
        """
        self.name = entry.name
        self.sha256 = entry.sha256
        self._folder = folder
        self._entry = entry
        self._opened = opened
        self._file = folder.source(entry)
        self._given = index
        self._index: ShardIndex | None = None
        self._content: ByteSource | None = None

    @classmethod
    def at(cls, path: Path, index: ShardIndex, sha256: str = "") -> Shard:
        """A local shard with its index, which need not be in a manifest or on disk."""
        entry = ShardEntry(path.name, len(index), index.file_size, sha256, "")
        return cls(LocalFolder(path.parent), entry, index=index)

    def __len__(self) -> int:
        return self._entry.samples

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_index": None, "_content": None}

    @property
    def where(self) -> str:
        """Path or URL, for messages."""
        return f"{self._folder.where}/{self.name}"

    @property
    def path(self) -> Path:
        """The file of a local shard. Raises DataError when it is a remote one."""
        if not isinstance(self._folder, LocalFolder):
            raise DataError(
                f"{self.where}: expected a local shard, found a remote one; copy the folder to this machine"
            )
        return self._folder.path / self.name

    @property
    def index(self) -> ShardIndex:
        """The shard's index. Raises DataError when it is not the one that was checked."""
        return self._index if self._index is not None else self._open()[0]

    def sidecars(self, suffix: str) -> tuple[Path, ...]:
        """Where a file about this shard may be kept, `000000` + suffix, the best place first; none when there is no place.

        Read from all of them, write to the first that takes it: its folder may be missing, or read-only.
        """
        return self._folder.sidecars(self.name, suffix)

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        return self.index.key(i)

    def offset(self, i: int) -> int:
        """Position in the tar of the payload of sample `i`'s first member, in bytes."""
        index = self.index
        return min(index.offset[index.first[i] : index.first[i + 1]])

    def members(self, i: int, keep: Keep | None = None) -> list[tuple[str, bytes]]:
        """(extension, bytes) of sample `i`'s members, media first in natural order, optionally only some extensions.

        Raises:
            DataError: the file is gone, has another size than when it was indexed, or ends early.
        """
        index, content = self._open()
        if not isinstance(content, LocalFile):
            return self.read_many((i,), keep)[0]
        # Half the time of the general way, for the members of one sample have no neighbours worth looking for.
        exts, ext, offset, size, out = index.exts, index.ext, index.offset, index.size, []
        try:
            for m in range(index.first[i], index.first[i + 1]):
                name = exts[ext[m]]
                if keep is None or keep(name):
                    out.append((name, content.read(offset[m], size[m])))
        except DataError as e:
            raise DataError(f"{e} (reading {self._named((i,))})") from e
        return out

    def read_many(self, samples: Sequence[int], keep: Keep | None = None) -> list[list[tuple[str, bytes]]]:
        """Like `members` for several samples; members that lie side by side are read together."""
        index, content = self._open()
        first, ext, offset, size = index.first, index.ext, index.offset, index.size
        exts: list[list[str]] = []
        ranges: list[Range] = []
        for i in samples:
            names = []
            for m in range(first[i], first[i + 1]):
                name = index.exts[ext[m]]
                if keep is None or keep(name):
                    names.append(name)
                    ranges.append((offset[m], size[m]))
            exts.append(names)
        try:
            data = iter(content.read_many(ranges))
        except DataError as e:
            raise DataError(f"{e} (reading {self._named(samples)})") from e
        return [[(name, next(data)) for name in names] for names in exts]

    def sizes(self, i: int) -> dict[str, int]:
        """Extension -> bytes of sample `i`'s members, from the index alone."""
        index = self.index
        return {index.exts[index.ext[m]]: index.size[m] for m in range(index.first[i], index.first[i + 1])}

    def check(self, listed_ns: int | None) -> Counter[str]:
        """What was refused when the shard was indexed, by reason, once file and index are those of the manifest.

        Args:
            listed_ns: when the manifest was written; a file that is not older is hashed.

        Raises:
            DataError: missing, or another one.
        """
        entry, remedy = self._entry, self._folder.remedy
        found = self._file.size()
        if found != entry.bytes:
            raise DataError(f"{self.where}: {found} bytes, the manifest says {entry.bytes}; {remedy}")
        index = self._folder.check_index(entry)
        if index.file_size != entry.bytes or len(index) != entry.samples:
            raise DataError(
                f"{self.where}: an index of {len(index)} samples, the manifest says {entry.samples}; {remedy}"
            )
        modified_ns = self._folder.modified_ns(entry.name)
        # Reading a whole shard to hash it is for those that were touched; `mmscale-data verify` makes the manifest newer.
        if listed_ns is not None and modified_ns is not None and modified_ns >= listed_ns:
            path = self.path
            if retry(lambda: file_sha256(path), self.where) != entry.sha256:
                raise DataError(f"{self.where}: modified after indexing (its sha256 differs); {remedy}")
        return Counter(index.skipped)

    def close(self) -> None:
        """Closes file and index; the next read opens them again."""
        self._index = self._content = None
        self._file.close()

    def _open(self) -> tuple[ShardIndex, ByteSource]:
        index, content = self._index, self._content
        if index is None or content is None:
            index = self._index = self._given if self._given is not None else self._folder.open_index(self._entry)
            content = self._content = ZstdFile(self._file, index.frames, self.where) if index.frames else self._file
            if self._opened is not None:
                self._opened.add(self)
        return index, content

    def _named(self, samples: Sequence[int]) -> str:
        more = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
        return f"sample {self.key(samples[0])!r} at offset {self.offset(samples[0])}{more}"


@dataclass(frozen=True)
class Columns:
    """Length columns of all samples, to plan without reading. Row r has the members `first[r]:first[r + 1]`.

    `first`: int64 [rows + 1]. Per member, media of a sample first and in the order of `Sample.media`: `size` in bytes,
    `modality` int8 (index into MODALITIES, -1 = not a medium), `width`, `height` (pixels as displayed), `frames`,
    `fps_milli`, `rate_hz`, `keyframes`, `audio_samples`, `text_bytes`; 0 = does not apply or unreadable header.
    """

    first: np.ndarray
    size: np.ndarray
    modality: np.ndarray
    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    fps_milli: np.ndarray
    rate_hz: np.ndarray
    keyframes: np.ndarray
    audio_samples: np.ndarray
    text_bytes: np.ndarray


@dataclass(eq=False)
class ShardSet:
    """All usable samples of a dataset folder, or of some of its shards, numbered over the shards in manifest order.

    `quarantined`: shard name -> why it was put aside. `skipped`: what was refused when indexing or opening, by reason
    (`quarantined` = samples of shards put aside). `indexed == len(self) + sum(skipped.values())`.
    """

    folder: DatasetFolder
    name: str
    fingerprint: str
    shards: tuple[Shard, ...]
    quarantined: Mapping[str, str]
    skipped: Counter[str]
    _starts: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = [0, *accumulate(len(shard) for shard in self.shards)]

    @classmethod
    def open(cls, folder: Path | str, name: str, cache: CacheConfig | None = None) -> ShardSet:
        """The dataset in `folder`, every shard checked against manifest and index.

        Args:
            folder: path or URL of a folder with `manifest.json`; `folder/{000..009}.tar` or `folder/0*.tar` takes some shards.
            name: what sample ids start with, usually the path relative to the data root; a pattern at its end is left out.
            cache: for remote folders, and for lengths that cannot be kept in the folder.

        Raises:
            RefusedInputError: a command or an unknown scheme (nothing is run), no usable manifest, a pattern that matches
                nothing, no usable shard, or no samples.
        """
        place, pattern = split_pattern(folder)
        opened = open_folder(place, cache)
        manifest = opened.manifest()
        if pattern:
            manifest = select_shards(manifest, pattern, opened.where)
            name = name.removesuffix(pattern).rstrip("/")
        shards, quarantined, skipped = _check_shards(opened, manifest, is_whole=not pattern)
        if not sum(len(shard) for shard in shards):
            reasons = "; ".join(f"{shard}: {reason}" for shard, reason in list(quarantined.items())[:3])
            raise RefusedInputError(
                f"{opened.where}: no usable sample in {len(manifest.shards)} shard(s). {reasons}".rstrip()
            )
        fingerprint = manifest.fingerprint
        if quarantined:
            used = tuple(entry for entry in manifest.shards if entry.name not in quarantined)
            fingerprint = Manifest(used).fingerprint
        return cls(opened, bare_url(name), fingerprint, tuple(shards), quarantined, skipped)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "columns"}

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
        number, i = self.locate(row)
        return self._id(self.shards[number], i)

    def offset(self, row: int) -> int:
        """Position of a row's first member in its tar, in bytes."""
        number, i = self.locate(row)
        return self.shards[number].offset(i)

    def members(self, row: int, keep: Keep | None = None) -> list[tuple[str, bytes]]:
        """(extension, bytes) of a row's members, optionally only those whose extension `keep` accepts."""
        number, i = self.locate(row)
        return self.shards[number].members(i, keep)

    def read(self, row: int) -> Sample:
        """The sample of a row. Raises BadSampleError when it cannot be used, DataError when the shard has changed."""
        number, i = self.locate(row)
        shard = self.shards[number]
        return parse_sample(self._id(shard, i), shard.members(i), shard.offset(i))

    def read_many(self, rows: Sequence[int]) -> list[Sample | BadSampleError]:
        """The samples of some rows in the order asked for, or why one cannot be used; neighbours are read together.

        Raises:
            DataError: a shard has changed or cannot be read.
        """
        places = [self.locate(row) for row in rows]
        by_shard: defaultdict[int, list[int]] = defaultdict(list)
        for number, i in places:
            by_shard[number].append(i)

        def read(number: int) -> list[list[tuple[str, bytes]]]:
            return self.shards[number].read_many(by_shard[number])

        members = dict(zip(by_shard, map(iter, in_threads(read, list(by_shard), self.folder.threads)), strict=True))
        return [self._parse(self.shards[number], i, next(members[number])) for number, i in places]

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

    def _id(self, shard: Shard, i: int) -> str:
        return f"{self.name}/{shard.name}:{shard.key(i)}"

    def _parse(self, shard: Shard, i: int, members: list[tuple[str, bytes]]) -> Sample | BadSampleError:
        try:
            return parse_sample(self._id(shard, i), members, shard.offset(i))
        except BadSampleError as error:
            return error


def _modality_code(ext: str) -> int:
    modality = modality_of(ext)
    return MODALITIES.index(modality) if modality else -1


def _check_shards(
    folder: DatasetFolder, manifest: Manifest, is_whole: bool
) -> tuple[list[Shard], dict[str, str], Counter[str]]:
    """The shards that are as the manifest says, why the others are put aside, and what is skipped by reason."""
    _allow_open_files(2 * len(manifest.shards))
    opened, listed_ns = OpenShards(), folder.modified_ns(MANIFEST_NAME)
    usable: list[Shard] = []
    quarantined, skipped = dict(manifest.quarantined), Counter[str]()

    def check(entry: ShardEntry) -> tuple[Shard, Counter[str]] | DataError:
        shard = Shard(folder, entry, opened)
        try:
            return shard, shard.check(listed_ns)
        except DataError as e:
            return e

    for entry, found in zip(manifest.shards, in_threads(check, manifest.shards, folder.threads), strict=True):
        if isinstance(found, DataError):
            quarantined[entry.name] = str(found)
            skipped["quarantined"] += entry.samples
        else:
            usable.append(found[0])
            skipped.update(found[1])
    if is_whole:
        quarantined.update(folder.strays([*(entry.name for entry in manifest.shards), *quarantined]))
    for name, reason in quarantined.items():
        log.warning("shard %s is put aside: %s", name, reason)
    return usable, quarantined, skipped


def _allow_open_files(num: int) -> None:
    """Raises this process's limit of open files, which often starts at 1024, as far as it must and may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(2 * MAX_OPEN_SHARDS, num) + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
