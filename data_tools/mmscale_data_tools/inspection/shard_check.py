"""Everything that can be wrong with one shard, and the digests by which duplicates are found over all shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmscale.errors import BadSampleError, DataError
from mmscale.logging import get_logger
from mmscale.streaming.index import ShardIndex, build_index, encode_index, index_path
from mmscale.streaming.manifest import ShardEntry, file_sha256
from mmscale.streaming.media import Lengths
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import Shard
from mmscale.types import AudioSpec, ImageSpec, MediaBytes, MediaSpecs, Sample, VideoSpec

log = get_logger(__name__)

Digests = NDArray[np.uint64]
Advance = Callable[[int], None]
"""Takes how many bytes of the shard were dealt with since the last call."""

_HEADER_COLUMN = {"image": "width", "audio": "rate_hz", "video": "frames"}
"""The column that is 0 when the header of a medium could not be read."""

_MAX_PIXELS = 64_000_000
_THUMB = ImageSpec(size=16, tokens=1, side=1)
_MAX_FRAMES = 1_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: in which shard, a fixed word, and what was found."""

    shard: str
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardCheck:
    """What one shard holds: `samples` usable of `indexed`, what is wrong, and digests.

    `layouts`: kinds of files in a sample (`json png`) -> samples. Digests, uint64, 0 = not usable: of the `keys`, of
    the `texts` (all turns) and of the whole `contents` (media and text), all [samples of the index]; of the `media` files,
    [media], with the number of its sample in `owners`.
    """

    indexed: int
    samples: int = 0
    findings: tuple[Finding, ...] = ()
    layouts: Mapping[str, int] = field(default_factory=dict)
    keys: Digests = field(default_factory=lambda: np.zeros(0, np.uint64))
    texts: Digests = field(default_factory=lambda: np.zeros(0, np.uint64))
    contents: Digests = field(default_factory=lambda: np.zeros(0, np.uint64))
    media: Digests = field(default_factory=lambda: np.zeros(0, np.uint64))
    owners: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def check_shard(folder: Path, entry: ShardEntry, decode: bool, advance: Advance) -> ShardCheck:
    """Reads a whole shard: its hash, its index built anew and compared, every row parsed, every header, digests.

    Args:
        folder, entry: the dataset folder and what its manifest says about the shard.
        decode: every medium is decoded from its first to its last byte, not only its header read.
        advance: told of the progress, `entry.bytes` in all.
    """
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        advance(num_bytes)

    try:
        shard = _intact_shard(folder, entry)
        try:
            return _check_samples(shard, entry.name, decode, count)
        finally:
            shard.close()
    except DataError as error:
        return ShardCheck(entry.samples, findings=(Finding(entry.name, "damaged", str(error)),))
    finally:
        advance(entry.bytes - done)  # what is no sample's: headers, padding, or all of a damaged shard


def _intact_shard(folder: Path, entry: ShardEntry) -> Shard:
    """The shard, when tar and index are the manifest's and agree with each other. Raises DataError."""
    path = folder / entry.name
    try:
        found = file_sha256(path)
        if found != entry.sha256:
            raise DataError(
                f"{path}: sha256 {found[:16]}..., the manifest says {entry.sha256[:16]}...; restore the shard"
            )
        index = build_index(path)
        if index_path(path).read_bytes() != encode_index(index):
            raise DataError(f"{index_path(path)}: not the index of its shard; run: mmscale-data index {folder}")
    except OSError as e:
        raise DataError(f"{e.filename}: {e.strerror}; restore the file") from None
    return Shard.at(path, index, entry.sha256)


def _check_samples(shard: Shard, name: str, decode: bool, advance: Advance) -> ShardCheck:
    index, num = shard.index, len(shard)
    findings = [Finding(name, reason, f"{n} refused when indexing") for reason, n in index.skipped.items()]
    keys, texts, contents = (np.zeros(num, np.uint64) for _ in range(3))
    media: list[int] = []
    owners: list[int] = []
    num_bad = 0
    for i in range(num):
        keys[i] = xxhash.xxh3_64_intdigest(shard.key(i).encode())
        try:
            sample = _usable_sample(shard, i, decode)
        except BadSampleError as error:
            findings.append(Finding(name, error.reason, f"{shard.key(i)}: {error.detail}"))
            num_bad += 1
        else:
            own = [xxhash.xxh3_64_intdigest(item.data) for item in sample.media]
            texts[i] = xxhash.xxh3_64_intdigest("\0".join(f"{t.role}\0{t.text}" for t in sample.turns).encode())
            contents[i] = xxhash.xxh3_64_intdigest(np.array([*own, texts[i]], np.uint64).tobytes())
            media += own
            owners += [i] * len(own)
        advance(sum(shard.sizes(i).values()))
    return ShardCheck(
        indexed=num + sum(index.skipped.values()),
        samples=num - num_bad,
        findings=tuple(findings),
        layouts=_layouts(index),
        keys=keys,
        texts=texts,
        contents=contents,
        media=np.array(media, np.uint64),
        owners=np.array(owners, np.int64),
    )


def _usable_sample(shard: Shard, i: int, decode: bool) -> Sample:
    """Sample `i`, when the loader could take it. Raises BadSampleError."""
    index = shard.index
    sample = parse_sample(shard.key(i), shard.members(i))
    for m, item in zip(range(index.first[i], index.first[i + 1]), sample.media, strict=False):
        header = Lengths(**{name: int(index.columns[name][m]) for name in Lengths._fields})
        if not getattr(header, _HEADER_COLUMN[item.modality]):
            raise BadSampleError("media_header", f"the header of .{item.ext} cannot be read")
        if decode:
            _decode(item, header, f"{shard.path}:{shard.key(i)}")
    return sample


def _layouts(index: ShardIndex) -> dict[str, int]:
    """Which kinds of files stand together in a sample, and in how many."""
    last = [ext.rpartition(".")[2] for ext in index.exts]
    codes = index.columns["ext"].tolist()
    first = index.columns["first"].tolist()
    return dict(Counter(" ".join(sorted({last[code] for code in codes[lo:hi]})) for lo, hi in pairwise(first)))


def _decode(item: MediaBytes, header: Lengths, where: str) -> None:
    """Decodes a medium as training does and throws the result away. Raises BadSampleError when it cannot be used."""
    try:
        planned, found = _decoded_length(item, header)
    except BadSampleError:
        raise
    except (
        Exception
    ) as error:  # the same border as the loader's worker: whatever a decoder raises is one sample's fault
        log.exception("%s: unexpected failure", where)
        raise BadSampleError("unexpected", f"{type(error).__name__}: {error}") from error
    if planned != found:
        raise BadSampleError("length", f".{item.ext}: the header says {planned}, {found} decoded")


def _decoded_length(item: MediaBytes, header: Lengths) -> tuple[int, int]:
    """Length by the header and as decoded: samples of sound, frames of a clip, 1 for a picture."""
    # imported here: torch takes seconds, and only --decode needs it
    from mmscale.streaming.decode.video import planned_frames
    from mmscale.streaming.encode import decode_media

    clip, sound = VideoSpec(frames=_MAX_FRAMES), max(1, header.audio_samples)
    audio = AudioSpec(rate_hz=header.rate_hz, window_samples=sound, tokens=sound, features="waveform")
    planned = {
        "image": lambda: 1,
        "audio": lambda: header.audio_samples,
        "video": lambda: planned_frames(header, clip),
    }
    found = decode_media(item, MediaSpecs(image=_THUMB, audio=audio, video=clip), _MAX_PIXELS)
    return planned[item.modality](), found.num_tokens
