"""Audio windows equal to the Hugging Face extractors', lengths known from the header, damaged clips refused."""

import math
import struct
import sys
from io import BytesIO

import av
import numpy as np
import pytest
import soundfile
import torch

from mmscale.errors import BadSampleError, MissingExtraError
from mmscale.streaming.containers import read_aac
from mmscale.streaming.decode import dsp
from mmscale.streaming.decode.audio import MAX_SECONDS, decode_audio, planned_samples
from mmscale.streaming.decode.dsp import log_mel, resample, resampled_length
from mmscale.streaming.media import probe
from mmscale.types import AudioSpec

WAVEFORM = AudioSpec(rate_hz=16_000, window_samples=8_000, tokens=25, features="waveform")
MEL = AudioSpec(rate_hz=16_000, window_samples=32_000, tokens=50)


def encode(wave, rate_hz=16_000, format="FLAC", subtype=None):
    buffer = BytesIO()
    soundfile.write(buffer, wave, rate_hz, format=format, subtype=subtype)
    return buffer.getvalue()


def noise(seed, *shape):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


@pytest.mark.parametrize("num_samples", [400, 31_999, 32_000])
@pytest.mark.parametrize("mel_bins", [80, 128])
def test_log_mel_equals_the_whisper_extractor(num_samples, mel_bins, seed):
    from transformers import WhisperFeatureExtractor

    wave = noise(seed, num_samples)
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=2)
    expected = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"]
    spec = AudioSpec(rate_hz=16_000, window_samples=32_000, tokens=50, mel_bins=mel_bins)
    ours, found = decode_audio(encode(wave, subtype="FLOAT", format="WAV"), spec)
    assert found == num_samples and ours.dtype == torch.float32
    assert ours.shape == expected.shape == (1, mel_bins, 200)
    error = (ours - expected).abs().max().item()
    print("max error", error)
    assert error <= 1e-4


def test_the_wave_extractor_of_wav2vec2_is_equal(seed):
    from transformers import Wav2Vec2FeatureExtractor

    wave = noise(seed, 8_000) + 0.1
    expected = Wav2Vec2FeatureExtractor(do_normalize=True)(wave, sampling_rate=16_000, return_tensors="pt")[
        "input_values"
    ]
    ours, _ = decode_audio(encode(wave, subtype="FLOAT", format="WAV"), WAVEFORM)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_long_clips_are_cut_into_windows_and_the_last_is_padded(seed):
    wave = noise(seed, 3 * 32_000 - 1000)
    ours, found = decode_audio(encode(wave, subtype="FLOAT", format="WAV"), MEL)
    assert found == 95_000 and ours.shape == (3, 80, 200)
    for i in range(3):
        window = torch.zeros(1, 32_000)
        part = torch.from_numpy(wave[32_000 * i : 32_000 * (i + 1)])
        window[0, : len(part)] = part
        assert torch.allclose(ours[i], log_mel(window, MEL)[0], atol=1e-6)
    assert MEL.num_tokens(found) == 50 + 50 + math.ceil(31_000 / 640)


def test_channels_are_averaged():
    left, right = np.full(100, 0.5, np.float32), np.full(100, -0.25, np.float32)
    stereo = encode(np.stack([left, right], 1), subtype="FLOAT", format="WAV")
    spec = AudioSpec(rate_hz=16_000, window_samples=100, tokens=1, features="waveform")
    mono = encode(np.linspace(-1, 1, 100, dtype=np.float32), subtype="FLOAT", format="WAV")
    ours, _ = decode_audio(stereo, spec)
    assert ours.abs().max() < 1e-3  # a constant has no variance
    assert decode_audio(mono, spec)[0].abs().max() > 1


