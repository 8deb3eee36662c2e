"""Which tower inputs an image becomes and in which order their connector rows stand, from its size alone.

Pure functions of an `ImageSpec` and the width and height of the upright picture. P connector rows per tower input, in a grid
of `spec.side` x `spec.side` where order matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmscale.types import ImageSpec

NEWLINE = -1
"""The value in `ImageLayout.rows` of a position that holds a newline token and no connector row."""


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """An image in the token sequence: `num_inputs` tower inputs, `num_tokens` positions.

    `rows` int64 [num_tokens], read-only: which of the `num_inputs * P` connector rows stands at each position, or `NEWLINE`;
    None = all rows in order.
    """

    num_inputs: int
    num_tokens: int
    rows: NDArray[np.int64] | None = None


@lru_cache(maxsize=512)  # the pictures of a dataset have few sizes
def image_layout(spec: ImageSpec, width: int, height: int) -> ImageLayout:
    """The layout of a picture of `width` x `height` pixels as displayed, each at least 1.

    Example:
        >>> image_layout(ImageSpec(size=4, tokens=1, side=1, mode="anyres", grids=((4, 8),)), 9, 4).rows.tolist()
        [0, 1, 2, -1]
    """
    if spec.mode == "tiles":
        columns, lines = tile_grid(spec, width, height)
        inputs = columns * lines + (spec.thumbnail and columns * lines > 1)
        return ImageLayout(inputs, inputs * spec.tokens)
    if spec.mode == "anyres":
        grid_height, grid_width = best_grid(spec.grids, width, height)
        lines, columns = grid_height // spec.size, grid_width // spec.size
        inputs = 1 + lines * columns
        if spec.merge == "flat":
            return ImageLayout(inputs, inputs * spec.tokens)
        rows = _anyres_rows(spec, lines, columns, width, height)
        rows.setflags(write=False)
        return ImageLayout(inputs, len(rows), rows)
    return ImageLayout(1, spec.tokens)


def tile_grid(spec: ImageSpec, width: int, height: int) -> tuple[int, int]:
    """Columns and lines of tiles in mode `tiles`, by InternVL's rule.

    Among all grids of `min_tiles` to `max_tiles` tiles, fewest tiles first, then fewest columns, the first one closest to the
    picture's aspect ratio. A later grid that is equally close wins when the picture has more than half of its pixels.

    Example:
        >>> tile_grid(ImageSpec(size=448, tokens=1, mode="tiles"), 800, 400)
        (2, 1)
    """
    aspect, area = width / height, width * height
    best, least = (1, 1), math.inf
    for columns, lines in _grids(spec.min_tiles, spec.max_tiles):
        distance = abs(aspect - columns / lines)
        is_large = 2 * area > spec.size**2 * columns * lines
        if distance < least or (distance == least and is_large):
            best, least = (columns, lines), distance
    return best


@lru_cache(maxsize=16)
def _grids(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if i * j >= fewest]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def best_grid(grids: Sequence[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
    """The one of `grids`, (height, width) in pixels, in which the picture keeps most of its pixels and wastes least.

    The arithmetic is that of LLaVA-NeXT, roundings included; the first of equals wins.

    Example:
        >>> best_grid([(336, 672), (672, 336), (672, 672)], width=1000, height=400)
        (336, 672)
    """

    def quality(grid: tuple[int, int]) -> tuple[int, int]:
        grid_height, grid_width = grid
        scale = min(grid_width / width, grid_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid_height * grid_width

    return max(grids, key=quality)


def fitted_size(grid: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """(width, height) of the picture scaled into `grid` (height, width), its aspect kept, as LLaVA-NeXT rounds it."""
    grid_height, grid_width = grid
    scale_x, scale_y = grid_width / width, grid_height / height
    if scale_x < scale_y:
        return grid_width, min(math.ceil(height * scale_x), grid_height)
    return min(math.ceil(width * scale_y), grid_width), grid_height


def _anyres_rows(spec: ImageSpec, lines: int, columns: int, width: int, height: int) -> NDArray[np.int64]:
    """The rows of the base image, then line by line those of the whole picture that its tiles make up."""
    side = spec.side
    tile = 1 + np.arange(lines * columns).reshape(lines, 1, columns, 1)
    within = np.arange(side * side).reshape(1, side, 1, side)
    picture = (tile * spec.tokens + within).reshape(lines * side, columns * side)
    if spec.merge == "spatial_unpad":
        picture = _without_padding(picture, width, height)
        picture = np.hstack([picture, np.full((len(picture), 1), NEWLINE)])
    return np.concatenate([np.arange(spec.tokens), picture.ravel()])


def _without_padding(picture: NDArray[np.int64], width: int, height: int) -> NDArray[np.int64]:
    """The lines or columns that hold the picture and not its padding, with LLaVA-NeXT's rounding (possibly none)."""
    lines, columns = picture.shape
    if width / height > columns / lines:
        cut = (lines - int(round(height * (columns / width), 7))) // 2
        return picture[cut : lines - cut]
    cut = (columns - int(round(width * (lines / height), 7))) // 2
    return picture[:, cut : columns - cut]
