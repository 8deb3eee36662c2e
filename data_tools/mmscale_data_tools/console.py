"""What the commands show: a progress bar on standard error, tables and counts on standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(help="Dataset folder: shards with manifest.json.")]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Dataset folders: shards with manifest.json.")]

_FILE_WIDTH = 160
"""Characters of a line in a file or a pipe, where there is no window to fit."""

Update = Callable[[int, int | None, str], None]
"""Takes how much is done, how much there is in all (None = unknown), and what is being done."""


@contextmanager
def progress(unit: str) -> Iterator[Update]:
    """A bar on standard error, when that is a terminal; gives the function that moves it. `bytes` are shown as MB and GB."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a titled table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    typer.echo(f"{title}:")
    shown = Table()
    for name in header:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    console = Console()
    (console if console.is_terminal else Console(width=_FILE_WIDTH)).print(shown)


def counts(skipped: Mapping[str, int]) -> list[tuple[str, str]]:
    """(reason, how many) for a table, the most frequent first."""
    return [(reason, str(count)) for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))]
