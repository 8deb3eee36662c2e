"""`mmscale status`: how a run stands and what to do next."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmscale.cluster.summary import Summary, jobs_of, summarise
from mmscale.redact import redact
from mmscale.train.goodput import CATEGORIES, Account, account, duration
from mmscale.train.history import read_history, read_steps_backwards


def run(folder: str, as_json: bool) -> None:
    """Prints attempts, progress, goodput, the last error and the next thing to do."""
    history = read_history(Path(folder))
    found = account(history, read_steps_backwards(history.folder))
    summary = summarise(history, found, jobs_of(history.folder, history.attempts), time.time())
    text = status_json(summary, found) if as_json else status_text(summary, found)
    print(redact(text))


def status_json(summary: Summary, found: Account) -> str:
    """All of it, for programs."""
    goodput = {"goodput": found.goodput, "wall_s": found.wall_s, "seconds": dict(found.seconds)}
    return json.dumps({**asdict(summary), **goodput}, indent=1, ensure_ascii=False)


def status_text(summary: Summary, found: Account) -> str:
    """All of it, for people."""
    lines = [f"run         {summary.run}", f"state       {summary.state}", f"progress    {_progress(summary)}", ""]
    if summary.attempts:
        lines += [*table(attempt_rows(summary)), "", *table(goodput_rows(found)), ""]
    if summary.last_error:
        lines.append(f"last error  {summary.last_error}")
    lines.append(f"next        {summary.advice}")
    return "\n".join(lines)


def attempt_rows(summary: Summary) -> list[list[str]]:
    """A header and one row per attempt."""
    rows = [["attempt", "began", "ranks", "steps", "redone", "ended", "why"]]
    for one in summary.attempts:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.began_at))
        steps = "none" if one.first_step is None else f"{one.first_step}-{one.last_step}"
        ranks = "?" if one.world_size is None else str(one.world_size)
        rows.append([one.token or "?", began, ranks, steps, str(one.num_redone), one.outcome, one.why])
    return rows


def goodput_rows(found: Account) -> list[list[str]]:
    """A header and one row per category that has any time, and the sum."""
    wall = found.wall_s or 1.0
    rows = [["goodput", f"{found.goodput:.1%}", "", ""]]
    for name, text in CATEGORIES.items():
        if found.seconds[name]:
            seconds = found.seconds[name]
            rows.append([name.replace("_", " "), f"{seconds / wall:.1%}", duration(seconds), text])
    return [*rows, ["wall-clock", "100.0%", duration(found.wall_s), ""]]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns as wide as their widest text.

    Example:
        >>> table([["a", "b"], ["long", "c"]])
        ['a     b', 'long  c']
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _progress(summary: Summary) -> str:
    total = "?" if summary.total_steps is None else f"{summary.total_steps:,}"
    parts = [f"step {summary.step:,} of {total}", f"newest checkpoint {summary.checkpoint_step:,}"]
    if summary.loss is not None:
        parts.append(f"loss {summary.loss:.4f}")
    if summary.tokens_per_s is not None:
        parts.append(f"{summary.tokens_per_s:,.0f} tokens/s")
    if summary.eta_s:
        parts.append(f"{duration(summary.eta_s)} of training left")
    return ", ".join(parts)
