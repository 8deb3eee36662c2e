"""From what people have (LLaVA JSON with a media folder, a folder of captioned images) to a dataset folder of shards.

Rows that cannot be used are counted by reason and listed in `skipped.jsonl` beside the manifest; nothing is lost in
silence. Run a build again after it was stopped: it continues and gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from mmscale.data_tools.json_rows import Row, iter_rows
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import BadSampleError, DataError, RefusedInputError
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import declared_media, parse_row, parse_sample
from mmscale.types import MODALITIES, Modality

SKIPPED_NAME = "skipped.jsonl"
CAPTION_EXTENSIONS = ("txt", "caption")

OnRow = Callable[[int], None]
"""Called with the number of rows seen so far."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How shards are cut and whether a bad row stops the build. `max_bytes`: size of a shard; `max_samples`: in a shard."""

    max_bytes: int = 512 * 2**20
    max_samples: int = 10_000
    strict: bool = False


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


@dataclass(frozen=True, slots=True)
class _Item:
    """A row of any source on its way into a shard. `where` names file and row for the skip list."""

    where: Mapping[str, str | int]
    members: Mapping[str, bytes | Path] | None = None
    skip: BadSampleError | None = None
    dropped_turns: int = 0


def build_llava(rows: Path, media: Path, out: Path, options: BuildOptions, on_row: OnRow | None = None) -> BuildReport:
    """Writes a LLaVA/ShareGPT file (.json list or .jsonl) and its media as a dataset folder.

    Args:
        rows: the row file. Keys of the samples are its row numbers.
        media: folder that the file names in the rows are relative to; nothing outside it is opened, through a link neither.
        out: dataset folder, made when missing.

    Raises:
        RefusedInputError: a file or folder is missing, `out` is a file, or a list is not parseable (with the line).
        DataError: with `strict`, the first row that cannot be used.
    """
    if not media.is_dir():
        raise RefusedInputError(f"{media}: expected the folder of the media files, found none; give it with --media")
    return _build((_llava_item(rows, row, media) for row in iter_rows(rows)), out, options, on_row)


def build_folder(source: Path, out: Path, options: BuildOptions, on_row: OnRow | None = None) -> BuildReport:
    """Writes media files with a caption of the same name (`.txt` or `.caption`) below a folder as a dataset folder.

    Raises:
        RefusedInputError: no such folder, no media file in it, or `out` is a file.
        DataError: with `strict`, the first file that cannot be used.
    """
    if not source.is_dir():
        raise RefusedInputError(f"{source}: expected a folder of images with captions, found none; check the path")
    if out.resolve().is_relative_to(source.resolve()):
        raise RefusedInputError(f"{out}: lies inside the source folder {source}; choose another output folder")
    names = sorted(
        os.path.relpath(os.path.join(folder, name), source) for folder, _, files in os.walk(source) for name in files
    )
    if not any(modality_of(_ext(name)) for name in names):
        raise RefusedInputError(f"{source}: expected images (jpg, png, webp) or clips with captions, found none")
    return _build(_folder_items(source, names), out, options, on_row)


def _build(items: Iterator[_Item], out: Path, options: BuildOptions, on_row: OnRow | None) -> BuildReport:
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RefusedInputError(f"{out}: expected a folder to write, found a file; choose another with --out") from None
    temporary = out / (SKIPPED_NAME + ".tmp")
    try:
        report = _write(items, out, temporary, options, on_row)
        os.replace(temporary, out / SKIPPED_NAME)
        return report
    finally:  # whatever ended the build: no half list, and no new folder with nothing in it
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # one that is not empty stays
            for folder in made:
                folder.rmdir()


def _write(
    items: Iterator[_Item], out: Path, skip_path: Path, options: BuildOptions, on_row: OnRow | None
) -> BuildReport:
    skipped: Counter[str] = Counter()
    dropped_turns = 0
    with (
        skip_path.open("w", encoding="utf-8") as skip_list,
        ShardWriter(out, options.max_bytes, options.max_samples) as writer,
    ):
        for number, item in enumerate(items):
            if item.members is None:
                _skip(item, skip_list, skipped, options.strict)
            else:
                writer.write(f"{number:09d}", item.members)
                dropped_turns += item.dropped_turns
            if on_row:
                on_row(number + 1)
    return BuildReport(writer.num_samples, skipped, dropped_turns)


