"""Index and manifest for tars that came from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmscale.errors import DataError, RefusedInputError
from mmscale.streaming.index import build_index, encode_index, index_path, write_atomic
from mmscale.streaming.manifest import Manifest, ShardEntry, file_sha256, idx_digest, is_shard_name, write_manifest


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What indexing a folder gave. `skipped`: refused samples and stray members by reason."""

    manifest: Manifest
    skipped: Counter[str]


def index_folder(folder: Path, on_shard: Callable[[int, int, str], None] | None = None) -> IndexReport:
    """Writes an index beside every `*.tar` of a folder and its `manifest.json`.

    Args:
        folder: the tars lie directly in it; their order is that of their names.
        on_shard: called with (shards done, shards in all, name) before each shard.

    Raises:
        RefusedInputError: no folder, no tars, a name that cannot be a shard's, or not one usable shard.
    """
    if not folder.is_dir():
        raise RefusedInputError(f"{folder}: expected a folder of .tar files, found none; give the dataset's folder")
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        if not is_shard_name(tar.name):
            raise RefusedInputError(f"{tar}: a shard name must not have a colon or control character; rename it")
    entries: list[ShardEntry] = []
    quarantined: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for i, tar in enumerate(tars):
        if on_shard:
            on_shard(i, len(tars), tar.name)
        try:
            entry, reasons = _index_shard(tar)
        except DataError as e:
            quarantined[tar.name] = str(e)
            index_path(tar).unlink(missing_ok=True)
        else:
            entries.append(entry)
            skipped.update(reasons)
    if not entries:
        first = next(iter(quarantined.values()), "there is no .tar file in it")
        raise RefusedInputError(f"{folder}: no usable shard: {first}")
    manifest = Manifest(tuple(entries), quarantined)
    write_manifest(folder, manifest)
    return IndexReport(manifest, skipped)


def _index_shard(tar: Path) -> tuple[ShardEntry, Counter[str]]:
    index = build_index(tar)
    data = encode_index(index)
    write_atomic(index_path(tar), data)
    entry = ShardEntry(tar.name, len(index), index.tar_size, file_sha256(tar), idx_digest(data))
    return entry, Counter(index.skipped)
