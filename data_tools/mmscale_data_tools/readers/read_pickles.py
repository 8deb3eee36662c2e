"""COYO's and MMC4's pickles with the `.count` file beside each: captioned images, and documents with images in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale.data_tools.readers.items import Item, Source, encode_json
from mmscale.data_tools.readers.media_refs import decode_base64, sniff
from mmscale.data_tools.readers.pickles import iter_pickled_list
from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import parse_sample
from mmscale.types import MEDIA_TOKENS

MAX_IMAGES = 6
"""Images taken of an MMC4 document, the first ones of its list."""

Members = dict[str, bytes | Path]


def read_coyo(source: Source) -> Iterator[Item]:
    """The rows of COYO pickles (`part-00000.pkl`): an image as base64 in `image` or as bytes in `rawbytes`, and its text.

    Raises:
        RefusedInputError: a file is not a pickle of plain values, or its `.count` says another number of rows.
    """
    return _read(source, coyo_members)


def read_mmc4(source: Source) -> Iterator[Item]:
    """The documents of MMC4 pickles. Raises like `read_coyo`."""
    return _read(source, mmc4_members)


def _read(source: Source, members: Callable[[Mapping[str, Any]], Members]) -> Iterator[Item]:
    for path in [file for place in source.paths for file in _files(place)]:
        expected = _count(path)
        number = -1
        for number, row in enumerate(iter_pickled_list(path)):
            where: dict[str, str | int] = {"file": path.name, "row": number}
            try:
                if not isinstance(row, dict):
                    raise BadSampleError("json_fields", f"the row is a {type(row).__name__}, expected a dict")
                made = members(row)
                parse_sample(path.name, [(ext, data) for ext, data in made.items() if isinstance(data, bytes)])
            except BadSampleError as skip:
                yield Item(where, skip=skip)
            else:
                yield Item(where, made)
        if number + 1 != expected:
            raise RefusedInputError(
                f"{path}: {number + 1} rows, {path.stem}.count says {expected}; get both files again, or correct the count"
            )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.pkl")) if path.is_dir() else []
    if not found:
        raise RefusedInputError(f"{path}: expected .pkl files, found none; check the path")
    return found


def _count(path: Path) -> int:
    """The number of rows in the `.count` file of a pickle."""
    place = path.with_suffix(".count")
    try:
        text = place.read_bytes()[:64].decode("ascii").strip()
        return int(text)
    except OSError as e:
        raise RefusedInputError(f"{place}: {e.strerror}; write the number of rows of {path.name} into it") from None
    except ValueError:
        raise RefusedInputError(f"{place}: expected the number of rows of {path.name}, found something else") from None


def coyo_members(row: Mapping[str, Any]) -> Members:
    """Image, caption and metadata of a COYO row. Raises BadSampleError when one is missing or of a wrong type."""
    caption = next((row[name] for name in ("text", "caption") if name in row), None)
    if not isinstance(caption, str):
        raise BadSampleError("json_fields", "expected a text in `text` or `caption`")
    raw = row.get("rawbytes")
    image = raw if isinstance(raw, bytes) else _image(row.get("image"), "image")
    rest = {k: v for k, v in row.items() if k not in ("image", "rawbytes")}
    # The caption is the sample's text; as `text` of the metadata it would read as a document.
    about = {("caption" if k == "text" else k): v for k, v in rest.items()}
    return {_ext(image): image, "txt": caption.encode("utf-8", "surrogatepass"), "json": encode_json(about)}


def mmc4_members(row: Mapping[str, Any]) -> Members:
    """A document with its images: the first ones of the list, each in front of the sentence that it matches.

    Sentences are joined by one space, spaces beside an image are removed, and `<image>` as a word becomes `<IMAGE>`.

    Raises:
        BadSampleError: a field is missing or of a wrong type, or an image matches no sentence.
    """
    sentences, infos = row.get("text_list"), row.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadSampleError("json_fields", "expected a list of texts in `text_list`")
    if not isinstance(infos, list) or not all(isinstance(info, dict) for info in infos):
        raise BadSampleError("json_fields", "expected a list of dicts in `image_info`")
    chosen = sorted(infos[:MAX_IMAGES], key=lambda info: _place(info, len(sentences)))
    images = [_image(info.get("image_base64"), "image_base64") for info in chosen]
    text = interleave(sentences, [_place(info, len(sentences)) for info in chosen])
    rest = {k: v for k, v in row.items() if k not in ("text_list", "similarity_matrix")}
    about = {**rest, "image_info": [{k: v for k, v in info.items() if k != "image_base64"} for info in infos]}
    exts = [_ext(image) if len(images) == 1 else f"{i}.{_ext(image)}" for i, image in enumerate(images)]
    return {**dict(zip(exts, images, strict=True)), "json": encode_json({**about, "text": text})}


def interleave(sentences: list[str], places: list[int]) -> str:
    """A text with an image tag in front of the sentences at `places` (ascending, a number per image).

    Example:
        >>> interleave(["One.", "Two."], [1, 1])
        'One.<image>\\n<image>\\nTwo.'
    """
    tag = MEDIA_TOKENS["image"]
    parts = [f"{tag}\n" * places.count(i) + sentence.replace(tag, tag.upper()) for i, sentence in enumerate(sentences)]
    return re.sub(f" ?{tag} ?", tag, " ".join(parts))


def _place(info: Mapping[str, Any], sentences: int) -> int:
    place = info.get("matched_text_index")
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < sentences:
        raise BadSampleError(
            "json_fields", f"`matched_text_index` is {str(place)[:40]}, the document has {sentences} sentences"
        )
    return place


def _image(value: object, name: str) -> bytes:
    if not isinstance(value, str | bytes) or not value:
        raise BadSampleError("json_fields", f"`{name}` is no base64 text")
    return decode_base64(value)


def _ext(image: bytes) -> str:
    ext = sniff(image)
    if modality_of(ext) != "image":
        raise BadSampleError("media_type", f"bytes that are no JPEG, PNG or WebP (they begin {image[:8]!r})")
    return ext
