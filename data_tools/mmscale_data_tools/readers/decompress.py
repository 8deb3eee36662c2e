"""A compressed tar as a plain one in a temporary file, with a cap on how much may come out of how little."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mmscale.errors import DataError
from mmscale.streaming.storage.zstd import MAX_RATIO, RATIO_FROM_BYTES

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
MAX_BYTES = 64 << 30
_CHUNK = 1 << 20


@contextmanager
def plain_tar(path: Path, scratch: Path) -> Iterator[Path]:
    """Gives the path of the plain tar: `path` itself, or a temporary file in `scratch` that goes at the end.

    Its name is always the same, so that a run that was killed leaves no more than one, and the next takes its place.

    Raises:
        DataError: damaged or cut-off compression, or more than `MAX_RATIO` times the compressed bytes (beyond
            `RATIO_FROM_BYTES`) or `MAX_BYTES` come out.
    """
    if path.suffix == ".tar":
        yield path
        return
    temporary = scratch / ".decompressed.tmp"
    try:
        _decompress(path, temporary)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _decompress(path: Path, target: Path) -> None:
    try:
        with path.open("rb") as raw, target.open("wb") as out:
            for chunk in _chunks(raw, path):
                out.write(chunk)
                _check_size(path, out.tell(), raw.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path}: damaged or cut-off compression ({e}); copy the file again") from None


def _chunks(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstd_chunks(raw, path)
    else:
        with gzip.GzipFile(fileobj=raw) as file:
            yield from iter(lambda: file.read(_CHUNK), b"")


def _zstd_chunks(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    import zstandard

    total = path.stat().st_size
    try:
        # A window of 128 MiB is zstd's own limit for what it decompresses unasked.
        with zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(
            raw, read_across_frames=True, closefd=False
        ) as file:
            yield from iter(lambda: file.read(_CHUNK), b"")
    except zstandard.ZstdError as e:
        raise DataError(
            f"{path}: damaged compression at byte {raw.tell()} of {total} ({e}); copy the file again"
        ) from None


def _check_size(path: Path, out_bytes: int, read_bytes: int) -> None:
    if out_bytes > MAX_BYTES or out_bytes > max(RATIO_FROM_BYTES, MAX_RATIO * read_bytes):
        raise DataError(
            f"{path}: {out_bytes} bytes came out of {read_bytes}, at most {MAX_RATIO} times as many are taken (and "
            f"{MAX_BYTES >> 30} GiB in all); a shard that really compresses so well must be unpacked by hand"
        )
