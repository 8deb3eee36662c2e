"""Connectors: names, row counts, cell order on odd and non-square grids, VILA's and LLaVA's parameter names; merged rows."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmscale.config.schema import ImageDataConfig, TokenMergeConfig
from mmscale.config.specs import _STRIDES, connector_stride, grid_rows, media_specs, merged_rows
from mmscale.errors import ConfigError
from mmscale.kernels.downsample_norm import space_to_depth
from mmscale.model.composite import build_model
from mmscale.model.connectors.build import CONNECTORS, build_connector
from mmscale.model.connectors.token_merge import TokenMergeConnector, places, rows_by_round
from mmscale.model.convert import export_plan
from mmscale.model.description import describe
from mmscale.model.hub import MmscaleForConditionalGeneration
from mmscale.streaming.decode.tiling import image_layout

NAMES = [*(name for name in _STRIDES if name != "token_merge"), "mlp1x_gelu", "mlp2x_gelu", "mlp5x_gelu"]


def test_sizes_and_classes_know_the_same_names():
    assert {*CONNECTORS, "token_merge"} == set(_STRIDES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(4, 4), (5, 4), (1, 7), (6, 9)])
def test_rows_equal_the_planned_number(name, grid, seed):
    torch.manual_seed(seed)
    connector = build_connector(name, 6, 10)
    x = torch.randn(3, grid[0] * grid[1], 6, requires_grad=True)
    y = connector(x, grid)
    assert y.shape == (3, grid_rows(*grid, connector_stride(name)), 10)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None for p in connector.parameters())


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (3, 2), (1, 1)])
def test_space_to_depth_equals_a_plain_loop(stride, grid, seed):
    torch.manual_seed(seed)
    h, w = grid
    x = torch.randn(2, h * w, 3)
    y = space_to_depth(x, grid, stride)
    rows, columns = -(-h // stride), -(-w // stride)
    expected = torch.zeros(2, rows * columns, stride * stride * 3)
    for i in range(h):
        for j in range(w):
            cell, place = (i // stride) * columns + j // stride, (i % stride) * stride + j % stride
            expected[:, cell, place * 3 : place * 3 + 3] = x[:, i * w + j]
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", {"weight": (10, 6), "bias": (10,)}),
        ("mlp2x_gelu", {"0.weight": (10, 6), "0.bias": (10,), "2.weight": (10, 10), "2.bias": (10,)}),
        (
            "mlp_downsample",
            {
                **{
                    "layers.1.weight": (24,),
                    "layers.1.bias": (24,),
                    "layers.2.weight": (10, 24),
                    "layers.2.bias": (10,),
                },
                **{"layers.4.weight": (10, 10), "layers.4.bias": (10,)},
            },
        ),
        (
            "mlp_downsample_3x3_fix",
            {
                **{
                    "layers.1.weight": (54,),
                    "layers.1.bias": (54,),
                    "layers.2.weight": (18, 54),
                    "layers.2.bias": (18,),
                },
                **{
                    "layers.4.weight": (18,),
                    "layers.4.bias": (18,),
                    "layers.5.weight": (10, 18),
                    "layers.5.bias": (10,),
                },
                **{"layers.7.weight": (10, 10), "layers.7.bias": (10,)},
            },
        ),
        (
            "pixel_shuffle",
            {
                **{"0.weight": (24,), "0.bias": (24,), "1.weight": (10, 24), "1.bias": (10,)},
                **{"3.weight": (10, 10), "3.bias": (10,)},
            },
        ),
        (
            "patch_merger",
            {
                **{"ln_q.weight": (6,), "ln_q.bias": (6,), "mlp.0.weight": (24, 24), "mlp.0.bias": (24,)},
                **{"mlp.2.weight": (10, 24), "mlp.2.bias": (10,)},
            },
        ),
    ],
)
def test_parameter_names_and_shapes(name, shapes):
    assert {n: tuple(p.shape) for n, p in build_connector(name, 6, 10).named_parameters()} == shapes


def test_mlp_equals_its_formula(seed):
    torch.manual_seed(seed)
    connector, x = build_connector("mlp2x_gelu", 4, 5), torch.randn(1, 3, 4)
    p = dict(connector.named_parameters())
    expected = torch.nn.functional.gelu(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]
    torch.testing.assert_close(connector(x, (1, 3)), expected)


def randomise(module):
    """Parameters that are not the ones and zeros of a new norm."""
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


def test_downsampling_equals_vilas_formula(seed):
    """Fold with zeros at the end, LayerNorm over the cell, Linear, GELU, Linear: on an odd grid."""
    torch.manual_seed(seed)
    connector, x = randomise(build_connector("mlp_downsample", 4, 5)), torch.randn(2, 15, 4)
    p = {name.removeprefix("layers."): q for name, q in connector.named_parameters()}
    z = torch.nn.functional.layer_norm(space_to_depth(x, (3, 5), 2), (16,), p["1.weight"], p["1.bias"])
    z = torch.nn.functional.gelu(z @ p["2.weight"].T + p["2.bias"]) @ p["4.weight"].T + p["4.bias"]
    torch.testing.assert_close(connector(x, (3, 5)), z)


def test_pixel_shuffle_equals_internvl(seed):
    """Transformers' own projector behind its own shuffle, on a grid that is not square."""
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    torch.manual_seed(seed)
    config = SimpleNamespace(
        **{"vision_config": SimpleNamespace(hidden_size=6), "text_config": SimpleNamespace(hidden_size=10)},
        **{"downsample_ratio": 0.5, "projector_hidden_act": "gelu"},
    )
    theirs, connector = InternVLMultiModalProjector(config), randomise(build_connector("pixel_shuffle", 6, 10))
    names = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    ours = connector.state_dict()
    theirs.load_state_dict({f"{t}.{w}": ours[f"{o}.{w}"] for t, o in names.items() for w in ("weight", "bias")})
    x = torch.randn(3, 4 * 6, 6)
    shuffled = InternVLModel.pixel_shuffle(None, x.view(3, 4, 6, 6)).flatten(1, 2)
    torch.testing.assert_close(connector(x, (4, 6)), theirs(shuffled))


