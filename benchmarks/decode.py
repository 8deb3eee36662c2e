"""From a JPEG file to the pixels of a tower input, against Pillow."""

from __future__ import annotations

import io
import time

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.result import Result, Settings, interleaved
from mmscale.streaming.decode.image import decode_image
from mmscale.types import ImageSpec

PHOTOS, ROUNDS, SIDE = 16, 15, 224
SPEC = ImageSpec(size=SIDE, tokens=1)


def decode224_ratio(settings: Settings) -> Result:
    """Images per second and core of ours over Pillow: a 640 x 480 JPEG of quality 90 to 224 x 224 pixels in a tensor."""
    photos = [_photo(seed) for seed in range(PHOTOS)]
    by_pillow, ours = [_by_pillow(p) for p in photos], [_ours(p) for p in photos]
    difference = (torch.stack(ours).int() - torch.stack(by_pillow).int()).abs().double()
    mean, most, share = difference.mean(), difference.max(), (difference > 0).double().mean()
    # 0.00 of 255 levels; where weights of 16 and of 22 bits round to different sides, single values differ by 1.
    assert mean < 0.005 and most <= 2, f"pixels differ from Pillow's by {mean:.4f} on average, {most:.0f} at most"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pillow_s, ours_s = interleaved(
            [lambda: [_by_pillow(p) for p in photos], lambda: [_ours(p) for p in photos]], ROUNDS, time.process_time
        )
    finally:
        torch.set_num_threads(threads)
    pillow_per_s, ours_per_s = (PHOTOS / min(seconds) for seconds in (pillow_s, ours_s))  # the rounds nobody disturbed
    peer = (
        f"Pillow {pillow_per_s:.0f} images/s per core, ours {ours_per_s:.0f}; mean difference {mean:.4f} of 255, "
        f"{share:.2%} of the values differ, by {most:.0f} at most"
    )
    return Result("decode224_ratio", ours_per_s / pillow_per_s, "x", ">= 2.5", peer)


def _ours(data: bytes) -> torch.Tensor:
    return decode_image(data, SPEC, 64_000_000)[0]


def _by_pillow(data: bytes) -> torch.Tensor:
    """What most loaders do: Pillow decodes and resizes, numpy carries the pixels over."""
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _photo(seed: int) -> bytes:
    """A JPEG file with detail of every size, as a photograph has."""
    rng = np.random.default_rng(seed)
    picture: NDArray[np.float64] = np.zeros((480, 640, 3))
    for step, weight in ((64, 0.55), (16, 0.25), (4, 0.12), (1, 0.08)):
        coarse = Image.fromarray(rng.integers(0, 256, (480 // step, 640 // step, 3), dtype=np.uint8))
        picture += weight * np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.float64)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
