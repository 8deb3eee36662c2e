"""How many inputs and tokens an image gives and in which order, by hand-made tables and against Hugging Face's code."""

import numpy as np
import pytest
import torch

from mmscale.streaming.decode.resize import to_inputs, to_square
from mmscale.streaming.decode.tiling import NEWLINE, best_grid, fitted_size, image_layout, tile_grid
from mmscale.types import ImageSpec

S = 28
PINPOINTS = ((S, 2 * S), (2 * S, S), (2 * S, 2 * S), (3 * S, S), (S, 3 * S))


def tiles(size=448, **options):
    return ImageSpec(size=size, tokens=4, side=2, mode="tiles", **options)


def anyres(merge="spatial_unpad", side=2, grids=PINPOINTS, size=S):
    return ImageSpec(size=size, tokens=side * side, side=side, mode="anyres", grids=grids, merge=merge)


def random_sizes(seed, count=200):
    rng = np.random.default_rng(seed)
    return [tuple(int(v) for v in np.exp(rng.uniform(0, np.log(3000), 2)).astype(int)) for _ in range(count)]


def coloured(width, height):
    """A picture whose red says the column and whose green says the line, in 16 steps each."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0] = (np.arange(width) * 16 // width * 16)[None]
    picture[..., 1] = (np.arange(height) * 16 // height * 16)[:, None]
    return picture


@pytest.mark.parametrize(
    ("width", "height", "options", "grid"),
    [
        (448, 448, {}, (1, 1)),
        (100, 100, {}, (1, 1)),  # equally close to 2x2 and 3x3, too small for them
        (640, 640, {}, (2, 2)),  # 409,600 pixels are more than half of 4 * 448 * 448 = 802,816
        (633, 633, {}, (1, 1)),  # 400,689 are not
        (1000, 1000, {}, (3, 3)),  # more than half of 9 tiles, too
        (1000, 1000, {"max_tiles": 4}, (2, 2)),
        (800, 400, {}, (2, 1)),
        (1300, 650, {}, (4, 2)),  # 845,000 > half of 8 tiles = 802,816
        (400, 800, {}, (1, 2)),
        (1200, 100, {}, (12, 1)),
        (100, 5000, {}, (1, 12)),
        (1024, 768, {}, (4, 3)),
        (300, 200, {}, (3, 2)),
        (500, 300, {"max_tiles": 6}, (3, 2)),  # 1.667: 3/2 is 0.167 away, 2/1 is 0.333
        (100, 100, {"min_tiles": 2}, (2, 2)),  # the first grid of distance 0
        (100, 100, {"min_tiles": 2, "max_tiles": 3}, (1, 2)),  # 1x2 is 0.5 away, 2x1 is 1, 1x3 and 3x1 are further
        (175, 100, {"max_tiles": 2}, (2, 1)),
        (150, 100, {"max_tiles": 2}, (1, 1)),  # 1 and 2 are equally far; fewer tiles for a small picture
        (900, 600, {"max_tiles": 2}, (2, 1)),  # and more for a large one
    ],
)
def test_tile_grids(width, height, options, grid):
    assert tile_grid(tiles(**options), width, height) == grid


def test_tiles_give_whole_inputs_and_a_thumbnail():
    assert image_layout(tiles(), 800, 400) == image_layout(tiles(), 1600, 800).__class__(3, 12, None)
    for options, inputs in (({}, 5), ({"thumbnail": False}, 4)):
        layout = image_layout(tiles(**options, max_tiles=4), 1000, 1000)
        assert (layout.num_inputs, layout.num_tokens, layout.rows) == (inputs, 4 * inputs, None)
    assert image_layout(tiles(), 448, 448).num_inputs == 1, "one tile is its own thumbnail"


@pytest.mark.parametrize("mode", ["resize", "square", "pad"])
def test_one_input_in_the_other_modes(mode):
    layout = image_layout(ImageSpec(size=8, tokens=6, mode=mode), 200, 100)
    assert (layout.num_inputs, layout.num_tokens, layout.rows) == (1, 6, None)


def test_tiles_are_cut_line_by_line():
    spec = tiles(size=8, max_tiles=6)
    inputs = to_inputs(coloured(96, 64), spec)
    assert inputs.shape == (7, 3, 8, 8) and inputs.dtype == torch.uint8
    centre = inputs[:, :2, 4, 4].tolist()
    assert [red // 85 for red, _ in centre[:6]] == [0, 1, 2, 0, 1, 2]
    assert [green // 128 for _, green in centre[:6]] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(inputs[6], to_square(coloured(96, 64), ImageSpec(size=8, tokens=1)))


def test_pixels_have_the_planned_number_of_inputs(seed):
    for width, height in random_sizes(seed, 40):
        picture = np.zeros((height, width, 3), np.uint8)
        for spec in (tiles(size=8), anyres(size=8, grids=((8, 16), (24, 8)))):
            assert to_inputs(picture, spec).shape == (image_layout(spec, width, height).num_inputs, 3, 8, 8)


def test_rows_by_hand():
    # One line of two tiles with 2 x 2 rows each: the base image has rows 0-3, the tiles 4-7 and 8-11.
    wide = ((S, 2 * S),)
    assert image_layout(anyres("flat", grids=wide), 56, 28).num_tokens == 12
    assert image_layout(anyres("flat", grids=wide), 56, 28).rows is None
    spatial = image_layout(anyres("spatial", grids=wide), 56, 28).rows
    assert spatial.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]
    unpadded = image_layout(anyres(grids=wide), 56, 28).rows
    assert unpadded.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    # A square picture in the wide grid: a column of padding goes on either side.
    assert image_layout(anyres(grids=wide), 28, 28).rows.tolist() == [0, 1, 2, 3, 5, 8, NEWLINE, 7, 10, NEWLINE]
    # Nothing is left of a picture that is thinner than half a row.
    assert image_layout(anyres(grids=wide), 2000, 10).rows.tolist() == [0, 1, 2, 3]


def test_the_same_layout_is_not_computed_twice_and_cannot_be_changed():
    layout = image_layout(anyres(), 300, 200)
    assert image_layout(anyres(), 300, 200) is layout
    with pytest.raises(ValueError, match="read-only"):
        layout.rows[0] = 7


def test_layouts_equal_transformers(seed):
    """Grid, fitted size, number of inputs, tokens and order, for the packing code of LLaVA-NeXT itself."""
    from types import SimpleNamespace

    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

    grids = [list(grid) for grid in PINPOINTS]
    vision = SimpleNamespace(image_size=S, patch_size=S // 4)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=grids))
    spec = anyres(side=4)
    for width, height in random_sizes(seed):
        if max(width, height) > 200 * min(width, height):
            continue  # refused before it gets here
        grid = select_best_resolution((height, width), grids)
        if grid is None:
            continue  # so thin that nothing is left of it in any grid, where transformers fails
        assert best_grid(PINPOINTS, width, height) == grid
        size = get_patch_output_size(np.empty((3, height, width)), grid, "channels_first")
        assert fitted_size(grid, width, height) == size[::-1]
        inputs = image_size_to_num_patches((height, width), grids, S)
        rows = torch.arange(inputs * 16, dtype=torch.float64).view(inputs, 16, 1)
        newline = torch.tensor([NEWLINE], dtype=torch.float64)
        (packed,), _ = LlavaNextModel.pack_image_features(model, [rows], [(height, width)], "full", newline)
        layout = image_layout(spec, width, height)
        assert (layout.num_inputs, layout.num_tokens) == (inputs, len(packed)), (width, height)
        assert layout.rows.tolist() == packed.flatten().tolist(), (width, height)


@pytest.mark.parametrize(
    ("width", "height"), [(40, 30), (300, 200), (200, 300), (57, 56), (500, 11), (9, 400), (28, 28)]
)
def test_anyres_pixels_equal_transformers(width, height, seed):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": S}, crop_size={"height": S, "width": S}, do_rescale=False, do_normalize=False,
        image_grid_pinpoints=[list(grid) for grid in PINPOINTS],
    )  # fmt: skip
    expected = processor(picture, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    ours = to_inputs(picture, anyres()).numpy()
    assert ours.shape == expected.shape and (ours == expected).all()
