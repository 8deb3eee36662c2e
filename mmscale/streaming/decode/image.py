"""Image bytes to the pixels of a square tower input."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps

from mmscale.errors import BadSampleError
from mmscale.streaming.media import IMAGE_FORMATS
from mmscale.types import ImageSpec

MAX_SIDE = 32_768
MAX_ASPECT = 200

_WHITE = (255, 255, 255, 255)
_FAULTS = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on damaged files."""


def decode_image(data: bytes, spec: ImageSpec, max_pixels: int) -> torch.Tensor:
    """RGB pixels, uint8 [3, size, size], of a JPEG, PNG or WebP file (the first frame of an animation).

    The picture is turned upright by its EXIF orientation. Transparency is laid over white, 16-bit samples keep their high
    byte, CMYK, palette and grey become RGB. Resizing is Pillow's bicubic; a picture of the right size keeps its pixels.

    Raises:
        BadSampleError: `decode_image`, another format, damaged or cut off; `image_size`, refused by the header before any
            pixel is decoded.
    """
    pixels = np.array(_to_square(open_image(data, max_pixels), spec))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The upright RGB picture of a file, in its own size; raises and converts like `decode_image`."""
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            check_image_size(*image.size, max_pixels)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _FAULTS as error:
        raise BadSampleError("decode_image", f"{len(data)} bytes: {type(error).__name__}: {error}") from error


def check_image_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadSampleError `image_size` for pictures that are too large, too long or too thin to be decoded."""
    small, large = sorted((width, height))
    if small < 1 or width * height > max_pixels or large > MAX_SIDE or large > MAX_ASPECT * small:
        limits = f"1 to {MAX_SIDE} pixels a side, at most {max_pixels} in all, sides at most 1:{MAX_ASPECT}"
        raise BadSampleError("image_size", f"{width} x {height} pixels, expected {limits}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow keeps the high byte of 16-bit colour by itself
        high_bytes = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(high_bytes)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def _to_square(image: Image.Image, spec: ImageSpec) -> Image.Image:
    size = (spec.size, spec.size)
    if spec.mode == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), spec.fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if spec.mode == "square":
        small, large = sorted(image.size)
        long_side = int(spec.size * large / small)
        scaled = (spec.size, long_side) if image.width <= image.height else (long_side, spec.size)
        image = _resize(image, scaled)
        left, top = (image.width - spec.size) // 2, (image.height - spec.size) // 2
        return image.crop((left, top, left + spec.size, top + spec.size))
    return _resize(image, size)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
