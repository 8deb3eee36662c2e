"""Connectors: from tower features to rows of the language model's width.

Every connector takes features [N, P, C] of a grid (h, w), P = h * w, and gives [N, rows, D].
Shapes: N tower inputs, P patches, C tower width, D language-model width, K patches per side that become one row.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import nn

from mmscale.config.specs import connector_stride, mlp_depth
from mmscale.kernels.downsample_norm import NormOver, downsample_norm
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


class DownsampleNorm(nn.LayerNorm):
    """Cells of K x K patches as rows, zero-padding odd grids at the end, normalised over the cell or over each patch.

    The parameters are those of a LayerNorm, and read in its forward, as engines that gather weights module by module expect.
    """

    def __init__(self, in_width: int, stride: int, norm_over: NormOver = "patch", eps: float = 1e-5) -> None:
        super().__init__(in_width * (1 if norm_over == "token" else stride**2), eps=eps)
        self.stride, self.norm_over = stride, norm_over

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """[N, ceil(h / K) * ceil(w / K), K * K * C]."""
        return downsample_norm(features_NPC, self.weight, self.bias, grid, self.stride, self.eps, self.norm_over)


class _Downsample(nn.Sequential):
    """A `DownsampleNorm` followed by layers."""

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """[N, ceil(h / K) * ceil(w / K), D]."""
        norm, *layers = self
        x = norm(features_NPC, grid)
        for layer in layers:
            x = layer(x)
        return cast(torch.Tensor, x)


class _VilaDownsample(nn.Module):
    """The same with VILA's parameter names `layers.N.*`: its layer 0 folds the cells and has no parameters."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = _Downsample(OrderedDict((str(i), layer) for i, layer in enumerate(layers, start=1)))

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[N, ceil(h / K) * ceil(w / K), D]."""
        return cast(torch.Tensor, self.layers(features_NPC, grid))


@CONNECTORS.add("mlp_downsample")
@CONNECTORS.add("mlp_downsample_2x2_fix")
class Downsample2x2(_VilaDownsample):
    """Cells of 2 x 2 patches, LayerNorm and two linear layers."""

    def __init__(self, in_width: int, out_width: int) -> None:
        first, second = nn.Linear(4 * in_width, out_width), nn.Linear(out_width, out_width)
        super().__init__(DownsampleNorm(in_width, 2), first, nn.GELU(), second)


@CONNECTORS.add("mlp_downsample_3x3")
@CONNECTORS.add("mlp_downsample_3x3_fix")
class Downsample3x3(_VilaDownsample):
    """Cells of 3 x 3 patches, two LayerNorms and three linear layers."""

    def __init__(self, in_width: int, out_width: int) -> None:
        wide, middle = 9 * in_width, 3 * in_width
        super().__init__(
            *(DownsampleNorm(in_width, 3), nn.Linear(wide, middle), nn.GELU()),
            *(nn.LayerNorm(middle), nn.Linear(middle, out_width), nn.GELU(), nn.Linear(out_width, out_width)),
        )


@CONNECTORS.add("pixel_shuffle")
class PixelShuffle(_Downsample):
    """Cells of 2 x 2 patches, LayerNorm and two linear layers: parameters `0.*, 1.*, 3.*` as in InternVL's `mlp1`."""

    def __init__(self, in_width: int, out_width: int) -> None:
        first, second = nn.Linear(4 * in_width, out_width), nn.Linear(out_width, out_width)
        super().__init__(DownsampleNorm(in_width, 2), first, nn.GELU(), second)


@CONNECTORS.add("patch_merger")
class PatchMerger(nn.Module):
    """Patches normalised one by one, cells of 2 x 2, two linear layers: parameters `ln_q.*, mlp.0.*, mlp.2.*` of Qwen2-VL's merger."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        wide = 4 * in_width
        self.ln_q = DownsampleNorm(in_width, 2, norm_over="token", eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, out_width))

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """[N, ceil(h / 2) * ceil(w / 2), D]."""
        return cast(torch.Tensor, self.mlp(self.ln_q(features_NPC, grid)))


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
