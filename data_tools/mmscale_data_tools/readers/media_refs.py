"""The media that a row names: files below one folder, `data:` URLs, bytes in a column, folders and lists of frames.

Nothing outside the media folder is ever opened, through a link neither, and nothing is fetched.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mmscale.data_tools.readers.items import extension
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.media import MODALITY_OF, modality_of
from mmscale.streaming.rows import MEDIA_FIELDS
from mmscale.types import MODALITIES, Modality

MAX_INLINE_BYTES = 1 << 30
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "jpg"), (0, b"\x89PNG\r\n\x1a\n", "png"), (8, b"WEBP", "webp"), (8, b"WAVE", "wav"),
    (0, b"fLaC", "flac"), (0, b"OggS", "ogg"), (0, b"ID3", "mp3"), (0, b"\xff\xfb", "mp3"), (4, b"ftyp", "mp4"),
    (0, b"\x1aE\xdf\xa3", "mkv"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Medium:
    """One medium of a row: what the row calls it, its extension, and its bytes or the file that holds them."""

    modality: Modality
    name: str
    ext: str
    content: bytes | Path


def row_media(row: Mapping[str, Any], media: Path | None) -> list[Medium]:
    """The media of a row in the order of their fields.

    Args:
        row: fields `image`, `images` (and so on) as names, `data:` URLs, bytes or `{"path"|"bytes"}` objects, or lists of
            them; `frames`: a list of pictures that make one video.
        media: folder that names are relative to.

    Raises:
        BadSampleError: one must not or cannot be used.
        RefusedInputError: a file is named and there is no media folder.
    """
    found: list[Medium] = []
    for modality in MODALITIES:
        values = _values(row, modality)
        if modality == "video" and values is None and "frames" in row:
            found.append(_from_frames(row["frames"], media))
        found += [resolve(value, modality, media) for value in values or ()]
    return found


def name_media(row: Mapping[str, Any], found: Sequence[Medium]) -> dict[str, Any]:
    """The row with names in the place of bytes and `data:` URLs; one that has only names stays as it is."""
    out = dict(row)
    for modality in MODALITIES:
        field = _field(row, modality)
        if field is None:
            continue
        names = [medium.name for medium in found if medium.modality == modality]
        values = row[field] if isinstance(row[field], list) else [row[field]]
        if any(_is_inline(value) for value in values):
            out[field] = names if isinstance(row[field], list) else names[0]
    return out


def resolve(value: object, modality: Modality, media: Path | None) -> Medium:
    """One medium from what a row says about it. Raises like `row_media`."""
    if isinstance(value, dict):
        name, data = value.get("path"), value.get("bytes")
        if isinstance(data, bytes):
            return _inline(data, modality, name if isinstance(name, str) else "")
        value = name
    if isinstance(value, bytes):
        return _inline(value, modality, "")
    if not isinstance(value, str) or not value:
        raise BadSampleError("json_fields", f"`{modality}` is {str(value)[:80]!r}, expected a file name")
    if value[:5].lower() == "data:":
        return _from_data_url(value, modality)
    name = _local_name(value, media)
    if modality == "video":
        return _video(name, media)
    return Medium(modality, name, extension(name), media_file(name, modality, media))


def media_file(name: str, modality: Modality, media: Path | None) -> Path:
    """The file of a name below the media folder. Raises like `row_media`."""
    if modality_of(extension(name)) != modality:
        _check_path(name)
        raise BadSampleError("media_type", f"{name[:200]!r} is no {modality} file that can be read")
    file = inside(name, media)
    try:
        size = file.stat().st_size if file.is_file() else -1
    except OSError as e:
        raise BadSampleError("media_missing", f"{name[:200]!r}: {e.strerror}") from None
    if size <= 0:
        raise BadSampleError("media_missing" if size else "media_empty", f"{name[:200]!r} in {media}")
    return file


def inside(name: str, folder: Path | None) -> Path:
    """`folder / name`, which may not exist. Raises BadSampleError when the name or a link in it leads out of the folder."""
    _check_path(name)
    if folder is None:
        raise RefusedInputError(f"a row names the file {name[:200]!r}; give the folder of the media files with --media")
    file = folder / name
    if not is_inside(file, folder):
        raise BadSampleError("media_path", f"{name[:200]!r} is a link that leads outside the media folder")
    return file


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file is really below a folder, links followed."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


def sniff(data: bytes) -> str:
    """The extension for a medium by its first bytes; empty when it is none that is read."""
    return next((ext for at, magic, ext in _MAGIC if data[at : at + len(magic)] == magic), "")


def natural(names: Iterable[str]) -> list[str]:
    """Names sorted with their numbers by value: `f2.jpg` before `f10.jpg`."""
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", name)])


def _check_path(name: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\", "~")) or ".." in parts or "\0" in name or ":" in name.partition("/")[0]:
        raise BadSampleError("media_path", f"{name[:200]!r} is not a relative path inside the media folder")


def _field(row: Mapping[str, Any], modality: Modality) -> str | None:
    return next((name for name in reversed(MEDIA_FIELDS[modality]) if row.get(name) is not None), None)


def _values(row: Mapping[str, Any], modality: Modality) -> list[Any] | None:
    field = _field(row, modality)
    if field is None:
        return None
    return row[field] if isinstance(row[field], list) else [row[field]]


def _is_inline(value: object) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, bytes) or (isinstance(value, str) and value[:5].lower() in ("data:", "file:"))


def _local_name(value: str, media: Path | None) -> str:
    """The name of a `file:` URL relative to the media folder; any other value as it is."""
    if value[:5].lower() != "file:":
        return value
    url = urlsplit(value)
    path = unquote(url.path)
    if url.netloc not in ("", "localhost"):
        raise BadSampleError("media_path", f"{value[:200]!r} is on another machine")
    if not path.startswith("/"):
        return path
    if media is None:
        raise RefusedInputError(
            f"a row names the file {value[:200]!r}; give the folder of the media files with --media"
        )
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(media))
    if not real.is_relative_to(root):
        raise BadSampleError("media_path", f"{value[:200]!r} is outside the media folder")
    return real.relative_to(root).as_posix()


def _inline(data: bytes, modality: Modality, name: str) -> Medium:
    """A medium whose bytes stand in the row; its name is only a name, nothing is opened."""
    if not data:
        raise BadSampleError("media_empty", f"a {modality} of 0 bytes")
    ext = sniff(data)
    if MODALITY_OF.get(ext) != modality:
        ext = extension(name)  # the decoder will say what is wrong with it
    if MODALITY_OF.get(ext) != modality:
        raise BadSampleError("media_type", f"bytes that are no {modality} that can be read (they begin {data[:8]!r})")
    return Medium(modality, name or f"{modality}.{ext}", ext, data)


def _from_data_url(url: str, modality: Modality) -> Medium:
    head, comma, body = url.partition(",")
    if not comma or len(body) > 2 * MAX_INLINE_BYTES:
        raise BadSampleError("media_type", f"{url[:60]!r} is not a `data:` URL of at most {MAX_INLINE_BYTES} bytes")
    if head.lower().endswith(";base64"):
        return _inline(decode_base64(body), modality, "")
    return _inline(unquote_to_bytes(body), modality, "")


def decode_base64(text: str | bytes) -> bytes:
    """The bytes of a base64 text. Raises BadSampleError when it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise BadSampleError("media_type", f"not base64: {e}") from None


