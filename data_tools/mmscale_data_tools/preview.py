"""A picture of some samples: what a person looks at before starting a long run."""

from __future__ import annotations

import random
import textwrap
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale.errors import BadSampleError, RefusedInputError
from mmscale.streaming.media import IMAGE_FORMATS, probe
from mmscale.streaming.shards import ShardSet
from mmscale.types import MEDIA_TOKENS, MediaBytes, Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmscale.streaming.tokenizer import TextTokenizer

WIDTH, THUMB, MARGIN, LINE, FONT_SIZE = 1000, 112, 8, 15, 12
MAX_THUMBS, MAX_LINES, TEXT_COLUMNS = 4, 14, 110
MAX_PIXELS = 64_000_000


def write_preview(folder: Path, out: Path, num: int = 8, seed: int = 0, tokenizer: Path | None = None) -> int:
    """Writes a PNG with `num` randomly drawn samples (pictures, text, counts) and gives back how many it shows.

    Args:
        folder: dataset folder with a manifest.
        out: PNG file to write.
        num: samples at most.
        seed: of the draw.
        tokenizer: tokenizer folder; with it the text tokens of each sample are shown.
    """
    from PIL import Image

    if num < 1:
        raise RefusedInputError(f"--num is {num}, expected at least 1 sample to show")
    data = ShardSet.open(folder, folder.name)
    counter = _load_tokenizer(tokenizer) if tokenizer else None
    rows = sorted(random.Random(seed).sample(range(len(data)), min(num, len(data))))
    strips = [_strip(data, row, counter) for row in rows]
    sheet = Image.new("RGB", (WIDTH, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, "PNG")
    return len(rows)


def _load_tokenizer(path: Path) -> TextTokenizer:
    from mmscale.streaming.tokenizer import TextTokenizer

    return TextTokenizer.load(path)


def _strip(data: ShardSet, row: int, tokenizer: TextTokenizer | None) -> Image:
    """One sample: thumbnails on the left, text on the right."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        sample = data.read(row)
        lines, thumbs = _lines(sample, tokenizer), [_thumb(item) for item in sample.media[:MAX_THUMBS]]
    except BadSampleError as e:
        lines, thumbs = [data.id(row), f"SKIPPED  {e}"], []
    height = max(2 * MARGIN + LINE * len(lines), (THUMB + MARGIN) * -(-len(thumbs) // 2) + MARGIN)
    strip = Image.new("RGB", (WIDTH, height), "white")
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
        counts += f", {_text_tokens(sample, tokenizer)} text tokens"
    lines = [f"{sample.id}   {counts}"]
    for turn in sample.turns:
        for paragraph in f"{turn.role}: {turn.text}".split("\n"):
            lines += textwrap.wrap(paragraph, TEXT_COLUMNS) or [""]
    return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."]


def _text_tokens(sample: Sample, tokenizer: TextTokenizer) -> int:
    """Tokens of the turns' texts, without chat template and media placeholders."""
    texts = [turn.text for turn in sample.turns]
    for modality in {item.modality for item in sample.media}:
        texts = [text.replace(MEDIA_TOKENS[modality], "") for text in texts]
    return sum(map(len, tokenizer.encode_batch(texts)))


def _thumb(item: MediaBytes) -> Image:
    """A thumbnail, or a labelled box for what is no picture or cannot be shown."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    lengths = probe(item.ext, item.data)
    label = f"{item.modality} .{item.ext}\n{len(item.data)} bytes"
    if item.modality == "image" and 0 < lengths.width * lengths.height <= MAX_PIXELS:
        try:
            with Image.open(BytesIO(item.data), formats=IMAGE_FORMATS) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
            return ImageOps.pad(picture, (THUMB, THUMB), color=(240, 240, 240))
        except (OSError, ValueError, SyntaxError):
            label += "\ncannot be decoded"
    if lengths.rate_hz:
        label += f"\n{lengths.audio_samples / lengths.rate_hz:.2f} s\n{lengths.rate_hz} Hz"
    box = Image.new("RGB", (THUMB, THUMB), (225, 235, 225))
    ImageDraw.Draw(box).multiline_text((6, 6), label, fill="black", font=ImageFont.load_default(FONT_SIZE))
    return box
