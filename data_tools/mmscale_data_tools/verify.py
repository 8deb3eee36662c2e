"""Checks every byte of a dataset folder against its manifest, and every sample against what the loader would take."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmscale.errors import BadSampleError, DataError
from mmscale.streaming.index import build_index, encode_index, index_path
from mmscale.streaming.manifest import MANIFEST_NAME, ShardEntry, file_sha256, read_manifest
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample
from mmscale.streaming.shards import Shard


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: in which shard, a fixed word, and what was found."""

    shard: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`samples` usable of `indexed` in `shards` shards; no findings = all is well."""

    shards: int
    indexed: int
    samples: int
    findings: tuple[Finding, ...]


def verify_folder(folder: Path, on_shard: Callable[[int, int, str], None] | None = None) -> VerifyReport:
    """Reads everything: sha256 of the tars, the index rebuilt and compared, each row parsed, each medium's header read.

    When all shards are the manifest's, the manifest is stamped with the time at which the check began, so that shards
    with newer file times (a copy, for instance) need not be hashed again when they are opened.

    Args:
        folder: dataset folder.
        on_shard: called with (shards done, shards in all, name) before each shard.

    Raises:
        RefusedInputError: the manifest is missing or unusable.
    """
    manifest = read_manifest(folder)
    began_ns = time.time_ns()
    findings = [Finding(name, "quarantined", reason) for name, reason in manifest.quarantined.items()]
    findings += [
        Finding(path.name, "not_in_manifest", f"run: mmscale-data index {folder}")
        for path in sorted(folder.glob("*.tar"))
        if path.name not in {entry.name for entry in manifest.shards} | set(manifest.quarantined)
    ]
    indexed = samples = 0
    intact = True
    for i, entry in enumerate(manifest.shards):
        if on_shard:
            on_shard(i, len(manifest.shards), entry.name)
        try:
            shard = _checked_shard(folder, entry)
        except DataError as e:
            findings.append(Finding(entry.name, "damaged", str(e)))
            indexed += entry.samples
            intact = False
            continue
        bad = _bad_samples(shard)
        findings += [
            Finding(entry.name, reason, f"{n} refused when indexing") for reason, n in shard.index.skipped.items()
        ]
        findings += [Finding(entry.name, e.reason, f"{key}: {e.detail}") for key, e in bad]
        indexed += len(shard) + sum(shard.index.skipped.values())
        samples += len(shard) - len(bad)
        shard.close()
    if intact:
        os.utime(folder / MANIFEST_NAME, ns=(began_ns, began_ns))
    return VerifyReport(len(manifest.shards), indexed, samples, tuple(findings))


def summarize(report: VerifyReport) -> list[tuple[str, str, int, str]]:
    """(shard, reason, how many, first example), a row per shard and reason."""
    count = Counter((finding.shard, finding.reason) for finding in report.findings)
    example: dict[tuple[str, str], str] = {}
    for finding in report.findings:
        example.setdefault((finding.shard, finding.reason), finding.detail)
    return [(shard, reason, count[shard, reason], text) for (shard, reason), text in example.items()]


def _checked_shard(folder: Path, entry: ShardEntry) -> Shard:
    """The shard, when tar and index are the manifest's and agree with each other."""
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
    return Shard(path, index, entry.sha256)


def _bad_samples(shard: Shard) -> list[tuple[str, BadSampleError]]:
    bad = []
    index = shard.index
    for i in range(len(shard)):
        try:
            parse_sample(shard.key(i), shard.members(i))
            for m in range(index.first[i], index.first[i + 1]):
                ext = index.exts[index.ext[m]]
                known = {"image": "width", "audio": "rate_hz"}.get(modality_of(ext) or "")
                if known and not index.columns[known][m]:
                    raise BadSampleError("media_header", f"the header of .{ext} cannot be read")
        except BadSampleError as e:
            bad.append((shard.key(i), e))
    return bad
