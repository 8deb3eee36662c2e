"""The connector `token_merge`: the most similar rows of an image or frame merge, then two linear layers.

Shapes: N tower inputs, P patches, R rows that are left, C tower width, D language-model width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from mmscale.kernels.token_merge import merge, plan_merges


def rows_by_round(patches: int, rows: int) -> list[int]:
    """Rows after each round of merging, the last one `rows`: the fewest rounds, each with about the same share left.

    A round could merge half of its rows, but then it merges every source, similar to its best target or not. It merges a third
    at most, so that each round takes the most similar ones.

    Example:
        >>> rows_by_round(729, 365), rows_by_round(16, 8), rows_by_round(5, 5)
        ([516, 365], [11, 8], [])
    """

    def fewest(now: int) -> int:
        return now - max(1, now // 3)

    rounds, least = 0, patches
    while least > rows:
        rounds, least = rounds + 1, fewest(least)
    left = [patches]
    while left[-1] > rows:
        even = round(patches * (rows / patches) ** (len(left) / rounds))
        left.append(max(rows, even, fewest(left[-1])))
    return left[1:]


class TokenMergeConnector(nn.Sequential):
    """Merges the P rows of every input to `rows` by similarity (`mmscale.kernels.token_merge`), then Linear, GELU, Linear.

    A merged row is the mean of the tower's rows in it plus the sum of their places: the order, which stays that of the grid, does
    not tell any more which patches are in a row, nor how many. Cosines are taken of the features, without gradient. Parameters
    `0.*` and `2.*` as in `mlp2x_gelu`.
    """

    def __init__(self, in_width: int, out_width: int, rows: int) -> None:
        super().__init__(nn.Linear(in_width, out_width), nn.GELU(), nn.Linear(out_width, out_width))
        self.rows = rows

    def forward(self, features_NPC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:  # type: ignore[override]
        """[N, R, D]; inputs do not mix."""
        places_PC = places(grid, features_NPC.shape[2], features_NPC.device).to(features_NPC.dtype)
        return cast(torch.Tensor, super().forward(self.merged(features_NPC, places_PC)))

    def merged(self, features_NPC: torch.Tensor, places_PC: torch.Tensor) -> torch.Tensor:
        """The merged rows [N, R, C], of the type of the features."""
        num, patches, width = features_NPC.shape
        x, where, sizes = features_NPC.reshape(-1, width), places_PC.repeat(num, 1), None
        for left in rows_by_round(patches, self.rows):
            borders = torch.arange(num + 1, dtype=torch.int32, device=x.device) * patches
            merges = torch.full((num,), patches - left, dtype=torch.int32, device=x.device)
            plan = plan_merges(_metric(x), borders, merges, patches, num * left)
            where, _ = merge(where, plan, sizes)
            x, sizes = merge(x, plan, sizes)
            patches = left
        if sizes is not None:
            where = where * sizes[:, None].to(where.dtype)
        return (x + where).view(num, patches, width)


def _metric(x: torch.Tensor) -> torch.Tensor:
    """What is matched: under autocast of its type, like the factors of other matrix products."""
    kind = x.device.type
    return x.detach().to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x.detach()


def places(grid: tuple[int, int], width: int, device: torch.device) -> torch.Tensor:
    """Sines and cosines of each patch's line and column, fp32 [h * w, C]: Vaswani et al. 2017, arXiv:1706.03762, section 3.5, a
    half of the channels for each axis. Channels that 4 does not divide stay 0."""
    (h, w), quarter = grid, width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device) / max(1, quarter))
    axes = [torch.arange(n, device=device)[:, None] * frequencies for n in (h, w)]
    lines, columns = (torch.cat([axis.sin(), axis.cos()], 1) for axis in axes)
    both = torch.cat([lines[:, None].expand(h, w, -1), columns[None].expand(h, w, -1)], 2)
    return functional.pad(both.reshape(h * w, 4 * quarter), (0, width - 4 * quarter))