def test_patch_merger_equals_qwen2_vl(seed):
    """Transformers' own merger, which gets the patches of a cell one after the other; its parameters fit by name."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    torch.manual_seed(seed)
    theirs, connector = PatchMerger(dim=10, context_dim=6), randomise(build_connector("patch_merger", 6, 10))
    theirs.load_state_dict(connector.state_dict())
    x = torch.randn(2, 4 * 6, 6)
    cells = x.view(2, 2, 2, 3, 2, 6).transpose(2, 3).reshape(-1, 6)
    torch.testing.assert_close(connector(x, (4, 6)).flatten(0, 1), theirs(cells))


@pytest.mark.parametrize("name", ["mlp_downsample", "mlp_downsample_3x3", "pixel_shuffle", "patch_merger"])
def test_features_behind_a_class_token(name, seed):
    """A slice of the tower's output, as it comes, gives the same as its copy."""
    torch.manual_seed(seed)
    connector, x = build_connector(name, 6, 10), torch.randn(2, 1 + 15, 6)[:, 1:]
    assert torch.equal(connector(x, (3, 5)), connector(x.contiguous(), (3, 5)))


@pytest.mark.parametrize("name", ["mlp2x_relu", "mlp0x_gelu", "MLP2x_gelu", "xmlp2x_gelu", ""])
def test_unknown_names_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match="mlp_downsample_3x3"):
        build_connector(name, 4, 4)