def _skip(item: _Item, skip_list: TextIO, skipped: Counter[str], strict: bool) -> None:
    assert item.skip is not None, "an item has members or a reason"
    where = ", ".join(f"{name} {value}" for name, value in item.where.items())
    if strict:
        raise DataError(f"{where}: {item.skip}; correct it, or build without --strict to skip and count such rows")
    skipped[item.skip.reason] += 1
    line = {**item.where, "reason": item.skip.reason, "detail": item.skip.detail}
    shown = {k: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for k, v in line.items()}
    skip_list.write(json.dumps(shown, ensure_ascii=False) + "\n")


def _llava_item(path: Path, row: Row, media: Path) -> _Item:
    where: dict[str, str | int] = {"file": path.name, "row": row.number, "line": row.line}
    try:
        if row.fault is not None:
            raise BadSampleError(row.fault.reason, str(row.fault))
        if not isinstance(row.value, dict):
            raise BadSampleError("json_fields", f"the row is a {type(row.value).__name__}, expected an object")
        if "conversations" not in row.value:
            raise BadSampleError("json_fields", "the row has no `conversations`")
        files = _media_files(row.value, media)
        turns = parse_row(row.value, [modality for modality, _ in files])
    except BadSampleError as skip:
        return _Item(where, skip=skip)
    members: dict[str, bytes | Path] = {}
    for i, (_, file) in enumerate(files):
        members[f"{i}.{_ext(file.name)}" if len(files) > 1 else _ext(file.name)] = file
    members["json"] = json.dumps(row.value, ensure_ascii=False, separators=(",", ":")).encode()
    return _Item(where, members, dropped_turns=len(row.value["conversations"]) - len(turns))


def _media_files(row: Mapping[str, Any], media: Path) -> list[tuple[Modality, Path]]:
    """Modality and path of each file that a row names. Raises BadSampleError when one must not or cannot be used."""
    return [
        (modality, _media_file(name, modality, media))
        for modality in MODALITIES
        for name in declared_media(row, modality) or ()
    ]


def _media_file(name: str, modality: Modality, media: Path) -> Path:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\", "~")) or ".." in parts or "\0" in name or ":" in name.partition("/")[0]:
        raise BadSampleError("media_path", f"{name[:200]!r} is not a relative path inside the media folder")
    if modality_of(_ext(name)) != modality:
        raise BadSampleError("media_type", f"{name[:200]!r} is no {modality} file that can be read")
    file = media / name
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(media)):
        raise BadSampleError("media_path", f"{name[:200]!r} is a link that leads outside the media folder")
    try:
        size = file.stat().st_size if file.is_file() else -1
    except OSError as e:
        raise BadSampleError("media_missing", f"{name[:200]!r}: {e.strerror}") from None
    if size <= 0:
        raise BadSampleError("media_missing" if size else "media_empty", f"{name[:200]!r} in {media}")
    return file


def _folder_items(source: Path, names: list[str]) -> Iterator[_Item]:
    captions: dict[str, list[str]] = {}
    for name in names:
        stem, dot, _ = name.rpartition(".")
        if dot and _ext(name) in CAPTION_EXTENSIONS:
            captions.setdefault(stem, []).append(name)
    used: set[str] = set()
    for name in names:
        if modality_of(_ext(name)):
            stem = name.rpartition(".")[0]
            used.add(stem)
            yield _captioned(source, name, captions.get(stem, []))
    for stem, orphans in captions.items():
        for name in orphans if stem not in used else ():
            fault = BadSampleError("missing_media", "a caption without a media file of its name")
            yield _Item({"file": name}, skip=fault)


def _captioned(source: Path, name: str, captions: list[str]) -> _Item:
    where: dict[str, str | int] = {"file": name}
    ext = _ext(name)
    try:
        if name != name.encode("utf-8", "ignore").decode():
            raise BadSampleError("name_not_utf8", "the file name is not UTF-8")
        if len(captions) != 1:
            found = " and ".join(captions) or "none"
            raise BadSampleError("missing_text", f"expected one caption file of the same name, found {found}")
        caption = (source / captions[0]).read_bytes()
        parse_sample(name, [(ext, b""), ("txt", caption)])
        if (source / name).stat().st_size == 0:
            raise BadSampleError("media_empty", f"{name!r} has 0 bytes")
    except BadSampleError as skip:
        return _Item(where, skip=skip)
    except OSError as e:
        return _Item(where, skip=BadSampleError("media_missing", f"{e.filename}: {e.strerror}"))
    about = json.dumps({"file": name}, ensure_ascii=False).encode()
    return _Item(where, {ext: source / name, "txt": caption, "json": about})


def _ext(name: str) -> str:
    return name.rpartition(".")[2].lower()
