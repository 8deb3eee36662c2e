"""`manifest.json` of a dataset folder: which shards belong to it, and the hashes that tell when one has changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mmscale.errors import RefusedInputError
from mmscale.streaming.index import write_atomic
from mmscale.streaming.strict_json import JsonFault, parse_json

VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: file name, usable samples, size in bytes, sha256 of the tar, digest of its index file (both hex)."""

    name: str
    samples: int
    bytes: int
    sha256: str
    idx_digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The shards of a dataset in order. `quarantined`: shards refused when indexing, with the reason."""

    shards: tuple[ShardEntry, ...]
    quarantined: Mapping[str, str] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Usable samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Digest of the shard list in order: equal data, equal fingerprint, wherever the folder lies."""
        rows = [[shard.name, shard.samples, shard.bytes, shard.sha256, shard.idx_digest] for shard in self.shards]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def is_shard_name(name: str) -> bool:
    """Whether `name` can be a shard's: a plain `.tar` file name, no path, URL or command (`:` separates shard and key)."""
    return re.fullmatch(r"[^/\\:\x00-\x1f]+\.tar", name) is not None


def idx_digest(data: bytes) -> str:
    """Digest of the bytes of an index file, as the manifest holds it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`: whole, or not at all. Equal manifests give equal bytes."""
    content = {
        "version": VERSION,
        "samples": manifest.samples,
        "fingerprint": manifest.fingerprint,
        "shards": [asdict(shard) for shard in manifest.shards],
        "quarantined": dict(sorted(manifest.quarantined.items())),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomic(folder / MANIFEST_NAME, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a dataset folder, every field checked.

    Raises:
        RefusedInputError: missing, not strict JSON, a wrong field, a shard listed twice, or a name that is not a plain
            file name (a path, a URL or a command is never followed).
    """
    path = folder / MANIFEST_NAME
    try:
        content = parse_json(path.read_bytes())
        return _parse(content)
    except OSError as e:
        found = f"{path}: no dataset manifest ({e.strerror})"
    except (JsonFault, ValueError) as e:
        found = f"{path}: not a usable manifest: {e}"
    raise RefusedInputError(f"{found}; run: mmscale-data index {folder}")


def _parse(content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"expected an object with version {VERSION}")
    shards, quarantined = content.get("shards"), content.get("quarantined", {})
    if not isinstance(shards, list) or not isinstance(quarantined, dict):
        raise ValueError("expected a list `shards` and an object `quarantined`")
    manifest = Manifest(tuple(_parse_entry(shard) for shard in shards), quarantined)
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the shard {twice!r} is listed twice; list it once")
    for name, found, expected in (
        ("samples", content.get("samples"), manifest.samples),
        ("fingerprint", content.get("fingerprint"), manifest.fingerprint),
    ):
        if found != expected:
            raise ValueError(f"`{name}` is {found!r}, the shard list gives {expected!r}")
    return manifest


def _parse_entry(content: Any) -> ShardEntry:
    expected = {f.name: int if f.type == "int" else str for f in fields(ShardEntry)}
    if not isinstance(content, dict) or {name: type(value) for name, value in content.items()} != expected:
        raise ValueError(f"a shard is {str(content)[:200]}, expected exactly {', '.join(expected)}")
    entry = ShardEntry(**content)
    if not is_shard_name(entry.name) or entry.samples < 0 or entry.bytes < 0:
        raise ValueError(f"the shard name {entry.name!r} is not the plain name of a .tar file in this folder")
    return entry
