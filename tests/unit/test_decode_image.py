"""Pixels equal to the Hugging Face processors', every kind of picture becomes upright RGB, damaged ones are refused."""

import contextlib
import resource
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mmscale.errors import BadSampleError
from mmscale.streaming.decode.image import decode_image
from mmscale.types import ImageSpec

LIMIT = 64_000_000


def encode(image, format="PNG", **options):
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(data, size=2, **options):
    return decode_image(data, ImageSpec(size=size, tokens=1, **options), LIMIT).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (224, 224), (300, 7)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_resize_equals_the_siglip_processor(width, height, format, seed):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    data = encode(Image.fromarray(noise(seed, height, width, 3)), format)
    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, resample=Image.Resampling.BICUBIC, do_rescale=False, do_normalize=False
    )
    expected = processor(Image.open(BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]
    ours = decode_image(data, ImageSpec(size=32, tokens=1), LIMIT).numpy()
    assert ours.dtype == np.uint8 and (ours == expected).all()


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (40, 40)])
def test_square_equals_the_clip_processor(width, height, seed):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    data = encode(Image.fromarray(noise(seed, height, width, 3)))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False
    )
    expected = processor(Image.open(BytesIO(data)), return_tensors="np")["pixel_values"][0]
    assert (decode_image(data, ImageSpec(size=16, tokens=1, mode="square"), LIMIT).numpy() == expected).all()


def test_pad_puts_the_picture_in_the_middle():
    data = encode(Image.fromarray(np.full((2, 6, 3), 200, np.uint8)))
    out = pixels(data, size=6, mode="pad", fill=(1, 2, 3))
    assert (out[2:4] == 200).all() and (out[:2] == (1, 2, 3)).all() and (out[4:] == (1, 2, 3)).all()


@pytest.mark.parametrize("mode", ["resize", "square", "pad"])
def test_a_picture_of_the_right_size_keeps_its_pixels(mode, seed):
    array = noise(seed, 9, 9, 3)
    assert (pixels(encode(Image.fromarray(array)), size=9, mode=mode) == array).all()


def test_grey_palette_and_one_bit_become_rgb():
    grey = np.array([[0, 255], [255, 0]], np.uint8)
    rgb = np.repeat(grey[..., None], 3, axis=2)
    for image in (Image.fromarray(grey), Image.fromarray(grey).convert("1"), Image.fromarray(rgb).convert("P")):
        assert (pixels(encode(image)) == rgb).all(), image.mode


def test_sixteen_bits_keep_the_high_byte():
    image = Image.fromarray(np.array([[0, 65535], [0x7FFF, 0x80FF]], np.uint16))
    assert pixels(encode(image))[..., 0].tolist() == [[0, 255], [0x7F, 0x80]]


def test_transparency_is_laid_over_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0] = (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128)
    out = pixels(encode(Image.fromarray(rgba)))
    assert out[0, 0].tolist() == [10, 20, 30] and out[0, 1].tolist() == [255] * 3
    assert abs(int(out[1, 0, 0]) - 127) <= 1
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 7, 8, 9])
    assert (pixels(encode(palette, transparency=1)) == 255).all()
    assert (pixels(encode(palette)) == (7, 8, 9)).all()


def test_cmyk_becomes_rgb():
    image = Image.merge("CMYK", [Image.new("L", (16, 16), v) for v in (255, 0, 0, 0)])  # cyan
    out = pixels(encode(image, "JPEG", quality=100), size=16).astype(int)
    assert (abs(out - (0, 255, 255)) <= 4).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    image = Image.fromarray(noise(3, 8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "PNG", exif=exif)
    assert (pixels(data, size=8) == np.array(ImageOps.exif_transpose(Image.open(BytesIO(data))))).all()
    if orientation == 6:
        assert (pixels(data, size=8) == np.rot90(np.array(image), -1)).all()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (pixels(data, size=4) == (255, 0, 0)).all()


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = zlib.compress(bytes(1000))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(14_000, 14_000), (8001, 8000), (40_000, 2), (1000, 2)])
def test_bombs_are_refused_by_their_header(width, height):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSampleError) as error:
        pixels(png_header(width, height))
    assert error.value.reason in ("image_size", "decode_image")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_cut_off_picture_is_refused(format, share, seed):
    data = encode(Image.fromarray(noise(seed, 64, 64, 3)), format)
    with pytest.raises(BadSampleError) as error:
        pixels(data[: int(len(data) * share)])
    assert error.value.reason == "decode_image"
    pixels(data)


def test_other_formats_are_refused_whatever_their_name():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for data in (
        eps,
        encode(Image.new("RGB", (4, 4)), "GIF"),
        encode(Image.new("RGB", (4, 4)), "BMP"),
        b"",
        b"\0" * 99,
    ):
        with pytest.raises(BadSampleError) as error:
            pixels(data)
        assert error.value.reason == "decode_image"


def test_damaged_bytes_never_give_another_error(seed):
    rng = np.random.default_rng(seed)
    for format in ("JPEG", "PNG", "WEBP"):
        whole = encode(Image.fromarray(noise(seed, 24, 24, 3)), format)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(256)
            with contextlib.suppress(BadSampleError):
                assert pixels(bytes(data)).shape == (2, 2, 3)
