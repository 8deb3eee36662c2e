"""A packed batch as one PNG: a bar for the pack, then each document with its bar, thumbnails and text."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import ImageDraw, ImageFont
from PIL.Image import Image, new

from mmscale.data_tools.inspection.pack_view import LEGEND, Document, Kind, PackView
from mmscale.data_tools.inspection.thumbnails import FONT_SIZE, input_strip

WIDTH, MARGIN, LINE, THUMB, BAR = 1200, 10, 17, 64, 12
MEDIA_WIDTH = 6 * (THUMB + 2)
"""Pixels left of the text that thumbnails may take, for documents that have media."""

MAX_DOCUMENTS, MAX_LINES, MAX_ROWS, MAX_WORD = 40, 8, 2, 40
_GAP = 6

COLORS: dict[Kind, tuple[int, int, int]] = {
    "text": (208, 214, 221),
    "target": (134, 222, 155),
    "image": (140, 190, 255),
    "video": (205, 165, 255),
    "audio": (255, 195, 120),
    "filler": (245, 140, 140),
}
_BLACK, _BLUE, _FREE, _RULE = (25, 25, 25), (70, 70, 150), (248, 248, 248), (215, 215, 215)

Word = tuple[Kind, str]


def render_png(view: PackView) -> Image:
    """The picture; only the first `MAX_DOCUMENTS` documents are drawn in full, and a line says so."""
    shown = view.documents[:MAX_DOCUMENTS]
    strips = [_header(view), *(_document_strip(document) for document in shown)]
    if len(shown) < len(view.documents):
        strips.append(_note(f"... and {len(view.documents) - len(shown)} more documents: write .html to see them all"))
    sheet = new("RGB", (WIDTH, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _header(view: PackView) -> Image:
    """Title, legend, and the pack as one bar on the scale of `seq_len`."""
    strip = new("RGB", (WIDTH, 2 * LINE + 3 * BAR + 3 * MARGIN), "white")
    draw, font = ImageDraw.Draw(strip), _font()
    draw.text((MARGIN, MARGIN), view.title, fill=_BLACK, font=font)
    left, top = MARGIN, MARGIN + LINE + 6
    for kind, name in LEGEND.items():
        if view.count(kind):
            draw.rectangle((left, top, left + BAR, top + BAR), fill=COLORS[kind])
            draw.text((left + BAR + 5, top - 2), name, fill=_BLACK, font=font)
            left += BAR + 25 + int(font.getlength(name))
    top += LINE + MARGIN
    draw.rectangle((MARGIN, top, WIDTH - MARGIN, top + 2 * BAR), fill=_FREE, outline=_RULE)
    scale = (WIDTH - 2 * MARGIN) / max(view.seq_len, view.num_tokens)
    for document in view.documents:
        _bar(draw, document, MARGIN + document.start * scale, scale, top, 2 * BAR)
        edge = MARGIN + (document.start + document.num_tokens) * scale
        draw.line((edge, top, edge, top + 2 * BAR), fill="white")
    return strip


def _document_strip(document: Document) -> Image:
    """Id and counts, the document as a bar over the whole width, thumbnails on the left, text on the right."""
    thumbs = _thumbs(document)
    left = MARGIN + max((thumb.width + 2 * MARGIN for thumb in thumbs), default=0)
    lines = _flow(document, WIDTH - MARGIN - left)
    body = 2 * MARGIN + LINE + BAR
    strip = new("RGB", (WIDTH, body + max(LINE * len(lines), (THUMB + 2) * len(thumbs)) + MARGIN), "white")
    draw, font = ImageDraw.Draw(strip), _font()
    draw.line((0, 0, WIDTH, 0), fill=_RULE)
    counts = ", ".join(f"{document.count(kind)} {name}" for kind, name in LEGEND.items() if document.count(kind))
    title = f"{document.id}   {document.num_tokens} tokens: {counts}"
    draw.text((MARGIN, MARGIN - 3), title, fill=_BLUE, font=font)
    _bar(draw, document, MARGIN, (WIDTH - 2 * MARGIN) / document.num_tokens, MARGIN + LINE, BAR)
    for row, thumb in enumerate(thumbs):
        strip.paste(thumb, (MARGIN, body + (THUMB + 2) * row))
    for i, line in enumerate(lines):
        _write(draw, line, left, body + LINE * i, font)
    return strip


def _bar(draw: ImageDraw.ImageDraw, document: Document, left: float, scale: float, top: int, height: int) -> None:
    """The runs of a document side by side, `scale` pixels per token."""
    for run in document.runs:
        x = left + (run.start - document.start) * scale
        draw.rectangle((x, top, max(x, x + run.num_tokens * scale - 1), top + height), fill=COLORS[run.kind])


def _thumbs(document: Document) -> list[Image]:
    """The media of a document in rows of at most `MEDIA_WIDTH`; what has no place beside the text is left out."""
    rows: list[list[Image]] = []
    left = MEDIA_WIDTH
    for run in document.runs:
        if run.media is None or run.kind not in ("image", "video", "audio"):
            continue
        thumb = input_strip(run.kind, run.media, THUMB)
        if left + thumb.width > MEDIA_WIDTH:
            if len(rows) == MAX_ROWS:
                break
            rows.append([])
            left = 0
        rows[-1].append(thumb)
        left += thumb.width + _GAP
    return [_side_by_side(row) for row in rows]


def _side_by_side(images: list[Image]) -> Image:
    row = new("RGB", (sum(image.width + _GAP for image in images) - _GAP, THUMB), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + _GAP
    return row


def _flow(document: Document, width: int) -> list[list[Word]]:
    """The document's words in lines of at most `width` pixels, `MAX_LINES` of them."""
    lines: list[list[Word]] = [[]]
    font, left = _font(), 0.0
    for kind, word in _words(document):
        size = font.getlength(word + " ")
        if left + size > width and lines[-1]:
            if len(lines) == MAX_LINES:
                lines[-1][-1] = "text", "..."
                return lines
            lines.append([])
            left = 0.0
        lines[-1].append((kind, word))
        left += size
    return lines


def _words(document: Document) -> Iterator[Word]:
    if document.fault:
        yield from (("filler", word) for word in document.fault.split())
    for run in document.runs:
        if run.media is not None:
            yield run.kind, f"[{run.kind}: {run.num_tokens} tokens]"
        for word in run.text.split():
            yield from ((run.kind, word[i : i + MAX_WORD]) for i in range(0, len(word), MAX_WORD))


def _write(draw: ImageDraw.ImageDraw, line: list[Word], left: float, top: int, font: ImageFont.FreeTypeFont) -> None:
    for kind, word in line:
        size = font.getlength(word + " ")
        if kind != "text":
            draw.rectangle((left - 1, top, left + size - 2, top + LINE - 2), fill=COLORS[kind])
        draw.text((left, top), word, fill=_BLACK, font=font)
        left += size


def _note(text: str) -> Image:
    strip = new("RGB", (WIDTH, LINE + 2 * MARGIN), "white")
    ImageDraw.Draw(strip).text((MARGIN, MARGIN), text, fill=_BLACK, font=_font())
    return strip


def _font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow gives its own scalable font for a size"
    return font
