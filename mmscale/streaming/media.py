"""Which members are media, in which order they stand in a sample, and what their headers say about their length."""

from __future__ import annotations

import re
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from mmscale.errors import BadSampleError
from mmscale.types import Modality

if TYPE_CHECKING:
    from PIL import Image

MODALITY_OF: dict[str, Modality] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
    **dict.fromkeys(("flac", "wav", "mp3", "ogg", "m4a", "aac"), "audio"),
    **dict.fromkeys(("mp4", "webm", "mkv"), "video"),
}
"""The media files that are read, by the last part of the extension; no other is ever opened."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
"""What Pillow may recognise: it goes by content, and some of its other formats start external programs."""

_EXECUTABLE = frozenset(("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "joblib", "dill"))
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_EXIF_ORIENTATION = 0x0112


class Lengths(NamedTuple):
    """What a header says: samples per channel, pixels as displayed, frames, frames per 1000 s, Hz; 0 = does not apply.

    `frames` of a clip are those that can be shown, `keyframes` those of them that decode without others.
    """

    audio_samples: int = 0
    width: int = 0
    height: int = 0
    frames: int = 0
    fps_milli: int = 0
    rate_hz: int = 0
    keyframes: int = 0


def modality_of(ext: str) -> Modality | None:
    """The modality of a member by its extension, such as `image` for `0.png`; None when it is no medium."""
    return MODALITY_OF.get(ext.rpartition(".")[2])


def is_executable(ext: str, head: bytes) -> bool:
    """Whether a member is of a kind that runs code when loaded: pickles under any name, and `.npy` of Python objects.

    Args:
        ext: extension, such as `seg.npy`.
        head: the first bytes of the payload (128 are enough).
    """
    for suffix in _COMPRESSED:
        ext = ext.removesuffix(suffix)
    last = ext.rpartition(".")[2]
    return last in _EXECUTABLE or (last == "npy" and re.search(rb"'descr': *'\|?O", head) is not None)


@lru_cache(maxsize=4096)  # a dataset has few extensions, and this is asked for every member
def member_order(ext: str) -> tuple[bool, list[str | int], str]:
    """Sort key of a sample's members: media first, naturally by prefix (`0.png`, `1.png`, `10.png`), then the rest.

    Example:
        >>> sorted(["json", "10.png", "2.png"], key=member_order)
        ['2.png', '10.png', 'json']
    """
    prefix = ext.rpartition(".")[0]
    natural = [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", prefix))]
    return modality_of(ext) is None, natural, ext


def probe(ext: str, data: bytes | BinaryIO) -> Lengths:
    """Lengths of a medium from its header alone; all 0 when it cannot be read: the decoder will name the fault.

    Args:
        ext: extension of the member.
        data: the file's bytes; for a video also a seekable file, of which as little is read as its container allows.
    """
    modality = modality_of(ext)
    if modality == "video":
        return _probe_video(data)
    content = data if isinstance(data, bytes) else data.read()
    if modality == "image":
        return _probe_image(content)
    if modality == "audio":
        return _probe_aac(content) if ext.rpartition(".")[2] in ("m4a", "aac") else _probe_audio(content)
    return Lengths()


def exif_orientation(image: Image.Image) -> int:
    """How the picture was held, 1 to 8 (5 to 8 lie on their side), as far as the header says: nothing is decoded here."""
    value = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    return value if value in range(1, 9) else 1


def _probe_image(data: bytes) -> Lengths:
    from PIL import Image

    try:
        # Opening reads the header only, and never allocates by what it claims.
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if exif_orientation(image) >= 5:
                width, height = height, width
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, Image.DecompressionBombError):
        return Lengths()
    return Lengths(width=width, height=height, frames=1)


def _probe_audio(data: bytes) -> Lengths:
    import soundfile

    try:
        info = soundfile.info(BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError):
        return Lengths()
    if not (0 < info.samplerate < 1 << 32 and 0 <= info.frames < 1 << 62):
        return Lengths()
    return Lengths(rate_hz=info.samplerate, audio_samples=info.frames)


def _probe_aac(data: bytes) -> Lengths:
    from mmscale.streaming.containers import aac_header

    try:
        rate_hz, num_samples = aac_header(BytesIO(data))
    except BadSampleError:
        return Lengths()
    return Lengths(rate_hz=rate_hz, audio_samples=num_samples)


def _probe_video(data: bytes | BinaryIO) -> Lengths:
    from mmscale.streaming.containers import open_video

    try:
        with open_video(BytesIO(data) if isinstance(data, bytes) else data) as video:
            return Lengths(**video.header(video.packets())._asdict())
    except BadSampleError:
        return Lengths()
