"""Resampling and mel spectrograms: the one module that imports torchaudio, of which it needs the pure-Python parts."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

import torch
from torch.nn import functional as F

from mmscale.errors import ConfigError, MissingExtraError
from mmscale.types import AudioSpec

# N samples, M mel bins, K frames of the spectrogram


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Samples that a clip of `num_samples` has after `resample`: the same number for the plan and the decoder.

    Example:
        >>> resampled_length(44_101, 44_100, 16_000)
        16001
    """
    return -(-num_samples * to_hz // from_hz)


def resample(wave_N: torch.Tensor, from_hz: int, to_hz: int) -> torch.Tensor:
    """The clip at another sampling rate, float32 [resampled_length]. Raises MissingExtraError without torchaudio."""
    if from_hz == to_hz:
        return wave_N
    length = resampled_length(wave_N.numel(), from_hz, to_hz)
    out_N = _torchaudio().functional.resample(wave_N, from_hz, to_hz)[:length]
    # torchaudio rounds the length in float32, so that of a long clip may be short of a sample.
    return F.pad(out_N, (0, length - out_N.numel()))


def log_mel(windows_WN: torch.Tensor, spec: AudioSpec) -> torch.Tensor:
    """Whisper's log-mel spectrogram, float32 [windows, mel_bins, window_samples / hop_samples].

    Args:
        windows_WN: float32 [windows, window_samples], padded with zeros.
        spec: the audio tower's input.
    """
    window = torch.hann_window(spec.fft_samples)
    spectrum = torch.stft(windows_WN, spec.fft_samples, spec.hop_samples, window=window, return_complex=True)
    power_WFK = spectrum[..., :-1].abs() ** 2
    mel_WMK = _mel_filters(spec.fft_samples // 2 + 1, spec.mel_bins, spec.rate_hz).T @ power_WFK
    log_WMK = mel_WMK.clamp(min=1e-10).log10()
    floor = log_WMK.amax(dim=(-2, -1), keepdim=True) - 8.0
    return (torch.maximum(log_WMK, floor) + 4.0) / 4.0


@lru_cache(maxsize=8)
def _mel_filters(num_freqs: int, mel_bins: int, rate_hz: int) -> torch.Tensor:
    bank = _torchaudio().functional.melscale_fbanks(
        num_freqs, 0.0, rate_hz / 2, mel_bins, rate_hz, norm="slaney", mel_scale="slaney"
    )
    return bank.float()


def require_audio() -> None:
    """Raises MissingExtraError when audio cannot be prepared here, so that a run says so before it starts."""
    _torchaudio()


def _torchaudio() -> ModuleType:
    try:
        # Only the pure-Python part. A wheel for another torch fails at import with OSError or RuntimeError.
        import torchaudio.functional
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtraError("torchaudio", "audio", "audio input", error) from error
    return torchaudio


def check_audio_backend() -> None:
    """Returns when torchaudio is usable or absent. Raises ConfigError when it is installed but cannot be loaded.

    transformers imports torchaudio wherever it finds it, so a broken one shows up as an error of some language model's class.
    """
    if importlib.util.find_spec("torchaudio") is None:
        return
    try:
        _torchaudio()
    except MissingExtraError as error:
        raise ConfigError(
            f"torchaudio is installed and cannot be loaded, which breaks transformers too: {error.__cause__}; install the build "
            f"that matches torch, or delete torchaudio/lib/*.so (its Python parts suffice), or uninstall it"
        ) from error
