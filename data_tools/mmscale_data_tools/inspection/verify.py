"""Checks every byte of a dataset folder against its manifest, and every sample against what the loader would take."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmscale.data_tools.inspection.shard_check import Finding, ShardCheck
from mmscale.data_tools.inspection.verify_journal import Journal
from mmscale.data_tools.inspection.verify_notes import Note, notes
from mmscale.data_tools.inspection.verify_pool import check_shards
from mmscale.errors import ConfigError
from mmscale.logging import get_logger
from mmscale.streaming.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest

log = get_logger(__name__)

Progress = Callable[[int, int, str], None]
"""Takes bytes done, bytes in all, and what is being done."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`samples` usable of `indexed` in `shards` shards, `remembered` of them from an earlier check.

    No findings = all is well; `notes` (duplicates, shards that are unlike the others) are for a person to judge.
    """

    shards: int
    indexed: int
    samples: int
    findings: tuple[Finding, ...]
    notes: tuple[Note, ...] = ()
    remembered: int = 0


def verify_folder(
    folder: Path, on_bytes: Progress | None = None, *, decode: bool = False, again: bool = False, workers: int = 0
) -> VerifyReport:
    """Reads everything: sha256 of the tars, the index rebuilt and compared, each row parsed, each medium's header read.

    What was found is stored per shard (see `verify_journal`), so that a stopped check goes on, and a shard with the size and
    file time of its last check is not read again. When all shards are the manifest's, the manifest is stamped with the time
    at which the check began, so that shards with newer file times (a copy, for instance) need not be hashed again when they
    are opened.

    Args:
        folder: dataset folder.
        on_bytes: told of the progress.
        decode: every medium is also decoded.
        again: nothing is taken from an earlier check.
        workers: processes; 0 works in this one.

    Raises:
        RefusedInputError: the manifest is missing or unusable.
        DataError: a process of the check died.
    """
    manifest = read_manifest(folder)
    began_ns = time.time_ns()
    journal = Journal(folder, decode)
    found = {} if again else {entry.name: journal.load(entry) for entry in manifest.shards}
    checks = {name: check for name, check in found.items() if check is not None}
    remembered, todo = len(checks), [entry for entry in manifest.shards if entry.name not in checks]
    before = {entry.name: journal.identity(entry) for entry in todo}  # a change while it is read must not go unseen
    for entry, check in check_shards(folder, todo, decode, workers, _bytes_done(on_bytes, manifest, todo)):
        checks[entry.name] = check
        if not _is_damaged(check):  # a damaged one is read again each time, until it is restored
            journal.store(entry, check, before[entry.name])
    in_order = {entry.name: checks[entry.name] for entry in manifest.shards}
    if not any(map(_is_damaged, checks.values())):
        _stamp(folder / MANIFEST_NAME, began_ns)
    return VerifyReport(
        shards=len(manifest.shards),
        indexed=sum(check.indexed for check in checks.values()),
        samples=sum(check.samples for check in checks.values()),
        findings=(*_unlisted(folder, manifest), *(f for check in in_order.values() for f in check.findings)),
        notes=tuple(notes(folder, in_order)),
        remembered=remembered,
    )


def summarize(report: VerifyReport) -> list[tuple[str, str, int, str]]:
    """(shard, reason, how many, first example), a row per shard and reason."""
    count = Counter((finding.shard, finding.reason) for finding in report.findings)
    example: dict[tuple[str, str], str] = {}
    for finding in report.findings:
        example.setdefault((finding.shard, finding.reason), finding.detail)
    return [(shard, reason, count[shard, reason], text) for (shard, reason), text in example.items()]


def write_report(reports: Mapping[Path, VerifyReport], out: Path) -> None:
    """Writes the reports of some folders as JSON: folder -> report, and `ok` = nothing is wrong."""
    content = {str(folder): {"ok": not report.findings, **asdict(report)} for folder, report in reports.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise ConfigError(f"{out}: the report cannot be written: {error.strerror}; give another --json") from error


def _is_damaged(check: ShardCheck) -> bool:
    return any(finding.reason == "damaged" for finding in check.findings)


def _stamp(manifest: Path, time_ns: int) -> None:
    try:
        os.utime(manifest, ns=(time_ns, time_ns))
    except OSError as error:
        log.warning("%s cannot be stamped (%s); shards newer than it are hashed when opened", manifest, error.strerror)


def _unlisted(folder: Path, manifest: Manifest) -> list[Finding]:
    """Shards that were put aside when indexing, and files that look like shards and are not the manifest's."""
    listed = {entry.name for entry in manifest.shards} | set(manifest.quarantined)
    aside = [Finding(name, "quarantined", reason) for name, reason in manifest.quarantined.items()]
    return aside + [
        Finding(path.name, "not_in_manifest", f"run: mmscale-data index {folder}")
        for path in sorted([*folder.glob("*.tar"), *folder.glob("*.tar.zst")])
        if path.name not in listed
    ]


def _bytes_done(on_bytes: Progress | None, manifest: Manifest, todo: Sequence[ShardEntry]) -> Callable[[int], None]:
    """A function that takes the bytes of this check and tells those of all shards."""
    total = sum(entry.bytes for entry in manifest.shards)
    known = total - sum(entry.bytes for entry in todo)
    return lambda done: on_bytes(known + done, total, "") if on_bytes else None
