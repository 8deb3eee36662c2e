"""A folder of media files with a caption of the same name beside each, or a folder of text files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmscale.data_tools.readers.items import Item, Source, encode_json, extension
from mmscale.data_tools.readers.media_refs import is_inside
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample

CAPTION_EXTENSIONS = ("txt", "caption")


def read_folder(source: Source) -> Iterator[Item]:
    """The captioned files below some folders, sorted by path; in a folder without media every text file is a document.

    Links that lead out of the folder, and links to folders, are skipped and counted.

    Raises:
        RefusedInputError: no such folder, neither media nor texts in it, or it holds the output folder.
    """
    for folder in source.paths:
        if not folder.is_dir():
            raise RefusedInputError(f"{folder}: expected a folder of images with captions, found none; check the path")
        if source.scratch.resolve().is_relative_to(folder.resolve()):
            raise RefusedInputError(
                f"{source.scratch}: lies inside the source folder {folder}; choose another output folder"
            )
        names, linked = _walk(folder)
        if any(modality_of(extension(name)) for name in names):
            yield from _captioned_files(folder, names)
        elif any(extension(name) in CAPTION_EXTENSIONS for name in names):
            yield from (_item(folder, name) for name in names if extension(name) in CAPTION_EXTENSIONS)
        else:
            raise RefusedInputError(
                f"{folder}: expected images (jpg, png, webp) or clips with captions, or text files, found none"
            )
        for name in linked:
            yield Item({"file": name}, skip=BadSampleError("media_path", "a folder that is a link is not entered"))


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """The files below a folder and the links to folders, relative to it, each sorted."""
    names, linked = [], []
    for place, folders, files in os.walk(folder):
        names += [os.path.join(place, name) for name in files]
        linked += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
    return sorted(os.path.relpath(p, folder) for p in names), sorted(os.path.relpath(p, folder) for p in linked)


def _captioned_files(folder: Path, names: list[str]) -> Iterator[Item]:
    captions: dict[str, list[str]] = {}
    for name in names:
        stem, dot, _ = name.rpartition(".")
        if dot and extension(name) in CAPTION_EXTENSIONS:
            captions.setdefault(stem, []).append(name)
    used: set[str] = set()
    for name in names:
        if modality_of(extension(name)):
            stem = name.rpartition(".")[0]
            used.add(stem)
            yield _item(folder, name, captions.get(stem, []))
    for stem, orphans in captions.items():
        for name in orphans if stem not in used else ():
            fault = BadSampleError("missing_media", "a caption without a media file of its name")
            yield Item({"file": name}, skip=fault)


def _item(folder: Path, name: str, captions: list[str] | None = None) -> Item:
    """A medium with its captions, or (`captions` None) a document."""
    where: dict[str, str | int] = {"file": name}
    texts = [name] if captions is None else captions
    try:
        if name != name.encode("utf-8", "ignore").decode():
            raise BadSampleError("name_not_utf8", "the file name is not UTF-8")
        if len(texts) != 1:
            found = " and ".join(texts) or "none"
            raise BadSampleError("missing_text", f"expected one caption file of the same name, found {found}")
        for one in {name, texts[0]}:
            if not is_inside(folder / one, folder):
                raise BadSampleError("media_path", f"{one!r} is a link that leads outside the folder")
            if not (folder / one).is_file():  # a pipe would be waited for, for ever
                raise BadSampleError("media_missing", f"{one!r} is a link to nothing, or no file at all")
        text = (folder / texts[0]).read_bytes()
        if captions is None:
            parse_sample(name, [("txt", text)])
            return Item(where, {"txt": text})
        parse_sample(name, [(extension(name), b""), ("txt", text)])
        if (folder / name).stat().st_size == 0:
            raise BadSampleError("media_empty", f"{name!r} has 0 bytes")
    except BadSampleError as skip:
        return Item(where, skip=skip)
    except OSError as e:
        return Item(where, skip=BadSampleError("media_missing", f"{e.filename}: {e.strerror}"))
    return Item(where, {extension(name): folder / name, "txt": text, "json": encode_json({"file": name})})