@pytest.mark.parametrize("patches", [1, 2, 5, 16, 27, 64, 729])
def test_rounds_merge_at_most_a_third_and_end_where_asked(patches):
    for rows in range(1, patches + 1):
        counts = [patches, *rows_by_round(patches, rows)]
        assert counts[-1] == rows
        assert all(0 < before - after <= max(1, before // 3) for before, after in itertools.pairwise(counts))


def test_the_ratio_is_rounded_up_exactly():
    for ratio, patches, rows in ((0.5, 729, 365), (0.1, 30, 3), (0.7, 10, 7), (1.0, 16, 16), (0.001, 16, 1)):
        assert merged_rows(patches, TokenMergeConfig(ratio=ratio)) == rows
    assert merged_rows(16, TokenMergeConfig(tokens=5)) == 5


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 9, 20])
@pytest.mark.parametrize("num", [1, 3])
def test_token_merge_gives_the_planned_rows_and_gradients(rows, num, seed):
    torch.manual_seed(seed)
    connector = build_connector("token_merge", 6, 10, rows)
    x = torch.randn(num, 20, 6, requires_grad=True)
    y = connector(x, (4, 5))
    assert y.shape == (num, rows, 10)
    y.square().sum().backward()
    assert (x.grad.abs().sum(2) > 0).all(), "every patch is in some row"
    assert all(p.grad is not None for p in connector.parameters())
    assert list(connector.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"], "those of mlp2x_gelu"
    alone = torch.cat([connector(x[i : i + 1], (4, 5)) for i in range(num)])
    torch.testing.assert_close(y, alone)


@pytest.mark.parametrize("width", [7, 64])
def test_merged_rows_tell_where_they_were(width):
    """Every patch of a grid has a place of its own, and equal patches give different rows in different places."""
    table = places((3, 5), width, torch.device("cpu"))
    assert table.shape == (15, width) and len(table.unique(dim=0)) == 15 and table.abs().max() <= 1
    half = width // 4 * 2
    assert torch.equal(table[0:5, :half], table[0:1, :half].expand(5, -1)), "the first half tells the line alone"
    assert torch.equal(table[1::5, half:], table[1:2, half:].expand(3, -1)), "the second one the column"
    connector = TokenMergeConnector(width, 8, 10)
    rows = connector(torch.ones(1, 15, width), (3, 5))[0]
    assert len(rows.detach().unique(dim=0)) == 10
    merged = connector.merged(torch.ones(2, 15, width), table)
    torch.testing.assert_close((merged - 1).sum(1), table.sum(0).expand(2, -1), msg="the places in a row are added up")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_patches_merge_and_the_order_stays(dtype, seed):
    """Pairs of one feature each merge into it; what a row stands for does not depend on the rounds."""
    torch.manual_seed(seed)
    # directions far apart, so that no other pair is closer
    distinct = torch.linalg.qr(torch.randn(2, 16, 16))[0][:, :12] * torch.rand(2, 12, 1).add(1)
    x = distinct.repeat_interleave(2, dim=1).to(dtype)
    connector = TokenMergeConnector(16, 4, 12).to(dtype)
    nowhere = torch.zeros(24, 16, dtype=dtype)
    assert torch.equal(connector.merged(x, nowhere), distinct.to(dtype))
    one = TokenMergeConnector(16, 4, 1).to(dtype).merged(x, nowhere)
    torch.testing.assert_close(
        one[:, 0].double(), x.double().mean(1), atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0
    )


def test_matching_follows_autocast_and_rows_do_not(seed):
    torch.manual_seed(seed)
    connector, x, nowhere = TokenMergeConnector(16, 4, 12), torch.randn(2, 24, 16), torch.zeros(24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = connector.merged(x, nowhere)
        assert connector(x, (4, 6)).dtype == torch.bfloat16
    assert merged.dtype == torch.float32
    rounded = TokenMergeConnector(16, 4, 12).merged(x.bfloat16(), nowhere.bfloat16())
    assert torch.allclose(merged, rounded.float(), atol=0.05), "the same sets as from features in bf16"


def merging(tiny_config, part=(("ratio", 0.5),), **keys):
    """A tiny configuration with 16 patches per image."""
    keys = {"connector": "token_merge", "token_merge": part if part is None else dict(part), **keys}
    return tiny_config(vision={"image_size": 56}, vision_keys=keys, audio_keys={"connector": "mlp2x_gelu"})


def specs_of(config, **image):
    return media_specs(config.model, config.data.model_copy(update={"image": ImageDataConfig(**image)}))


@pytest.mark.parametrize(
    ("part", "rows"), [({"ratio": 0.5}, 8), ({"ratio": 0.3}, 5), ({"tokens": 3}, 3), ({"tokens": 16}, 16)]
)
def test_rows_are_known_from_the_configuration(part, rows, tiny_config, make_pack, seed):
    config = merging(tiny_config, part)
    specs = specs_of(config)
    assert (specs.image.tokens, specs.image.side) == (rows, 0)
    assert specs.rows_per_input("video") == rows
    assert image_layout(specs_of(config, mode="tiles").image, 200, 100).num_tokens % rows == 0
    flat = specs_of(config, mode="anyres", anyres={"merge": "flat"}).image
    assert image_layout(flat, 112, 56).num_tokens == 3 * rows
    model = build_model(config, 97, specs)
    assert model.vision.rows == rows
    pack = make_pack(specs, [[("text", 5), ("image", 1), ("video", 3), ("text", 4)], [("text", 3)]], seed)
    model(pack).backward()
    assert all(p.grad is not None for p in model.vision.parameters())
    model.zero_grad(set_to_none=True)
    model(make_pack(specs, [[("text", 9)]], seed)).backward()  # no image: one zero input, of which no row is used
    assert all(p.grad is not None and not p.grad.any() for p in model.vision.parameters())


@pytest.mark.parametrize(
    ("keys", "image", "text"),
    [
        ({"part": None}, {}, "found none"),
        ({"part": {}}, {}, "found none"),
        ({"part": {"ratio": 0.5, "tokens": 3}}, {}, "ratio=0.5 and tokens=3"),
        ({"part": {"tokens": 17}}, {}, "16 rows per image"),
        ({"connector": "mlp2x_gelu"}, {}, "belongs to model.vision.connector=token_merge"),
        ({}, {"mode": "anyres"}, "merged rows no longer form"),
        ({}, {"mode": "anyres", "anyres": {"merge": "spatial"}}, "set data.image.anyres.merge=flat"),
    ],
)
def test_settings_that_do_not_fit_are_refused(keys, image, text, tiny_config):
    with pytest.raises(ConfigError, match=text):
        specs_of(merging(tiny_config, **keys), **image)


def test_class_tokens_and_sound_are_refused(tiny_config):
    keys = {"connector": "token_merge", "token_merge": {"ratio": 0.5}, "select_feature": "cls_patch"}
    with pytest.raises(ConfigError, match="select_feature=patch"):
        specs_of(tiny_config(vision={"model_type": "clip_vision_model"}, vision_keys=keys))
    with pytest.raises(ConfigError, match="no grid"):
        specs_of(tiny_config(audio_keys={"connector": "token_merge"}))


def test_an_export_keeps_the_rows(tiny_config, make_pack, tmp_path, seed):
    config = merging(tiny_config)
    specs = specs_of(config)
    model = build_model(config, 97, specs).eval()
    described = describe(config.model, 97, specs, media_token_ids={"image": 90, "audio": 92}, template="plain")
    with pytest.raises(ConfigError, match="connector is token_merge, not mlp2x_gelu"):
        export_plan(described, "llava", drop=("audio",))
    assert export_plan(described, "auto").target == "mmscale"
    hub = MmscaleForConditionalGeneration(described)
    hub.load_state_dict(model.state_dict())
    hub.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["image_spec"]["tokens"] == 8
    opened = MmscaleForConditionalGeneration.from_pretrained(tmp_path).eval()
    pack = make_pack(specs, [[("text", 5), ("image", 1), ("text", 4)]], seed, vocab=90)
    ids = pack.input_ids.clone()
    ids[5:13] = 90
    with torch.no_grad():
        ours = model.logits(pack, torch.arange(pack.num_tokens))
        theirs = opened(input_ids=ids[None], pixel_values=pack.media["image"].data).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_recipe_trains_and_is_exported(demo_data, tmp_path):
    """Real images, clips and sound; the loss falls, and the rows that the data planned are those of the model."""
    from mmscale.config.load import load_config
    from mmscale.config.schema import ParallelConfig
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.consolidate import consolidate
    from mmscale.train.loop import train

    recipe, run = Path(__file__).parents[2] / "configs/recipes/digits_merged.yaml", tmp_path / "run"
    words = [
        *(
            "train.steps=12",
            "train.warmup_steps=2",
            "train.lr=2e-3",
            "data.seq_len=384",
            "data.window=64",
            "data.workers=0",
        ),
        *(
            "eval.every=0",
            "run.tensorboard=false",
            "run.log_every=1",
            "run.device=cpu",
            f"data.root={demo_data}",
            f"run.dir={run}",
        ),
    ]
    config = load_config(recipe, words)
    assert media_specs(config.model, config.data).image.tokens == 8
    train(config, init_mesh(ParallelConfig(), "cpu"))
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    export = consolidate(run, tmp_path / "export")
    assert json.loads((export.folder / "config.json").read_text())["vision_connector"] == "token_merge"
