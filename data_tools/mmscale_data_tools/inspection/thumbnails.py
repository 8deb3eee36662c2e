"""Small pictures of media: of tower inputs as a model sees them, and boxes with a label for what has no picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import ImageDraw, ImageFont
from PIL.Image import Image, Resampling, fromarray, new

from mmscale.types import Modality

if TYPE_CHECKING:
    import torch

MAX_INPUTS = 6
"""Frames, tiles or windows of one item that are shown side by side."""

FONT_SIZE = 12


def input_strip(modality: Modality, inputs: torch.Tensor, side: int) -> Image:
    """The tower inputs of one item side by side, `side` pixels high: pictures as they are, sound as a spectrogram or wave.

    Args:
        modality: of the item.
        inputs: [inputs, ...] as `MediaBatch.data`.
        side: height, and width of each input.
    """
    shown = inputs[:MAX_INPUTS].numpy()
    strip = new("RGB", ((side + 2) * len(shown) - 2, side), "white")
    for i, pixels in enumerate(_pictures(modality, shown)):
        scaled = fromarray(pixels).resize((side, side), Resampling.BICUBIC)
        strip.paste(scaled.convert("RGB"), ((side + 2) * i, 0))
    return strip


def _pictures(modality: Modality, inputs: np.ndarray) -> list[np.ndarray]:
    """Each input as uint8 [height, width, 3] or [height, width]."""
    if modality != "audio":
        return [frame.transpose(1, 2, 0) for frame in inputs]
    return [_wave(window) if window.ndim == 1 else _scaled(window[::-1]) for window in inputs]


def _scaled(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return ((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)


def _wave(window: np.ndarray, side: int = 128) -> np.ndarray:
    """A curve of the loudness around a middle line."""
    peaks = np.array([np.abs(part).max(initial=0.0) for part in np.array_split(window, side)])
    height = peaks / max(float(peaks.max()), 1e-9) * side / 2
    distance = np.abs(np.arange(side) - side / 2)[:, None]
    return np.where(distance <= height[None, :], 90, 240).astype(np.uint8)


def label_box(text: str, side: int) -> Image:
    """A box with a few short lines."""
    box = new("RGB", (side, side), (225, 235, 225))
    ImageDraw.Draw(box).multiline_text((6, 6), text, fill="black", font=ImageFont.load_default(FONT_SIZE))
    return box
