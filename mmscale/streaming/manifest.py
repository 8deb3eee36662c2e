"""`manifest.json` of a dataset folder: which shards belong to it, and the hashes that tell when one has changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmscale.errors import RefusedInputError
from mmscale.streaming.index import write_atomic
from mmscale.streaming.storage.urls import expand_braces
from mmscale.streaming.strict_json import JsonFault, parse_json

VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20

_MAX_NAMES = 100_000


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
    """Whether `name` can be a shard's: a plain `.tar` or `.tar.zst` file name, no path, URL or command (`:` separates shard
    and key)."""
    return re.fullmatch(r"[^/\\:\x00-\x1f]+\.tar(\.zst)?", name) is not None


def refuse_compressed(name: str, folder: Path) -> str:
    """Why a shard under this name is put aside when its compression allows no random access; empty when it is none such."""
    match = re.search(r"\.(tgz|tar\.(gz|bz2|xz|lz4|Z))$", name)
    if match is None:
        return ""
    text = f"{folder / name}: expected `.tar` or seekable `.tar.zst`, found a compression without random access"
    if match[1] in ("tgz", "tar.gz"):
        return f"{text}; write it again: mmscale-data reshard {folder} --out NEW_FOLDER"
    return f"{text}; unpack it to a `.tar` and index the folder again"


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
    """The manifest of a local dataset folder, every field checked.

    Raises:
        RefusedInputError: missing, or refused as in `parse_manifest`.
    """
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RefusedInputError(
            f"{path}: no dataset manifest ({e.strerror}); run: mmscale-data index {folder}"
        ) from None
    return parse_manifest(data, str(path), str(folder))


def parse_manifest(data: bytes, where: str, folder: str) -> Manifest:
    """The manifest in `data`, every field checked. `where` and `folder`: the file and its folder, for the message.

    Raises:
        RefusedInputError: not strict JSON, a wrong field, a shard listed twice, or a name that is not a plain file name (a
            path, a URL or a command is never followed).
    """
    try:
        return _parse(parse_json(data, MAX_MANIFEST_BYTES))
    except (JsonFault, ValueError) as e:
        raise RefusedInputError(f"{where}: not a usable manifest: {e}; run: mmscale-data index {folder}") from None


def select_shards(manifest: Manifest, pattern: str, folder: str) -> Manifest:
    """The part of a manifest whose shard names match a pattern such as `{000..009}.tar` or `0*.tar`, in manifest order.

    Raises:
        RefusedInputError: the pattern, or one of the names that its braces stand for, matches no shard.
    """
    try:
        names = expand_braces(pattern, _MAX_NAMES)
    except ValueError as e:
        raise RefusedInputError(f"{folder}/{pattern}: {e}; expected `{{000..009}}.tar` or `*.tar`") from None
    listed = [*(shard.name for shard in manifest.shards), *manifest.quarantined]
    globs = [name for name in names if re.search(r"[*?\[]", name)]
    plain = set(names) - set(globs)
    lost = list(plain - set(listed))
    lost += [glob for glob in globs if not any(fnmatchcase(name, glob) for name in listed)]
    if lost:
        raise RefusedInputError(
            f"{folder}: no shard is called {sorted(lost)[0]!r} (nor {len(lost) - 1} more of {pattern!r}); it has "
            f"{', '.join(listed[:3])} ... {len(listed)} in all: correct the pattern"
        )
    used = {name for name in listed if name in plain or any(fnmatchcase(name, glob) for glob in globs)}
    return Manifest(
        tuple(shard for shard in manifest.shards if shard.name in used),
        {name: reason for name, reason in manifest.quarantined.items() if name in used},
    )


def _parse(content: Any) -> Manifest:
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"expected an object with version {VERSION}")
    shards, quarantined = content.get("shards"), content.get("quarantined", {})
    if not isinstance(shards, list) or not isinstance(quarantined, dict):
        raise ValueError("expected a list `shards` and an object `quarantined`")
    manifest = Manifest(tuple(_parse_entry(shard) for shard in shards), quarantined)
    names = [shard.name for shard in manifest.shards]
    stems = Counter(name.removesuffix(".zst") for name in names)
    twice = [name for name in names if stems[name.removesuffix(".zst")] > 1]
    if twice:
        raise ValueError(
            f"{' and '.join(sorted(set(twice))[:2])!r} is listed twice (they share one index); list it once"
        )
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
        raise ValueError(
            f"the shard name {entry.name!r} is not the plain name of a .tar or .tar.zst file in this folder"
        )
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256) or not re.fullmatch("[0-9a-f]{32}", entry.idx_digest):
        raise ValueError(f"the digests of {entry.name!r} are not 64 and 32 hex digits")
    return entry
