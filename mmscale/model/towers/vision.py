"""The image tower: uint8 pixels in, patch features out.

Shapes: N images or frames, S pixels per side, P features per image, C tower width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mmscale.config.specs import VisionGrid, vision_grid
from mmscale.model.description import MmscaleConfig
from mmscale.model.towers.build import open_tower


class VisionTower(nn.Module):
    """CLIP, SigLIP or DINOv2 up to the selected layer; the Hugging Face model is `model`."""

    def __init__(self, config: MmscaleConfig, path: str | None = None) -> None:
        super().__init__()
        self.model = open_tower(config.vision_config, config.vision_select_layer, path, "model.vision")
        facts = config.vision_config.to_dict()
        self.geometry: VisionGrid = vision_grid(facts)
        self.drop = self.geometry.prefix if config.vision_select_feature == "patch" else 0
        self.mean, self.std = config.image_mean, config.image_std

    @property
    def width(self) -> int:
        """C."""
        return int(self.model.config.hidden_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.geometry.side, self.geometry.side

    def zero_input(self, device: torch.device) -> torch.Tensor:
        """One black image, uint8 [1, 3, S, S]."""
        return torch.zeros(1, 3, self.geometry.size, self.geometry.size, dtype=torch.uint8, device=device)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [N, P, C], without class and register tokens unless `select_feature` keeps them.

        Args:
            pixels: [N, 3, S, S], uint8 0 to 255 (normalised here, on the device), or floats that an image processor has
                normalised already.
        """
        dtype = next(self.model.parameters()).dtype
        pixels = normalised(pixels, self.mean, self.std, dtype) if pixels.dtype == torch.uint8 else pixels.to(dtype)
        return self.model(pixels).last_hidden_state[:, self.drop :]


def normalised(
    pixels_N3SS: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """(pixels / 255 - mean) / std per channel as `dtype` [N, 3, S, S], computed in fp32, on the device of the pixels.

    Args:
        pixels_N3SS: uint8, 0 to 255.
        mean, std: of the channels, for pixels from 0 to 1. They stay numbers of the host: no buffer that a change of module
            dtype would round, no copy to the device.

    Cost:
        reads each byte once and writes each result once, one operator per channel.
    """
    out = torch.empty(pixels_N3SS.shape, dtype=dtype, device=pixels_N3SS.device)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        shift = torch.tensor(-m / s, dtype=torch.float32)  # on the CPU, where a scalar is no operand to be copied
        torch.add(shift, pixels_N3SS[:, channel], alpha=1 / (255 * s), out=out[:, channel])
    return out
