"""What `verify` found in each shard, kept in the dataset folder so that a stopped check goes on where it was.

`.verified/<shard>.npz` holds for the tar of one size and file time, one sha256 and one index digest of the manifest; any
change of these and the shard is read again.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.data_tools.inspection.shard_check import Finding, ShardCheck
from mmscale.logging import get_logger
from mmscale.streaming.index import index_path, write_atomic
from mmscale.streaming.manifest import ShardEntry, idx_digest

log = get_logger(__name__)

JOURNAL_NAME = ".verified"
Identity = dict[str, Any]

_VERSION = 1
_ARRAYS = [f.name for f in fields(ShardCheck) if str(f.type).startswith(("Digests", "NDArray"))]


class Journal:
    """The stored checks of one folder. A folder that cannot be written is said once and is no failure of the check."""

    def __init__(self, folder: Path, decode: bool) -> None:
        """`decode`: whether this check decodes the media; one that did not is then not enough."""
        self._folder, self._decode = folder, decode
        self._writable = True

    def load(self, entry: ShardEntry) -> ShardCheck | None:
        """The stored check of a shard that has not changed since, or None."""
        now = self.identity(entry)
        if now is None:
            return None
        path = self._path(entry)
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(file["facts"].tobytes())
                arrays = {name: file[name] for name in _ARRAYS}
            stored, decoded = facts.pop("identity"), facts.pop("decode")
            if stored != now or (self._decode and not decoded):
                return None
            facts["findings"] = tuple(Finding(**finding) for finding in facts["findings"])
            return ShardCheck(**facts, **arrays)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            log.warning("%s is damaged (%s); the shard is read again", path, error)
            return None

    def store(self, entry: ShardEntry, check: ShardCheck, before: Identity | None) -> None:
        """Stores what was found in a shard that had the identity `before` when its reading began."""
        if before is None or not self._writable:
            return
        facts = {
            "identity": before,
            "decode": self._decode,
            "indexed": check.indexed,
            "samples": check.samples,
            "findings": [asdict(finding) for finding in check.findings],
            "layouts": dict(check.layouts),
        }
        buffer, text = io.BytesIO(), json.dumps(facts).encode()
        np.savez(buffer, facts=np.frombuffer(text, np.uint8), **{name: getattr(check, name) for name in _ARRAYS})
        path = self._path(entry)
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, buffer.getvalue())
        except OSError as error:
            log.warning("%s cannot be written (%s); the next check begins anew", path, error.strerror)
            self._writable = False

    def identity(self, entry: ShardEntry) -> Identity | None:
        """What a stored check of the shard holds for; None when tar or index are not the manifest's at the first look."""
        path = self._folder / entry.name
        try:
            stat, index = path.stat(), index_path(path).read_bytes()
        except OSError:
            return None
        if stat.st_size != entry.bytes or idx_digest(index) != entry.idx_digest:
            return None
        return {"version": _VERSION, "mtime_ns": stat.st_mtime_ns, **asdict(entry)}

    def _path(self, entry: ShardEntry) -> Path:
        return self._folder / JOURNAL_NAME / f"{entry.name}.npz"
