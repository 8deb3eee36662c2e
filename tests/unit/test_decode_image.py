"""Pixels as those of the Hugging Face processors, with and without simplejpeg; every kind of picture becomes upright RGB,
damaged ones are refused."""

import contextlib
import resource
import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmscale.errors import BadSampleError
from mmscale.streaming.decode import image
from mmscale.streaming.decode.image import decode_image, open_pixels
from mmscale.streaming.media import probe
from mmscale.types import ImageSpec

LIMIT = 64_000_000


def encode(picture, format="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(data, size=2, **options):
    (one,) = decode_image(data, ImageSpec(size=size, tokens=1, **options), LIMIT)
    return one.permute(1, 2, 0).numpy()


def assert_as_pillow(ours, expected):
    """Equal on average; 8-bit bicubic by torch and by Pillow round a few values per thousand to the other side."""
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.02, (difference.max(), difference.mean())


@pytest.fixture
def without_simplejpeg(monkeypatch):
    """A machine without the extra `fast`."""
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    image._simplejpeg.cache_clear()
    yield
    image._simplejpeg.cache_clear()


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 32), (224, 224), (300, 7), (32, 32)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_resize_equals_the_siglip_processor(width, height, format, seed):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    data = encode(Image.fromarray(noise(seed, height, width, 3)), format)
    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, resample=Image.Resampling.BICUBIC, do_rescale=False, do_normalize=False
    )
    expected = processor(Image.open(BytesIO(data)).convert("RGB"), return_tensors="np")["pixel_values"][0]
    assert_as_pillow(decode_image(data, ImageSpec(size=32, tokens=1), LIMIT)[0].numpy(), expected)


@pytest.mark.parametrize(("width", "height"), [(50, 31), (31, 50), (40, 40)])
def test_square_equals_the_clip_processor(width, height, seed):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    data = encode(Image.fromarray(noise(seed, height, width, 3)))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False
    )
    expected = processor(Image.open(BytesIO(data)), return_tensors="np")["pixel_values"][0]
    assert_as_pillow(decode_image(data, ImageSpec(size=16, tokens=1, mode="square"), LIMIT)[0].numpy(), expected)


def test_the_width_is_scaled_first(seed):
    """Pillow 13 scales the height first where it shrinks much more; two calls force the order that ours always has."""
    for width, height in ((7, 300), (31, 50), (480, 640)):
        array = noise(seed, height, width, 3)
        expected = Image.fromarray(array).resize((64, height), Image.Resampling.BICUBIC)
        expected = expected.resize((64, 64), Image.Resampling.BICUBIC)
        assert_as_pillow(pixels(encode(Image.fromarray(array)), size=64), np.array(expected))


JPEGS = {
    **{f"subsampling {n}": {"subsampling": n} for n in (0, 1, 2)},
    **{"progressive": {"progressive": True}, "restarts": {"restart_marker_rows": 1}, "poor": {"quality": 5}},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 5), (16, 16), (33, 50), (241, 17)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_simplejpeg_gives_pillows_pixels(options, width, height, mode, seed):
    pytest.importorskip("simplejpeg")
    data = encode(Image.fromarray(noise(seed, height, width, 3)).convert(mode), "JPEG", **options)
    with Image.open(BytesIO(data)) as opened:
        assert image._decode_jpeg(data, opened) is not None, "the fast path is taken"
        assert (open_pixels(data, LIMIT) == np.array(opened.convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_turn_pictures_upright(orientation, seed, without_simplejpeg):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(noise(seed, 10, 20, 3)), "JPEG", exif=exif)
    slow = open_pixels(data, LIMIT)
    header = probe("jpg", data)
    assert slow.shape == (header.height, header.width, 3)
    sys.modules.pop("simplejpeg")
    image._simplejpeg.cache_clear()
    assert (open_pixels(data, LIMIT) == slow).all()
    assert (slow == np.array(ImageOps.exif_transpose(Image.open(BytesIO(data))))).all()


def test_cmyk_is_left_to_pillow():
    data = encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")
    with Image.open(BytesIO(data)) as opened:
        assert image._decode_jpeg(data, opened) is None


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
    for picture in (Image.fromarray(grey), Image.fromarray(grey).convert("1"), Image.fromarray(rgb).convert("P")):
        assert (pixels(encode(picture)) == rgb).all(), picture.mode


def test_sixteen_bits_keep_the_high_byte():
    picture = Image.fromarray(np.array([[0, 65535], [0x7FFF, 0x80FF]], np.uint16))
    assert pixels(encode(picture))[..., 0].tolist() == [[0, 255], [0x7F, 0x80]]


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
    picture = Image.merge("CMYK", [Image.new("L", (16, 16), v) for v in (255, 0, 0, 0)])  # cyan
    out = pixels(encode(picture, "JPEG", quality=100), size=16).astype(int)
    assert (abs(out - (0, 255, 255)) <= 4).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    picture = Image.fromarray(noise(3, 8, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture, "PNG", exif=exif)
    assert (pixels(data, size=8) == np.array(ImageOps.exif_transpose(Image.open(BytesIO(data))))).all()
    if orientation == 6:
        assert (pixels(data, size=8) == np.rot90(np.array(picture), -1)).all()


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


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [(9_000, 9_000, "image_size"), (65_500, 1, "image_size"), (900, 700, "decode_image")],
)
def test_a_jpeg_whose_header_lies_is_refused(width, height, reason):
    data = bytearray(encode(Image.new("RGB", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSampleError) as error:
        pixels(bytes(data))
    assert error.value.reason == reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_cut_off_picture_is_refused(format, share, seed):
    data = encode(Image.fromarray(noise(seed, 64, 64, 3)), format)
    with pytest.raises(BadSampleError) as error:
        pixels(data[: int(len(data) * share)])
    assert error.value.reason == "decode_image"
    pixels(data)


def test_half_a_jpeg_with_an_end_mark_is_refused(seed):
    pytest.importorskip("simplejpeg")
    data = encode(Image.fromarray(noise(seed, 64, 64, 3)), "JPEG")
    with pytest.raises(BadSampleError, match="premature end"):
        open_pixels(data[: len(data) // 2] + data[-2:], LIMIT)


def test_bytes_too_many_in_a_jpeg_are_skipped_as_by_pillow(seed):
    data = encode(Image.fromarray(noise(seed, 20, 20, 3)), "JPEG")
    odd = data[:-2] + b"\0\1\2" + data[-2:] + b"behind"
    assert (open_pixels(odd, LIMIT) == open_pixels(data, LIMIT)).all()


def test_half_a_jpeg_is_refused_without_simplejpeg_too(seed, without_simplejpeg):
    data = encode(Image.fromarray(noise(seed, 64, 64, 3)), "JPEG")
    whole = open_pixels(data, LIMIT)
    for cut in (3, 4, len(data) // 2):
        with pytest.raises(BadSampleError, match="decode_image"):
            open_pixels(data[:-cut], LIMIT)
    for cut in (1, 2):  # of the end mark: Pillow takes some of them, and then every pixel is there
        try:
            assert (open_pixels(data[:-cut], LIMIT) == whole).all()
        except BadSampleError as error:
            assert error.reason == "decode_image"


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
