"""A packed batch as one HTML file that needs nothing else: no script, no request, light and dark."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

from mmscale.data_tools.inspection.pack_view import LEGEND, Document, PackView, Run
from mmscale.data_tools.inspection.thumbnails import input_strip

_THUMB = 96
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1f2328; --line: #d0d7de; --text: #eef1f4; --target: #abf2bc;
  --image: #b6d7ff; --video: #e2c5ff; --audio: #ffd8a8; --filler: #ffc9c9; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --fore: #e6edf3; --line: #30363d; --text: #21262d;
  --target: #1a5e31; --image: #0b3d78; --video: #4d2a7a; --audio: #6b4300; --filler: #7a1f1f; } }
body { background: var(--back); color: var(--fore); font: 14px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1rem auto;
  padding: 0 1rem; }
h1 { font-size: 1rem; } h2 { font: 600 13px ui-monospace, monospace; margin: 0 0 .3rem; overflow-wrap: anywhere; }
section { border-top: 1px solid var(--line); padding: .7rem 0; }
.bar { display: flex; height: 14px; margin: .2rem 0 .5rem; }
.bar i { display: block; } .map { height: 26px; } .map a { display: block; border-right: 1px solid var(--back); }
.rest { background: repeating-linear-gradient(45deg, var(--line) 0 2px, transparent 2px 8px); }
p { margin: 0; } .body { white-space: pre-wrap; overflow-wrap: anywhere; } .body span { border-radius: 3px; padding: 1px 0; }
figure { display: inline-block; margin: .2rem; padding: 3px; } figcaption { font-size: 11px; }
.legend span { padding: 1px 6px; border-radius: 3px; margin-right: .4rem; } .fault { font-weight: 600; }
""" + "".join(f".{kind} {{ background: var(--{kind}); }}\n" for kind in LEGEND)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
<h1>{title}</h1>
<p class="legend">{legend}</p>
<div class="bar map">{map}</div>
{documents}
</html>
"""


def render_html(view: PackView) -> str:
    """The page: the pack as one bar, then each document as a bar of what its tokens are, with text and thumbnails.

    All text is escaped; text of the data can neither run nor load anything.
    """
    legend = "".join(f'<span class="{kind}">{name}</span>' for kind, name in LEGEND.items() if view.count(kind))
    rest = max(0, view.seq_len - view.num_tokens)
    return _PAGE.format(
        title=escape(view.title),
        style=_STYLE,
        legend=legend,
        map="".join(_map_entry(i, d, view.seq_len) for i, d in enumerate(view.documents))
        + f'<i class="rest" style="width:{100 * rest / view.seq_len:.3f}%" title="{rest} tokens are free"></i>',
        documents="\n".join(_document(i, document) for i, document in enumerate(view.documents)),
    )


def _map_entry(number: int, document: Document, seq_len: int) -> str:
    kind = _main_kind(document)
    title = escape(f"{document.id}: {document.num_tokens} tokens")
    width = 100 * document.num_tokens / seq_len
    return f'<a href="#d{number}" class="{kind}" style="width:{width:.3f}%" title="{title}"></a>'


def _main_kind(document: Document) -> str:
    """The kind that names a document in the overview: its medium, else text; filler when it failed."""
    present = {run.kind for run in document.runs}
    return next((kind for kind in ("filler", "video", "image", "audio") if kind in present), "text")


def _document(number: int, document: Document) -> str:
    counts = ", ".join(f"{document.count(kind)} {name}" for kind, name in LEGEND.items() if document.count(kind))
    bar = "".join(
        f'<i class="{run.kind}" style="width:{100 * run.num_tokens / document.num_tokens:.3f}%" '
        f'title="{run.num_tokens} {LEGEND[run.kind]}"></i>'
        for run in document.runs
    )
    fault = f'<p class="fault">{escape(document.fault)}</p>' if document.fault else ""
    runs = "".join(map(_run, document.runs))
    return (
        f'<section id="d{number}"><h2>{escape(document.id)}</h2>{document.num_tokens} tokens: {escape(counts)}'
        f'<div class="bar">{bar}</div>{fault}<div class="body">{runs}</div></section>'
    )


def _run(run: Run) -> str:
    if run.media is None or run.kind not in ("image", "video", "audio"):
        return f'<span class="{run.kind}">{escape(run.text)}</span>'
    buffer = BytesIO()
    input_strip(run.kind, run.media, _THUMB).save(buffer, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    caption = f"{run.kind}: {run.num_tokens} tokens, {len(run.media)} input(s)"
    return f'<figure class="{run.kind}"><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
