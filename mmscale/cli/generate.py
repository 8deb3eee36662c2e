"""`mmscale generate`: one question, its media, one answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mmscale
from mmscale.errors import BadSampleError, ConfigError
from mmscale.streaming.media import modality_of
from mmscale.streaming.rows import place_media
from mmscale.types import MediaBytes, Sample, Turn


def run(
    model: str,
    prompt: str,
    images: Sequence[str],
    audios: Sequence[str],
    videos: Sequence[str],
    max_new_tokens: int,
    device: str,
) -> None:
    """Prints the model's greedy answer."""
    media = tuple(
        _read(path, kind) for kind, paths in (("image", images), ("audio", audios), ("video", videos)) for path in paths
    )
    try:
        turns = place_media((Turn("user", prompt),), [item.modality for item in media])
    except BadSampleError as error:
        raise ConfigError(f"--prompt: expected one tag per medium or no tag at all, found {error.detail}") from error
    generator = mmscale.load(model, device=device)
    print(generator.answer([Sample("the prompt", turns, media)], max_new_tokens)[0].text)


def _read(path: str, kind: str) -> MediaBytes:
    ext = Path(path).suffix.removeprefix(".").lower()
    modality = modality_of(ext)
    if modality != kind:
        raise ConfigError(f"--{kind} {path}: expected a file of that kind, found the extension '.{ext}'")
    try:
        return MediaBytes(modality, ext, Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"--{kind} {path}: cannot be read: {error.strerror}") from error
