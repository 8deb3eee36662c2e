"""A tower with its connector: media in, rows of the language model's width out.

Shapes: N tower inputs, P connector rows per input, D language-model width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmscale.errors import ConfigError
from mmscale.model.connectors.build import build_connector
from mmscale.model.description import MmscaleConfig
from mmscale.model.towers.audio import AudioTower
from mmscale.model.towers.vision import VisionTower


class MediaEncoder(nn.Module):
    """`tower` then `connector`; `rows` is P."""

    def __init__(self, tower: VisionTower | AudioTower, connector: nn.Module, rows: int) -> None:
        super().__init__()
        self.tower = tower
        self.connector = connector
        self.rows = rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, P, D]. Raises ConfigError when the tower gives another number of rows than the data was planned with."""
        rows_NPD = self.connector(self.tower(inputs), self.tower.grid)
        if rows_NPD.shape[1] != self.rows:
            raise ConfigError(
                f"{self.rows} rows per input are expected by the data, found {rows_NPD.shape[1]} from "
                f"{type(self.tower).__name__} for input {tuple(inputs.shape)}; check the tower's sizes in the configuration"
            )
        return rows_NPD

    def zero_rows(self, device: torch.device) -> torch.Tensor:
        """The rows [1, P, D] of one zero input, for packs without this modality."""
        return self(self.tower.zero_input(device))


def build_vision(config: MmscaleConfig, path: str | None = None) -> MediaEncoder | None:
    """The image and video encoder of a model, None when it has none; `path` holds the tower's weights, if any."""
    spec = config.specs.image
    if spec is None or config.vision_connector is None:
        return None
    tower = VisionTower(config, path)
    connector = build_connector(config.vision_connector, tower.width, int(config.text_config.hidden_size), spec.tokens)
    return MediaEncoder(tower, connector, spec.tokens)


def build_audio(config: MmscaleConfig, path: str | None = None) -> MediaEncoder | None:
    """The audio encoder of a model, None when it has none; `path` holds the tower's weights, if any."""
    spec = config.specs.audio
    if spec is None or config.audio_connector is None:
        return None
    tower = AudioTower(config, spec, path)
    connector = build_connector(config.audio_connector, tower.width, int(config.text_config.hidden_size), spec.tokens)
    return MediaEncoder(tower, connector, spec.tokens)
