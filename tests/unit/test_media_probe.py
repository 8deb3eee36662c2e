"""What headers say: the same from bytes and from a file, little is read, and nothing unreadable raises."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmscale.streaming.containers import encode_mp4
from mmscale.streaming.media import MODALITY_OF, Lengths, modality_of, probe


class CountingFile(io.BytesIO):
    """A file that counts the bytes read from it."""

    num_read = 0

    def read(self, size=-1):
        """As a file does."""
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_every_extension_has_its_modality():
    assert {e for e, m in MODALITY_OF.items() if m == "audio"} == {"flac", "wav", "mp3", "ogg", "m4a", "aac"}
    assert modality_of("0.m4a") == "audio" and modality_of("clip.mp4") == "video" and modality_of("json") is None


def test_a_clip_is_probed_without_reading_its_frames(seed):
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for _ in range(60)]
    data = encode_mp4(frames, fps=30, size=(128, 128))
    file = CountingFile(data)
    header = probe("mp4", file)
    assert header == probe("0.mp4", data) == Lengths(width=128, height=128, frames=60, fps_milli=30_000, keyframes=1)
    print("read", file.num_read, "of", len(data))
    assert file.num_read < len(data) / 2


def test_pictures_and_sounds_are_probed_from_files_too():
    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (20, 10)).save(picture, "PNG")
    soundfile.write(sound, np.zeros(123), 8_000, format="WAV")
    for ext, buffer, expected in (
        ("png", picture, Lengths(width=20, height=10, frames=1)),
        ("wav", sound, Lengths(rate_hz=8_000, audio_samples=123)),
    ):
        assert probe(ext, buffer.getvalue()) == probe(ext, io.BytesIO(buffer.getvalue())) == expected


@pytest.mark.parametrize("ext", sorted(MODALITY_OF))
def test_what_cannot_be_read_has_no_lengths(ext, seed):
    rng = np.random.default_rng(seed)
    heads = (
        b"",
        b"\0" * 8,
        b"\0\0\0\x18ftypisom",
        b"\x1aE\xdf\xa3\x9fB\x86",
        b"\xff\xf1P\x80",
        b"\xff\xd8\xff\xe0",
        b"RIFF",
    )
    for head in heads:
        assert probe(ext, head + rng.bytes(300)) == Lengths()