def _video(name: str, media: Path | None) -> Medium:
    """A clip, a folder of frames, or a clip named without its `.mp4` (as VILA's preference rows do)."""
    if modality_of(extension(name)) != "video":
        place = inside(name, media)
        if place.is_dir():
            assert media is not None, "checked by `inside`"
            frames = [f.name for f in place.iterdir() if modality_of(extension(f.name)) == "image"]
            return _from_frames([f"{name}/{frame}" for frame in natural(frames)], media, name)
        if inside(f"{name}.mp4", media).is_file():
            name = f"{name}.mp4"
    return Medium("video", name, extension(name), media_file(name, "video", media))


def _from_frames(frames: object, media: Path | None, name: str = "frames") -> Medium:
    """Pictures in order as one clip that holds them unchanged."""
    from mmscale.streaming.decode.video import FRAMES_EXT, mux_frames

    if not isinstance(frames, list):
        raise BadSampleError("json_fields", f"`frames` is a {type(frames).__name__}, expected a list of pictures")
    if not frames:
        raise BadSampleError("media_missing", f"the video {name[:200]!r} has no frames (jpg, jpeg, png or webp)")
    contents = [resolve(frame, "image", media).content for frame in frames]
    pictures = [content if isinstance(content, bytes) else content.read_bytes() for content in contents]
    return Medium("video", name, FRAMES_EXT, mux_frames(pictures))
