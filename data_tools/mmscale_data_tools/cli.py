"""The command `mmscale-data`: build, index, verify and look at shards. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmscale.errors import MmscaleError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

app = typer.Typer(
    name="mmscale-data",
    help="Build, index, verify and look at WebDataset shards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Folder = Annotated[Path, typer.Argument(help="Dataset folder: .tar shards with manifest.json.")]
Folders = Annotated[
    list[Path], typer.Argument(metavar="DIR...", help="Dataset folders: .tar shards with manifest.json.")
]


class Source(StrEnum):
    """What a data set can be built from."""

    llava = "llava"
    folder = "folder"


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="Row file (.json list or .jsonl) for llava, a folder for folder.")],
    kind: Annotated[Source, typer.Option("--from", help="llava: LLaVA/ShareGPT rows. folder: images with captions.")],
    out: Annotated[Path, typer.Option(help="Dataset folder to write.")],
    media: Annotated[Path | None, typer.Option(help="Folder that file names in the rows are relative to.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a shard in MiB.")] = 512,
    shard_samples: Annotated[int, typer.Option(min=1, help="Most samples in a shard.")] = 10_000,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")] = False,
) -> None:
    """Write shards with index and manifest. Stopped half-way, the same command continues."""
    from mmscale.data_tools.build import SKIPPED_NAME, BuildOptions, build_folder, build_llava
    from mmscale.errors import ConfigError, RefusedInputError

    options = BuildOptions(shard_mb * 2**20, shard_samples, strict)
    with _progress("rows") as update:
        if kind is Source.folder:
            report = build_folder(source, out, options, lambda rows: update(rows, None, ""))
        elif media is None:
            raise ConfigError("--from llava needs --media DIR, the folder that file names in the rows are relative to")
        else:
            report = build_llava(source, media, out, options, lambda rows: update(rows, None, ""))
    typer.echo(f"{out}: {report.rows} rows = {report.samples} samples + {report.rows - report.samples} skipped")
    if report.dropped_turns:
        typer.echo(f"{report.dropped_turns} leading turns that are not the user's will be dropped on reading")
    if report.skipped:
        _table(f"skipped (listed in {out / SKIPPED_NAME})", ("reason", "rows"), _counts(report.skipped))
    if not report.samples:
        raise RefusedInputError(
            f"{source}: expected at least one usable row, found none of {report.rows}; see the table above"
        )


@app.command()
def index(folders: Folders) -> None:
    """Write the index of every .tar in a folder, and its manifest. Use it for tars from elsewhere."""
    for folder in folders:
        _index(folder)


def _index(folder: Path) -> None:
    from mmscale.data_tools.indexing import index_folder

    with _progress("shards") as update:
        report = index_folder(folder, update)
    manifest = report.manifest
    typer.echo(
        f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards, fingerprint {manifest.fingerprint}"
    )
    if report.skipped:
        _table("skipped", ("reason", "samples"), _counts(report.skipped))
    if manifest.quarantined:
        _table("shards put aside", ("shard", "reason"), list(manifest.quarantined.items()))


@app.command()
def verify(folders: Folders) -> None:
    """Check hashes, index, rows and media headers of every shard. Exit code 1 when anything is wrong."""
    if not all([_verify(folder) for folder in folders]):  # a list: every folder is looked at
        raise typer.Exit(1)


def _verify(folder: Path) -> bool:
    """Prints what was found; whether nothing is wrong."""
    from mmscale.data_tools.verify import summarize, verify_folder

    with _progress("shards") as update:
        report = verify_folder(folder, update)
    typer.echo(f"{folder}: {report.samples} of {report.indexed} samples usable in {report.shards} shards")
    if report.findings:
        rows = [(shard, reason, str(count), text) for shard, reason, count, text in summarize(report)]
        _table("found", ("shard", "reason", "count", "first"), rows)
    return not report.findings


@app.command()
def stats(folders: Folders) -> None:
    """Print how many samples, pictures, seconds of audio, turns and bytes of text there are."""
    for folder in folders:
        _stats(folder)


def _stats(folder: Path) -> None:
    from mmscale.data_tools.stats import dataset_stats

    with _progress("rows") as update:
        found = dataset_stats(folder, lambda done, total: update(done, total, ""))
    typer.echo(f"{folder}: {found.samples} samples in {found.shards} shards, {found.bytes / 2**20:.1f} MiB")
    typer.echo("media: " + (", ".join(f"{n} {kind}" for kind, n in found.media.items() if n) or "none"))
    rows = [
        (name, f"{s.count}", *(f"{x:.6g}" for x in (s.total, s.smallest, s.median, s.p95, s.largest)))
        for name, s in found.spreads.items()
    ]
    _table("spread", ("", "count", "sum", "min", "median", "p95", "max"), rows)
    if found.skipped:
        _table("skipped", ("reason", "samples"), _counts(found.skipped))


@app.command()
def preview(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    num: Annotated[int, typer.Option(help="Samples to show.")] = 8,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, to show token counts.")] = None,
) -> None:
    """Write a picture of some samples with their text and token counts."""
    from mmscale.data_tools.preview import write_preview

    shown = write_preview(folder, out, num, seed, tokenizer)
    typer.echo(f"{out}: {shown} samples of {folder}")


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="Folder to write the demo data to.")]) -> None:
    """Write the demo's data: handwritten digits, rendered words, beeps and text, as real shards."""
    from mmscale.data_tools.demo import write_demo

    write_demo(folder)


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """Shows a bar on standard error; gives a function that takes (done, total or None, what)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    typer.echo(f"{title}:")
    table = Table()
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _counts(skipped: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(reason, str(count)) for reason, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))]


def main() -> None:
    """Runs the command line; an error that we know is one line and its exit code, never a traceback."""
    from mmscale.logging import setup

    setup(level="WARNING")
    try:
        app()
    except MmscaleError as e:
        typer.echo(f"mmscale-data: {' '.join(str(e).split())}", err=True)
        sys.exit(e.exit_code)
    except OSError as e:
        typer.echo(
            f"mmscale-data: {e.filename}: {e.strerror}; check the path, its permissions and the space left", err=True
        )
        sys.exit(1)
