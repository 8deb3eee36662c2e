"""Video bytes to the chosen frames of a clip, each prepared like an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmscale.errors import BadSampleError
from mmscale.streaming.containers import (
    MAX_FRAMES,
    STILL_CODECS,
    Packet,
    RgbConverter,
    VideoFile,
    display_order,
    mux_pictures,
    open_video,
)
from mmscale.streaming.decode.image import check_image_size, open_pixels
from mmscale.streaming.decode.resize import to_square
from mmscale.streaming.media import Lengths
from mmscale.types import ImageSpec, VideoSpec

# F frames, S side of the tower input

_MAX_STILL_PIXELS = 64_000_000

FRAMES_EXT = "mp4"
"""Extension of the files that `mux_frames` makes."""

BLACK = -1
"""A black frame among the indices of mode `history`."""


def decode_video(data: bytes, spec: VideoSpec, image: ImageSpec, max_pixels: int) -> torch.Tensor:
    """The chosen frames of a clip, uint8 [F, 3, S, S]; F is what `planned_frames` says.

    Frames are turned upright and become squares as images do (those of `tiles` and `anyres` are stretched). Only they are
    converted to RGB, and only what they need is decoded.

    Raises:
        BadSampleError: `decode_video`, another format, damaged or cut off; `image_size` and `video_size`, refused before any
            frame is decoded; `decode_image`, a damaged picture in a file of `mux_frames`.
    """
    with open_video(BytesIO(data), max_pixels) as video:
        packets = list(video.packets())
        header = Lengths(**video.header(packets)._asdict())
        check_image_size(header.width, header.height, max_pixels)
        planned = planned_frames(header, spec)
        shown = display_order(packets)
        if len(shown) != header.frames:
            raise BadSampleError("decode_video", f"cut off: {len(shown)} of {header.frames} frames are there")
        keyframes = [i for i, packet in enumerate(shown) if packet.is_keyframe]
        indices = frame_indices(header.frames, header.fps_milli, keyframes, spec)
        wanted = [shown[i] for i in indices if i != BLACK]
        black = [torch.zeros(3, image.size, image.size, dtype=torch.uint8)] * (planned - len(wanted))
        pictures = _pictures(video, packets, wanted, max_pixels)
        return torch.stack(black + [to_square(picture, image) for picture in pictures])


def _pictures(
    video: VideoFile, packets: Sequence[Packet], wanted: Sequence[Packet], max_pixels: int
) -> Iterator[NDArray[np.uint8]]:
    """The upright RGB pictures of the wanted packets, uint8 [height, width, 3], each of any size."""
    if video.codec in STILL_CODECS:  # every packet is a picture file: the same pixels as from that file
        yield from (open_pixels(bytes(packet), max_pixels) for packet in wanted)
        return
    convert = RgbConverter()
    for frame in video.frames(packets, wanted):
        check_image_size(frame.width, frame.height, max_pixels)
        yield convert(frame)


def planned_frames(header: Lengths, spec: VideoSpec) -> int:
    """The number of frames that `decode_video` gives for a clip with this header.

    Raises:
        BadSampleError: `decode_video`, the header could not be read; `video_size`, too many frames or too long.
    """
    if not (header.frames and header.width):
        raise BadSampleError("decode_video", "the header cannot be read, or the clip is empty")
    seconds = header.frames * 1000 / header.fps_milli if header.fps_milli else 0.0
    if header.frames > MAX_FRAMES or seconds > spec.max_s:
        found = f"{header.frames} frames, {seconds:.1f} s"
        raise BadSampleError("video_size", f"{found}, expected at most {MAX_FRAMES} frames and {spec.max_s} s")
    if spec.mode == "keyframes" and not header.keyframes:
        raise BadSampleError("decode_video", "expected keyframes, found none")
    return len(frame_indices(header.frames, header.fps_milli, range(header.keyframes), spec))


def frame_indices(num_frames: int, fps_milli: int, keyframes: Sequence[int], spec: VideoSpec) -> list[int]:
    """Which frames of a clip are taken, ascending.

    `uniform`: `spec.frames` indices evenly over [0, num_frames - 1], both ends included, rounded to the nearest (a half to
    the even one); shorter clips give every frame once. `fps`: the frames at 0, 1 / fps, 2 / fps ... s over the whole clip, at
    the clip's mean rate; when these are more than `spec.frames`, more than there are, or the rate is unknown, `uniform`.
    `keyframes`: `uniform` among the keyframes. `history`: `spec.frames - 1` indices evenly from the past, rounded down, and
    the last frame; shorter clips begin with black frames (`BLACK`).

    Args:
        num_frames: frames of the clip.
        fps_milli: frames per 1000 s, 0 = unknown.
        keyframes: positions of the frames that decode without others, for mode `keyframes`.
        spec: which are wanted.

    Example:
        >>> frame_indices(20, 0, (), VideoSpec(frames=8, mode="history"))
        [0, 2, 5, 8, 10, 13, 16, 19]
    """
    if spec.mode == "history":
        if num_frames < spec.frames:
            return [BLACK] * (spec.frames - num_frames) + list(range(num_frames))
        past = spec.frames - 1
        return [i * (num_frames - 1) // past for i in range(past)] + [num_frames - 1]
    if spec.mode == "keyframes":
        return [keyframes[i] for i in _evenly(len(keyframes), spec.frames)]
    if spec.mode == "fps" and fps_milli:
        step = Fraction(fps_milli, max(1, round(spec.fps * 1000)))
        count = max(1, round(num_frames / step))  # to the nearest: time stamps are rounded too
        if step >= 1 and count <= spec.frames:
            return [int(i * step) for i in range(count)]
    return _evenly(num_frames, spec.frames)


def _evenly(num_items: int, count: int) -> list[int]:
    """`min(count, num_items)` different indices from the first to the last item; the first when only one is wanted."""
    if count >= num_items:
        return list(range(num_items))
    return [round(Fraction(i * (num_items - 1), max(1, count - 1))) for i in range(count)]


def mux_frames(frames: Sequence[bytes], fps: float = 1.0) -> bytes:
    """One video file (`FRAMES_EXT`) of separate pictures, from which `decode_video` takes exactly the pixels of each.

    JPEG files, or PNG files, go in unchanged; a mixture and WebP become PNG, which loses nothing.

    Args:
        frames: JPEG, PNG or WebP files in order; their sizes may differ.
        fps: frames per second that the clip claims.

    Raises:
        BadSampleError: `decode_video`, no frame at all; as `open_pixels`, for a picture that cannot be read.
    """
    if not frames:
        raise BadSampleError("decode_video", "expected at least one frame, found none")
    codecs = {_still_codec(frame) for frame in frames}
    codec = codecs.pop() if len(codecs) == 1 else None
    pictures = list(frames) if codec else [_as_png(frame) for frame in frames]
    height, width, _ = open_pixels(pictures[0], _MAX_STILL_PIXELS).shape
    return mux_pictures(pictures, codec or "png", (width, height), Fraction(fps).limit_denominator(1000))


def _still_codec(picture: bytes) -> str | None:
    if picture[:3] == b"\xff\xd8\xff":
        return "mjpeg"
    return "png" if picture[:8] == b"\x89PNG\r\n\x1a\n" else None


def _as_png(picture: bytes) -> bytes:
    buffer = BytesIO()
    Image.fromarray(open_pixels(picture, _MAX_STILL_PIXELS)).save(buffer, "PNG")
    return buffer.getvalue()
