"""Image bytes to the pixels of tower inputs. The one module that imports simplejpeg (extra `fast`), an optional speed-up."""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from io import BytesIO
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmscale.errors import BadSampleError
from mmscale.streaming.decode.resize import to_inputs
from mmscale.streaming.media import IMAGE_FORMATS, exif_orientation
from mmscale.types import ImageSpec

MAX_SIDE = 32_768
MAX_ASPECT = 200

_JPEG = b"\xff\xd8\xff"
_WHITE = (255, 255, 255, 255)
_FAULTS = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on damaged files."""


def decode_image(data: bytes, spec: ImageSpec, max_pixels: int) -> torch.Tensor:
    """The tower inputs of a picture file, uint8 [num_inputs, 3, size, size]: `to_inputs` of `open_pixels`.

    Raises:
        BadSampleError: as `open_pixels` does.
    """
    return to_inputs(open_pixels(data, max_pixels), spec)


def open_pixels(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """RGB pixels [height, width, 3] of a JPEG, PNG or WebP file (the first frame of an animation), in its own size.

    The picture is turned upright by its EXIF orientation. Transparency is laid over white, 16-bit samples keep their high
    byte, CMYK, palette and grey become RGB. The pixels do not depend on whether simplejpeg is installed; one fault does: a JPEG
    that lacks data but has its end mark is refused with it, and filled up with grey by Pillow, which says nothing.

    Raises:
        BadSampleError: `decode_image`, another format, damaged or cut off; `image_size`, refused by the header before any
            pixel is decoded.
    """
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            check_image_size(*image.size, max_pixels)
            orientation = exif_orientation(image)
            pixels = _decode_jpeg(data, image)
            if pixels is None:
                image.load()
                check_image_size(*image.size, max_pixels)
                pixels = np.array(_to_rgb(image))
    except _FAULTS as error:
        raise BadSampleError("decode_image", f"{len(data)} bytes: {type(error).__name__}: {error}") from error
    return _upright(pixels, orientation)


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The picture of `open_pixels` as a Pillow image."""
    return Image.fromarray(open_pixels(data, max_pixels))


def check_image_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadSampleError `image_size` for pictures that are too large, too long or too thin to be decoded."""
    small, large = sorted((width, height))
    if small < 1 or width * height > max_pixels or large > MAX_SIDE or large > MAX_ASPECT * small:
        limits = f"1 to {MAX_SIDE} pixels a side, at most {max_pixels} in all, sides at most 1:{MAX_ASPECT}"
        raise BadSampleError("image_size", f"{width} x {height} pixels, expected {limits}")


def _decode_jpeg(data: bytes, image: Image.Image) -> NDArray[np.uint8] | None:
    """The pixels of a sound grey or RGB JPEG by simplejpeg; None = Pillow decides: without it, and on irregularities.

    Both are libjpeg-turbo with the slow, accurate transforms, and give the same pixels. Raises ValueError when data is missing.
    """
    library = _simplejpeg()
    if library is None or not data.startswith(_JPEG) or image.mode not in ("L", "RGB"):
        return None
    # Into memory of the size that was checked: a file that says another size to libjpeg gets no more.
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    try:
        decoded = library.decode_jpeg(data, colorspace="RGB", strict=True, buffer=pixels)
    except ValueError as error:
        if "premature end" in str(error):
            raise  # the rest of the picture would be grey
        return None
    return pixels if decoded.shape == pixels.shape else None


@lru_cache(maxsize=1)
def _simplejpeg() -> ModuleType | None:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow keeps the high byte of 16-bit colour by itself
        high_bytes = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(high_bytes)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The picture as it is to be looked at; `orientation` is EXIF's, 1 = as stored."""
    if orientation == 1:
        return pixels_HWC
    if orientation >= 5:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    return np.ascontiguousarray(pixels_HWC)
