"""The image tower: uint8 pixels in, patch features out.

Shapes: N images or frames, S pixels per side, P features per image, C tower width.
"""

from __future__ import annotations

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
        if pixels.dtype == torch.uint8:
            pixels = self._normalise(pixels)
        features = self.model(pixels.to(next(self.model.parameters()).dtype)).last_hidden_state
        return features[:, self.drop :]

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        # Per channel with host numbers: no buffer that a change of module dtype would round, no copy to the device.
        scaled = [
            (pixels[:, c].float() / 255 - m) / s for c, (m, s) in enumerate(zip(self.mean, self.std, strict=True))
        ]
        return torch.stack(scaled, dim=1)
