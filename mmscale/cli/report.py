"""`mmscale report`: a run as one HTML file and one PNG."""

from __future__ import annotations

import time
from pathlib import Path

from mmscale.cli.status import attempt_rows, goodput_rows
from mmscale.cluster.curves import Curves, draw
from mmscale.cluster.report import report_html
from mmscale.cluster.summary import jobs_of, summarise
from mmscale.errors import ConfigError
from mmscale.train.goodput import account
from mmscale.train.history import read_history, read_steps_backwards


def run(folder: str, out: str | None) -> None:
    """Writes report.html and report.png and prints where they are."""
    history = read_history(Path(folder))
    curves = Curves()
    found = account(history, read_steps_backwards(history.folder), curves.add)
    summary = summarise(history, found, jobs_of(history.folder, history.attempts), time.time())
    target = Path(out) if out is not None else history.folder / "report"
    png, page = target / "report.png", target / "report.html"
    draw(history, curves, found, png)
    text = report_html(summary, attempt_rows(summary), goodput_rows(found), history.events, png.read_bytes())
    try:
        page.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{page}: cannot be written: {error.strerror}; give another --out") from error
    print(f"{page}\n{png}")