@pytest.mark.parametrize(
    "rates", [(44_100, 16_000), (8_000, 16_000), (48_000, 16_000), (22_050, 16_000), (11_025, 16_000)]
)
def test_resample_keeps_a_tone_and_agrees_with_scipy(rates):
    from scipy.signal import resample_poly

    from_hz, to_hz = rates
    tone = np.sin(2 * np.pi * 440 * np.arange(from_hz // 2) / from_hz).astype(np.float32)
    ours = resample(torch.from_numpy(tone), from_hz, to_hz).numpy()
    exact = np.sin(2 * np.pi * 440 * np.arange(len(ours)) / to_hz)
    inside = slice(200, -200)
    assert np.abs(ours - exact)[inside].max() < 3e-3
    gcd = math.gcd(from_hz, to_hz)
    scipy = resample_poly(tone, to_hz // gcd, from_hz // gcd)[: len(ours)]
    assert np.abs(ours - scipy)[inside].max() < 1e-2


def test_the_length_after_resampling_is_known_before(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        from_hz, to_hz = (int(r) for r in rng.choice([8_000, 11_025, 16_000, 22_050, 44_100, 48_000], 2))
        n = int(rng.integers(1, 3000))
        out = resample(torch.zeros(n), from_hz, to_hz)
        assert out.numel() == resampled_length(n, from_hz, to_hz) == math.ceil(n * to_hz / from_hz)


def test_long_clips_have_the_exact_length_too():
    n, from_hz, to_hz = 2_700_006, 44_100, 16_000
    assert (
        math.ceil(np.float32(n * to_hz / from_hz)) == resampled_length(n, from_hz, to_hz) - 1
    )  # torchaudio's own length
    assert resample(torch.zeros(n), from_hz, to_hz).numel() == resampled_length(n, from_hz, to_hz)


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize(("rate_hz", "seconds"), [(16_000, 0.3), (44_100, 1.001), (8_000, 2.5)])
def test_the_plan_and_the_decoder_agree_on_the_length(format, rate_hz, seconds, seed):
    data = encode(noise(seed, int(rate_hz * seconds), 2), rate_hz, format)
    info = soundfile.info(BytesIO(data))
    windows, found = decode_audio(data, WAVEFORM)
    assert found == planned_samples(info.frames, info.samplerate, WAVEFORM)
    assert len(windows) == math.ceil(found / 8_000)


def encode_aac(wave, rate_hz, container):
    """AAC at 128 kbit/s in `ipod` (M4A), `mp4` or `adts` (bare)."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=container) as out:
        layout = "mono" if len(wave) == 1 else "stereo"
        stream = out.add_stream("aac", rate=rate_hz, layout=layout)
        for start in range(0, wave.shape[1], 1024):
            block = np.ascontiguousarray(wave[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate_hz, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(("rate_hz", "num_samples"), [(16_000, 16_000), (44_100, 44_101), (48_000, 100), (8_000, 1)])
def test_m4a_has_the_samples_that_were_encoded(rate_hz, num_samples):
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate_hz).astype(np.float32)
    for channels in (1, 2):
        data = encode_aac(np.tile(tone, (channels, 1)), rate_hz, "ipod")
        header = probe("m4a", data)
        assert (header.rate_hz, header.audio_samples) == (rate_hz, num_samples)  # no priming, no padding
        windows, found = decode_audio(data, WAVEFORM)
        assert found == planned_samples(num_samples, rate_hz, WAVEFORM) and len(windows) == math.ceil(found / 8_000)
    wave, _ = read_aac(data)
    assert np.abs(wave - tone)[200:-200].max(initial=0) < 0.02  # in step with what was encoded


@pytest.mark.parametrize("container", ["adts", "ipod"])
def test_aac_lengths_are_planned_exactly(container, seed):
    rng = np.random.default_rng(seed)
    for _ in range(4):
        rate_hz = int(rng.choice([16_000, 22_050, 44_100, 48_000]))
        data = encode_aac(noise(seed, 1, int(rng.integers(1, 9_000))), rate_hz, container)
        header = probe("aac", data)
        assert decode_audio(data, WAVEFORM)[1] == planned_samples(header.audio_samples, header.rate_hz, WAVEFORM)


def test_damaged_or_empty_aac_is_refused():
    data = encode_aac(noise(1, 1, 20_000), 16_000, "ipod")
    for bad in (data[: len(data) // 2], data[:200], encode_aac(np.zeros((1, 0), np.float32), 16_000, "ipod")):
        assert probe("m4a", bad).audio_samples == 0
        with pytest.raises(BadSampleError) as error:
            decode_audio(bad, WAVEFORM)
        assert error.value.reason == "decode_audio"


def wav_header(channels=1, rate_hz=16_000, claimed_bytes=None, payload=b"\0" * 64):
    size = len(payload) if claimed_bytes is None else claimed_bytes
    fmt = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * 2, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", min(36 + size, 2**32 - 1))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + fmt
        + b"data"
        + struct.pack("<I", size)
        + payload
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (wav_header(channels=0), "decode_audio"),
        (wav_header(rate_hz=1), "audio_size"),
        (wav_header(payload=b""), "decode_audio"),
        (b"", "decode_audio"),
        (b"RIFF", "decode_audio"),
        (encode(np.full(50, np.nan, np.float32), format="WAV", subtype="FLOAT"), "decode_audio"),
        (encode(np.full(50, np.inf, np.float32), format="WAV", subtype="FLOAT"), "decode_audio"),
        (encode(np.zeros(50, np.float32), format="AIFF"), "decode_audio"),
        (encode(noise(1, 4_000))[:3000], "decode_audio"),
    ],
)
def test_bad_clips_are_refused(data, reason):
    with pytest.raises(BadSampleError) as error:
        decode_audio(data, WAVEFORM)
    assert error.value.reason == reason


def test_a_header_that_claims_4_gb_allocates_nothing():
    for claimed_bytes in (1001, 2**32 - 40, 2**32 - 1):
        with pytest.raises(BadSampleError, match="cut off: 1000 bytes"):
            decode_audio(wav_header(claimed_bytes=claimed_bytes, payload=b"\1\0" * 500), WAVEFORM)
    assert decode_audio(wav_header(claimed_bytes=998, payload=b"\1\0" * 500), WAVEFORM)[1] == 499


def test_what_the_plan_refuses_by_the_header():
    for num_samples, rate_hz in ((0, 16_000), (100, 1), (MAX_SECONDS * 16_000 + 1, 16_000)):
        with pytest.raises(BadSampleError):
            planned_samples(num_samples, rate_hz, WAVEFORM)
    assert planned_samples(44_100, 44_100, WAVEFORM) == 16_000


def test_a_clip_that_is_too_long_is_refused_while_reading(monkeypatch):
    monkeypatch.setattr("mmscale.streaming.decode.audio.MAX_SECONDS", 1)
    decode_audio(encode(noise(1, 16_000)), WAVEFORM)
    with pytest.raises(BadSampleError) as error:
        decode_audio(encode(noise(1, 16_001)), WAVEFORM)
    assert error.value.reason == "audio_size"


def test_a_missing_torchaudio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(MissingExtraError, match=r"mmscale\[audio\]"):
        dsp.resample(torch.zeros(10), 44_100, 16_000)
    decode_audio(encode(noise(1, 100)), WAVEFORM)  # nothing of it is needed here
