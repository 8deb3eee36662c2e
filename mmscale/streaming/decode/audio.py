"""Audio bytes to the windows of an audio tower."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mmscale.errors import BadSampleError
from mmscale.streaming.containers import AAC_FORMATS, container_format, read_aac
from mmscale.streaming.decode.dsp import log_mel, resample, resampled_length
from mmscale.types import AudioSpec

# W windows, N samples

MAX_SECONDS = 1800
RATES_HZ = (1_000, 384_000)
MAX_CHANNELS = 16
_FORMATS = frozenset(("WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG"))
_BLOCK_FRAMES = 1 << 18


def decode_audio(data: bytes, spec: AudioSpec) -> tuple[torch.Tensor, int]:
    """Tower inputs, float32 [W, ...] as `AudioSpec` says, and the clip's number of samples at `spec.rate_hz`.

    Channels are averaged, the clip is resampled and cut into windows, the last one padded with zeros.

    Raises:
        BadSampleError: `decode_audio`, another format, damaged, empty or not finite; `audio_size`, refused rate, channels
            or length. The sizes that a header claims are never used to allocate memory.
        MissingExtraError: the spec needs torchaudio, which is not usable.
    """
    wave_N, rate_hz = _read_mono(data)
    wave_N = resample(wave_N, rate_hz, spec.rate_hz)
    num_samples = wave_N.numel()
    if spec.features == "waveform":
        wave_N = (wave_N - wave_N.mean()) / torch.sqrt(wave_N.var(unbiased=False) + 1e-7)
    windows_WN = F.pad(wave_N, (0, -num_samples % spec.window_samples)).view(-1, spec.window_samples)
    return (log_mel(windows_WN, spec) if spec.features == "log_mel" else windows_WN), num_samples


def planned_samples(num_samples: int, rate_hz: int, spec: AudioSpec) -> int:
    """The number of samples that `decode_audio` will find, from what the header says.

    Raises:
        BadSampleError: as `decode_audio` does for the same header.
    """
    if num_samples <= 0:
        raise BadSampleError("decode_audio", "the header cannot be read, or the clip is empty")
    _check_size(num_samples, rate_hz, channels=1)
    return resampled_length(num_samples, rate_hz, spec.rate_hz)


def _check_size(num_samples: int, rate_hz: int, channels: int) -> None:
    low, high = RATES_HZ
    if not (low <= rate_hz <= high and 1 <= channels <= MAX_CHANNELS and num_samples <= MAX_SECONDS * rate_hz):
        found = f"{num_samples} samples at {rate_hz} Hz, {channels} channel(s)"
        expected = f"at most {MAX_SECONDS} s at {low} to {high} Hz with 1 to {MAX_CHANNELS} channels"
        raise BadSampleError("audio_size", f"{found}, expected {expected}")


def _read_mono(data: bytes) -> tuple[torch.Tensor, int]:
    """The clip, float32 [N], mean over its channels, and its sampling rate in Hz."""
    if container_format(data[:12]) in AAC_FORMATS:
        wave, rate_hz = read_aac(data)
        _check_size(len(wave), rate_hz, channels=1)
    else:
        wave, rate_hz = _read_by_soundfile(data)
    if not len(wave):
        raise BadSampleError("decode_audio", "expected at least one sample, found none")
    if not np.isfinite(wave).all():
        raise BadSampleError("decode_audio", "a sample is not a finite number")
    return torch.from_numpy(wave), rate_hz


def _read_by_soundfile(data: bytes) -> tuple[NDArray[np.float32], int]:
    _check_whole_wav(data)
    blocks = [np.zeros(0, np.float32)]
    try:
        with soundfile.SoundFile(BytesIO(data)) as file:
            if file.format not in _FORMATS:
                raise BadSampleError(
                    "decode_audio", f"a {file.format} file, expected one of {', '.join(sorted(_FORMATS))}"
                )
            rate_hz = file.samplerate
            _check_size(0, rate_hz, file.channels)
            num_samples = 0
            while len(block := file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)):
                num_samples += len(block)
                _check_size(num_samples, rate_hz, file.channels)
                blocks.append(block.mean(axis=1, dtype=np.float32))
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
        raise BadSampleError("decode_audio", f"{len(data)} bytes: {type(error).__name__}: {error}") from error
    return np.concatenate(blocks), rate_hz


def _check_whole_wav(data: bytes) -> None:
    """Refuses a WAV file that ends before its samples do; libsndfile would take what is there for the whole clip."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"data":
            if size > len(data) - at - 8:
                raise BadSampleError(
                    "decode_audio", f"cut off: {len(data) - at - 8} bytes of samples, the header says {size}"
                )
            return
        at += 8 + size + size % 2
