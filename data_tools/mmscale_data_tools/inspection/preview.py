"""A picture of some samples: what a person looks at before starting a long run."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

from PIL import ImageDraw, ImageFont, ImageOps
from PIL.Image import Image, fromarray, new

from mmscale.data_tools.inspection.stats import count_tokens
from mmscale.data_tools.inspection.thumbnails import FONT_SIZE, input_strip, label_box
from mmscale.errors import BadSampleError, ConfigError, RefusedInputError
from mmscale.streaming.decode.image import open_pixels
from mmscale.streaming.decode.video import decode_video
from mmscale.streaming.media import probe
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import ImageSpec, MediaBytes, Sample, VideoSpec

WIDTH, THUMB, MARGIN, LINE = 1000, 112, 8, 15
MAX_THUMBS, MAX_LINES, TEXT_COLUMNS = 4, 14, 110
MAX_PIXELS = 64_000_000
_PAPER = (240, 240, 240)
_FRAME = ImageSpec(size=THUMB, tokens=1, mode="pad", fill=_PAPER)


def write_preview(folder: Path, out: Path, num: int = 8, seed: int = 0, tokenizer: Path | None = None) -> int:
    """Writes a PNG with `num` randomly drawn samples (pictures, text, counts) and gives back how many it shows.

    Args:
        folder: dataset folder with a manifest.
        out: PNG file to write.
        num: samples at most.
        seed: of the draw.
        tokenizer: tokenizer folder; with it the text tokens of each sample are shown.
    """
    if num < 1:
        raise RefusedInputError(f"--num is {num}, expected at least 1 sample to show")
    data = ShardSet.open(folder, folder.name)
    counter = TextTokenizer.load(tokenizer) if tokenizer else None
    rows = sorted(random.Random(seed).sample(range(len(data)), min(num, len(data))))
    strips = [_strip(data, row, counter) for row in rows]
    sheet = new("RGB", (WIDTH, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, "PNG")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --out") from error
    return len(rows)


def _strip(data: ShardSet, row: int, tokenizer: TextTokenizer | None) -> Image:
    """One sample: thumbnails on the left, text on the right."""
    try:
        sample = data.read(row)
        lines, thumbs = _lines(sample, tokenizer), [_thumb(item) for item in sample.media[:MAX_THUMBS]]
    except BadSampleError as e:
        lines, thumbs = [data.id(row), f"SKIPPED  {e}"], []
    height = max(2 * MARGIN + LINE * len(lines), (THUMB + MARGIN) * -(-len(thumbs) // 2) + MARGIN)
    strip = new("RGB", (WIDTH, height), "white")
    for i, thumb in enumerate(thumbs):
        strip.paste(thumb, (MARGIN + (THUMB + MARGIN) * (i % 2), MARGIN + (THUMB + MARGIN) * (i // 2)))
    draw = ImageDraw.Draw(strip)
    draw.line((0, height - 1, WIDTH, height - 1), fill=(200, 200, 200))
    font = ImageFont.load_default(FONT_SIZE)
    for i, line in enumerate(lines):
        color = (90, 90, 160) if i == 0 else "black"
        draw.text((2 * (THUMB + MARGIN) + 2 * MARGIN, MARGIN + LINE * i), line, fill=color, font=font)
    return strip


def _lines(sample: Sample, tokenizer: TextTokenizer | None) -> list[str]:
    counts = f"{len(sample.media)} media, {sum(len(turn.text.encode()) for turn in sample.turns)} bytes of text"
    if tokenizer:
        counts += f", {count_tokens([sample], tokenizer)[0]} text tokens"
    lines = [f"{sample.id}   {counts}"]
    for turn in sample.turns:
        for paragraph in f"{turn.role}: {turn.text}".split("\n"):
            lines += textwrap.wrap(paragraph, TEXT_COLUMNS) or [""]
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."]


def _thumb(item: MediaBytes) -> Image:
    """A picture, the first frame of a clip, or a labelled box for sound and for what cannot be shown."""
    label = f"{item.modality} .{item.ext}\n{len(item.data)} bytes"
    try:
        if item.modality == "image":
            return ImageOps.pad(fromarray(open_pixels(item.data, MAX_PIXELS)), (THUMB, THUMB), color=_PAPER)
        if item.modality == "video":
            return _first_frame(item)
    except BadSampleError as error:
        return label_box(f"{label}\n{error.reason}", THUMB)
    header = probe(item.ext, item.data)
    if header.rate_hz:
        label += f"\n{header.audio_samples / header.rate_hz:.2f} s\n{header.rate_hz} Hz"
    return label_box(label, THUMB)


def _first_frame(item: MediaBytes) -> Image:
    """The first frame, with the length of the clip written on it."""
    header = probe(item.ext, item.data)
    thumb = input_strip("video", decode_video(item.data, VideoSpec(frames=1), _FRAME, MAX_PIXELS), THUMB)
    text = f"{header.frames} frames" + (
        f", {header.frames * 1000 / header.fps_milli:.1f} s" if header.fps_milli else ""
    )
    draw, font = ImageDraw.Draw(thumb), ImageFont.load_default(FONT_SIZE - 2)
    draw.rectangle((0, THUMB - LINE, THUMB, THUMB), fill=_PAPER)
    draw.text((4, THUMB - LINE), text, fill="black", font=font)
    return thumb
