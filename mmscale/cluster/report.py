"""The report of a run as one HTML file: the picture, the goodput table, attempts and events, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Sequence
from html import escape

from mmscale.cluster.summary import Summary
from mmscale.redact import redact
from mmscale.train.history import Event

MAX_EVENTS = 500
"""Newest events that are listed."""

_COUNTED = ("save", "validation")
"""Events that are counted and not listed: the picture and the table of times show them."""

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left;"
    "vertical-align:top}th{background:#f4f4f4}img{max-width:100%}code{white-space:pre-wrap;word-break:break-word}"
    ".next{background:#eef5ee;border-left:4px solid #2a7f3f;padding:.5rem .8rem}"
)


def report_html(
    summary: Summary,
    attempts: Sequence[Sequence[str]],
    goodput: Sequence[Sequence[str]],
    events: Sequence[Event],
    png: bytes,
) -> str:
    """The page.

    Args:
        summary: how the run stands.
        attempts: a header and one row per attempt.
        goodput: a header and one row per category.
        events: of all attempts, in order.
        png: the picture.
    """
    title = f"Run {summary.run}"
    picture = base64.b64encode(png).decode()
    counts = Counter(event.name for event in events)
    counted = ", ".join(f"{counts[name]:,} x {name}" for name in _COUNTED if counts[name])
    listed = [event for event in events if event.name not in _COUNTED]
    left_out = f" The newest {MAX_EVENTS} of {len(listed):,} are listed." if len(listed) > MAX_EVENTS else ""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title><style>{_STYLE}</style>',
        f"<h1>{_text(title)}</h1>",
        f"<p>State: <b>{_text(summary.state)}</b>, step {summary.step:,}"
        f"{'' if summary.total_steps is None else f' of {summary.total_steps:,}'}.</p>",
        f'<p class="next">Next: {_text(summary.advice)}</p>',
        f"<p>Last error: <code>{_text(summary.last_error)}</code></p>" if summary.last_error else "",
        f'<p><img alt="loss, throughput, fill, data wait and goodput" src="data:image/png;base64,{picture}"></p>',
        "<h2>Goodput</h2>",
        _table(goodput),
        "<h2>Attempts</h2>",
        _table(attempts),
        "<h2>Events</h2>",
        f"<p>{_text(counted) or 'No saves or validations'}.{left_out}</p>",
        _event_table(listed[-MAX_EVENTS:]),
    ]
    return "\n".join(part for part in parts if part) + "</html>\n"


def _text(text: str) -> str:
    return escape(redact(text))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows[1:])
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _event_table(events: Sequence[Event]) -> str:
    rows = []
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
        ids = event.details.get("ids")
        rest = ", ".join(
            f"{key} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for key, value in event.details.items() if key != "ids"
        )  # fmt: skip
        samples = ""
        if isinstance(ids, list):
            names = "<br>".join(_text(str(one)) for one in ids)
            samples = f"<details><summary>{len(ids)} samples</summary><code>{names}</code></details>"
        cells = (when, event.attempt, str(event.step), event.name, rest)
        rows.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + f"<td>{samples}</td></tr>\n")
    head = "".join(f"<th>{name}</th>" for name in ("time", "attempt", "step", "event", "details", "samples"))
    return f"<table><tr>{head}</tr>\n{''.join(rows)}</table>"
