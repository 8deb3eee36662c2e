"""From what people have (rows in JSON or parquet, folders, foreign tars, pickles) to a dataset folder of shards.

Rows that cannot be used are counted by reason and listed in `skipped.jsonl` beside the manifest; nothing is lost in
silence. Run a build again after it was stopped: it continues and gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from mmscale.data_tools.kinds import Kind, Placement
from mmscale.data_tools.readers.items import Item, Reader, Source, refuse_twice
from mmscale.data_tools.readers.read_folder import read_folder
from mmscale.data_tools.readers.read_pickles import read_coyo, read_mmc4
from mmscale.data_tools.readers.read_rows import read_rows
from mmscale.data_tools.readers.read_tars import read_img2dataset, read_sam, read_webdataset, read_wids
from mmscale.data_tools.writer import ShardWriter, only_writer
from mmscale.errors import ConfigError, DataError, RefusedInputError

SKIPPED_NAME = "skipped.jsonl"

_ROW_KINDS = {Kind.llava, Kind.sharegpt, Kind.openai, Kind.jsonl, Kind.parquet}
_TAR_KINDS = {Kind.webdataset, Kind.img2dataset, Kind.wids, Kind.sam}

READERS: Mapping[Kind, Reader] = {
    **dict.fromkeys(_ROW_KINDS, read_rows),
    Kind.folder: read_folder,
    Kind.webdataset: read_webdataset,
    Kind.img2dataset: read_img2dataset,
    Kind.wids: read_wids,
    Kind.sam: read_sam,
    Kind.coyo_pkl: read_coyo,
    Kind.mmc4_pkl: read_mmc4,
}
"""The reader of each kind."""

OnRow = Callable[[int], None]
"""Called with the number of rows seen so far."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How shards are cut and whether a bad row stops the build. `max_bytes`: size of a shard; `max_samples`: in a shard.

    `zstd` writes `.tar.zst`, made for text; media in them are refused unless `force`.
    """

    max_bytes: int = 512 * 2**20
    max_samples: int = 10_000
    strict: bool = False
    zstd: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build gave: rows = samples + skipped. `dropped_turns`: leading turns that are not the user's."""

    samples: int
    skipped: Counter[str]
    dropped_turns: int

    @property
    def rows(self) -> int:
        """Rows of the source."""
        return self.samples + sum(self.skipped.values())


def build(kind: Kind, source: Source, out: Path, options: BuildOptions, on_row: OnRow | None = None) -> BuildReport:
    """Writes foreign data as a dataset folder.

    Args:
        kind: what the data are.
        source: where they lie and how they are read.
        out: dataset folder, made when missing.

    Raises:
        ConfigError: an option that this kind has no use for.
        RefusedInputError: a file or folder is missing or given twice, `out` is a file or written by another command, or a file is not what
            `kind` says.
        DataError: with `strict`, the first row that cannot be used.
    """
    _check_options(kind, source)
    refuse_twice(source.paths)
    for folder in source.captions:
        if not folder.is_dir():
            raise RefusedInputError(f"{folder}: expected a folder of caption files, found none; check --captions")
    return write_items(READERS[kind](replace(source, scratch=out)), out, options, on_row)


def _check_options(kind: Kind, source: Source) -> None:
    """Refuses options without effect."""
    given = {
        "--media": (source.media is not None, _ROW_KINDS),
        "--placement": (source.placement is not Placement.keep, _ROW_KINDS),
        "--captions": (bool(source.captions), _TAR_KINDS),
        "--rename": (source.rename, _TAR_KINDS),
        "--unfinished": (source.unfinished, {Kind.img2dataset}),
    }
    for option, (is_given, kinds) in given.items():
        if is_given and kind not in kinds:
            raise ConfigError(
                f"{option} has no effect with --from {kind}, only with {', '.join(sorted(kinds))}; leave it out"
            )


def write_items(items: Iterator[Item], out: Path, options: BuildOptions, on_row: OnRow | None = None) -> BuildReport:
    """Writes any rows as a dataset folder; the rows are asked for when the folder is there. Raises like `build`."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RefusedInputError(f"{out}: expected a folder to write, found a file; choose another with --out") from None
    temporary = out / (SKIPPED_NAME + ".tmp")
    try:
        with only_writer(out):
            try:
                report = _write(items, out, temporary, options, on_row)
                os.replace(temporary, out / SKIPPED_NAME)
                return report
            finally:  # whatever ended the build: no half list, and no new folder with nothing in it
                temporary.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # one that is not empty stays
            for folder in made:
                folder.rmdir()


def _write(
    items: Iterator[Item], out: Path, skip_path: Path, options: BuildOptions, on_row: OnRow | None
) -> BuildReport:
    skipped: Counter[str] = Counter()
    dropped_turns = 0
    with (
        skip_path.open("w", encoding="utf-8") as skip_list,
        ShardWriter(out, options.max_bytes, options.max_samples, zstd=options.zstd, force=options.force) as writer,
    ):
        for number, item in enumerate(items):
            if item.members is None:
                _skip(item, skip_list, skipped, options.strict)
            else:
                writer.write(item.key or f"{number:09d}", item.members)
                dropped_turns += item.dropped_turns
            if on_row:
                on_row(number + 1)
    return BuildReport(writer.num_samples, skipped, dropped_turns)


def _skip(item: Item, skip_list: TextIO, skipped: Counter[str], strict: bool) -> None:
    assert item.skip is not None, "an item has members or a reason"
    where = ", ".join(f"{name} {value}" for name, value in item.where.items())
    if strict:
        raise DataError(f"{where}: {item.skip}; correct it, or build without --strict to skip and count such rows")
    skipped[item.skip.reason] += 1
    line = {**item.where, "reason": item.skip.reason, "detail": item.skip.detail}
    shown = {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in line.items()}
    skip_list.write(json.dumps(shown, ensure_ascii=False) + "\n")
