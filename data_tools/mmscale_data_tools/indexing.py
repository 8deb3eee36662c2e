"""Index and manifest for tars that came from elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mmscale.data_tools.writer import only_writer
from mmscale.errors import DataError, RefusedInputError
from mmscale.streaming.foreign_index import foreign_index_findings, write_wids
from mmscale.streaming.index import MAGIC, build_index, encode_index, index_path, read_index, write_atomic
from mmscale.streaming.manifest import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    file_sha256,
    idx_digest,
    is_shard_name,
    read_manifest,
    refuse_compressed,
    write_manifest,
)
from mmscale.streaming.strict_json import JsonFault, parse_json

JOURNAL_NAME = ".indexed.jsonl"


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What indexing a folder gave. `skipped`: refused samples and stray members by reason. `kept`: shards not read again.

    `findings`: where the index files of other projects (wids, Energon) beside the tars say something else than the tars do.
    """

    manifest: Manifest
    skipped: Counter[str]
    kept: int = 0
    findings: tuple[str, ...] = ()


def index_folder(
    folder: Path,
    on_shard: Callable[[int, int, str], None] | None = None,
    *,
    wids: bool = False,
    again: bool = False,
) -> IndexReport:
    """Writes an index beside every `*.tar` and seekable `*.tar.zst` of a folder, and its `manifest.json`.

    Stopped half-way, the same call goes on: a shard of the size and time that it had when it was indexed is not read again.

    Args:
        folder: the shards lie directly in it; their order is that of their names.
        on_shard: called with (shards done, shards in all, name) before each shard.
        wids: write `wids-meta.json` too.
        again: read every shard, also those that did not change.

    Raises:
        RefusedInputError: no folder, no shards, a name that cannot be a shard's, two shards with one index file, not one
            usable shard, or another command that writes into the folder.
    """
    tars = _shards(folder)
    with only_writer(folder):
        return _index_tars(folder, tars, on_shard, wids, again)


def _index_tars(
    folder: Path, tars: list[Path], on_shard: Callable[[int, int, str], None] | None, wids: bool, again: bool
) -> IndexReport:
    known = _Known(folder, again)
    entries: list[ShardEntry] = []
    quarantined = {
        path.name: reason for path in folder.glob("*.t*") if (reason := refuse_compressed(path.name, folder))
    }
    skipped: Counter[str] = Counter()
    findings: list[str] = []
    kept = 0
    for i, tar in enumerate(tars):
        if on_shard:
            on_shard(i, len(tars), tar.name)
        try:
            if not tar.is_file():
                raise DataError(f"{tar}: expected a file, found a folder or a link to nothing; restore or remove it")
            entry = known.find(tar)
            kept += entry is not None
            entry = entry or known.add(tar, *_index_shard(tar))
            index = read_index(index_path(tar))
        except DataError as e:
            quarantined[tar.name] = str(e)
            index_path(tar).unlink(missing_ok=True)
        else:
            entries.append(entry)
            skipped.update(index.skipped)
            findings += foreign_index_findings(tar, index)
    if not entries:
        first = next(iter(quarantined.values()), "there is no .tar file in it")
        raise RefusedInputError(f"{folder}: no usable shard: {first}")
    manifest = Manifest(tuple(entries), quarantined)
    write_manifest(folder, manifest)
    known.forget()
    if wids:
        write_wids(folder, manifest)
    return IndexReport(manifest, skipped, kept, tuple(findings))


def _shards(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    if not folder.is_dir():
        raise RefusedInputError(f"{folder}: expected a folder of .tar files, found none; give the dataset's folder")
    tars = sorted(path for pattern in ("*.tar", "*.tar.zst") for path in folder.glob(pattern))
    sidecars: dict[Path, Path] = {}
    for tar in tars:
        if not is_shard_name(tar.name):
            raise RefusedInputError(f"{tar}: a shard name must not have a colon or control character; rename it")
        other = sidecars.setdefault(index_path(tar), tar)
        if other != tar:
            raise RefusedInputError(f"{tar} and {other.name} would share one index file; rename one of them")
    return tars


def _index_shard(tar: Path) -> tuple[ShardEntry, int]:
    """The entry of a shard whose index is now beside it, and the shard's file time before it was read."""
    modified_ns = tar.stat().st_mtime_ns
    data = encode_index(index := build_index(tar))
    write_atomic(index_path(tar), data)
    return ShardEntry(tar.name, len(index), tar.stat().st_size, file_sha256(tar), idx_digest(data)), modified_ns


class _Known:
    """Entries of shards that are indexed: those of the manifest, and of a run that was stopped (`.indexed.jsonl`)."""

    def __init__(self, folder: Path, again: bool) -> None:
        self._journal = folder / JOURNAL_NAME
        # Entry, and the file times between which a shard is the one that was indexed.
        self._entries: dict[str, tuple[ShardEntry, int, int]] = {}
        if again:
            self.forget()
        elif (folder / MANIFEST_NAME).exists():
            with suppress(RefusedInputError):  # damaged: the shards are read again, and it is written anew
                listed_ns = (folder / MANIFEST_NAME).stat().st_mtime_ns
                self._entries = {entry.name: (entry, 0, listed_ns - 1) for entry in read_manifest(folder).shards}
        for line in self._journal.read_bytes().splitlines() if self._journal.exists() else ():
            with suppress(JsonFault, KeyError, TypeError):  # cut off when the run was killed: that shard is read again
                content = parse_json(line)
                entry = ShardEntry(**content["entry"])
                self._entries[entry.name] = (entry, int(content["modified_ns"]), int(content["modified_ns"]))

    def find(self, tar: Path) -> ShardEntry | None:
        """The entry of a shard that is as it was, with the index that was written then; None when it must be read."""
        entry, first_ns, last_ns = self._entries.get(tar.name, (None, 0, 0))
        stat, path = tar.stat(), index_path(tar)
        if entry is None or stat.st_size != entry.bytes or not first_ns <= stat.st_mtime_ns <= last_ns:
            return None
        data = path.read_bytes() if path.is_file() else b""
        return entry if data.startswith(MAGIC) and idx_digest(data) == entry.idx_digest else None

    def add(self, tar: Path, entry: ShardEntry, modified_ns: int) -> ShardEntry:
        """Writes down that a shard is indexed."""
        line = {"entry": asdict(entry), "modified_ns": modified_ns}
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return entry

    def forget(self) -> None:
        """Removes the notes of the run: the manifest has them now."""
        self._journal.unlink(missing_ok=True)
