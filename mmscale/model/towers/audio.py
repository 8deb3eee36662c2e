"""The audio tower: windows of log-mel frames or samples in, features out.

Shapes: N windows, F mel bins, P features per window, C tower width.
"""

from __future__ import annotations

import torch
from torch import nn

from mmscale.model.description import MmscaleConfig
from mmscale.model.towers.build import open_tower
from mmscale.types import AudioSpec


class AudioTower(nn.Module):
    """Whisper's encoder or wav2vec2 up to the selected layer; the Hugging Face model is `model`."""

    def __init__(self, config: MmscaleConfig, spec: AudioSpec, path: str | None = None) -> None:
        super().__init__()
        self.model = open_tower(config.audio_config, config.audio_select_layer, path, "model.audio")
        self.spec = spec

    @property
    def width(self) -> int:
        """C."""
        return int(self.model.config.hidden_size)

    @property
    def grid(self) -> tuple[int, int]:
        """P features in one row."""
        return 1, self.spec.tokens

    def zero_input(self, device: torch.device) -> torch.Tensor:
        """One silent window."""
        spec = self.spec
        log_mel = spec.features == "log_mel"
        shape = (1, spec.mel_bins, spec.window_samples // spec.hop_samples) if log_mel else (1, spec.window_samples)
        return torch.zeros(shape, device=device)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Features [N, P, C].

        Args:
            windows: log-mel [N, F, frames] or waveform [N, samples], as the model's `AudioSpec` says.
        """
        return self.model(windows.to(next(self.model.parameters()).dtype)).last_hidden_state
