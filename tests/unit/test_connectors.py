"""Connectors: names, row counts, cell order on odd and non-square grids, VILA's and LLaVA's parameter names."""

import pytest
import torch

from mmscale.config.specs import _STRIDES, connector_stride, grid_rows
from mmscale.errors import ConfigError
from mmscale.model.connectors.build import CONNECTORS, SpaceToDepth, build_connector

NAMES = [*_STRIDES, "mlp1x_gelu", "mlp2x_gelu", "mlp5x_gelu"]


def test_sizes_and_classes_know_the_same_names():
    assert set(CONNECTORS) == set(_STRIDES)


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
    y = SpaceToDepth(stride)(x, grid)
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


@pytest.mark.parametrize("name", ["mlp2x_relu", "mlp0x_gelu", "MLP2x_gelu", "xmlp2x_gelu", ""])
def test_unknown_names_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match="mlp_downsample_3x3"):
        build_connector(name, 4, 4)
