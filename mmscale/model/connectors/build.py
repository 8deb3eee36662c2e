"""Connectors: from tower features to rows of the language model's width.

Every connector takes features [N, P, C] of a grid (h, w), P = h * w, and gives [N, rows, D].
Shapes: N tower inputs, P patches, C tower width, D language-model width, K patches per side that become one row.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from mmscale.config.specs import connector_stride, mlp_depth
from mmscale.model.connectors.token_merge import TokenMergeConnector
from mmscale.registry import Registry

CONNECTORS: Registry[type[nn.Module]] = Registry("connector")
"""Connector classes by name, each called as `cls(in_width, out_width)`; `mlpNx_gelu` is parsed and `token_merge` takes more."""


class MlpConnector(nn.Sequential):
    """Linear layers with GELU between them, row by row: parameters `0.*, 2.*, 4.*` as in LLaVA's `mm_projector`."""

    def __init__(self, in_width: int, out_width: int, depth: int) -> None:
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(out_width, out_width)]
        super().__init__(*layers)

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """[N, P, D]: every row by itself; `grid` is not used."""
        return cast(torch.Tensor, super().forward(features_NPC))


@CONNECTORS.add("linear")
class LinearConnector(nn.Linear):
    """One linear layer, parameters `weight` and `bias` as in LLaVA's `mm_projector`."""

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """[N, P, D]: every row by itself; `grid` is not used."""
        return super().forward(features_NPC)


class SpaceToDepth(nn.Module):
    """Folds cells of K x K patches into channels, zero-padding odd grids at the end; cell order row-major."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[N, ceil(h / K) * ceil(w / K), K * K * C]."""
        k, (h, w), (n, _, c) = self.stride, grid, features_NPC.shape
        x = F.pad(features_NPC.view(n, h, w, c), (0, 0, 0, -w % k, 0, -h % k))
        rows, columns = x.shape[1] // k, x.shape[2] // k
        x = x.view(n, rows, k, columns, k, c).transpose(2, 3)
        return x.reshape(n, rows * columns, k * k * c)


class _Downsample(nn.Module):
    """A space-to-depth step followed by layers; `layers.N.*` are VILA's parameter names."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[N, ceil(h / K) * ceil(w / K), D]."""
        x = self.layers[0](features_NPC, grid)
        return cast(torch.Tensor, self.layers[1:](x))


@CONNECTORS.add("mlp_downsample")
@CONNECTORS.add("mlp_downsample_2x2_fix")
class Downsample2x2(_Downsample):
    """Cells of 2 x 2 patches, LayerNorm and two linear layers."""

    def __init__(self, in_width: int, out_width: int) -> None:
        wide = 4 * in_width
        super().__init__(
            SpaceToDepth(2), nn.LayerNorm(wide), nn.Linear(wide, out_width), nn.GELU(), nn.Linear(out_width, out_width)
        )


@CONNECTORS.add("mlp_downsample_3x3")
@CONNECTORS.add("mlp_downsample_3x3_fix")
class Downsample3x3(_Downsample):
    """Cells of 3 x 3 patches, two LayerNorms and three linear layers."""

    def __init__(self, in_width: int, out_width: int) -> None:
        wide, middle = 9 * in_width, 3 * in_width
        super().__init__(
            *(SpaceToDepth(3), nn.LayerNorm(wide), nn.Linear(wide, middle), nn.GELU()),
            *(nn.LayerNorm(middle), nn.Linear(middle, out_width), nn.GELU(), nn.Linear(out_width, out_width)),
        )


def build_connector(name: str, in_width: int, out_width: int, rows: int | None = None) -> nn.Module:
    """A connector with random weights, from `in_width` tower channels to `out_width`.

    Args:
        rows: per input, for `token_merge` alone; those of the others follow from the grid.

    Raises:
        ConfigError: an unknown name; the text lists the known ones.
    """
    connector_stride(name)  # refuses unknown names with the list
    if name == "token_merge":
        assert rows is not None, "token_merge merges to a given number of rows"
        return TokenMergeConnector(in_width, out_width, rows)
    depth = mlp_depth(name)
    if depth is not None:
        return MlpConnector(in_width, out_width, depth)
    return CONNECTORS.get(name)(in_width, out_width)
