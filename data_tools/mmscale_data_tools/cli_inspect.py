"""The commands of `mmscale-data` that only look: verify, stats, plan and preview. Heavy imports happen inside the commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmscale.data_tools.console import Folders, counts, progress, table

if TYPE_CHECKING:
    from mmscale.data_tools.inspection.run_stream import RunStream
    from mmscale.data_tools.inspection.stats import Stats
    from mmscale.data_tools.inspection.verify import VerifyReport

Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder, to count tokens of text.")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to the program."""
    for command in (verify, stats, plan, preview):
        app.command()(command)


def verify(
    folders: Folders,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every medium, not only its header.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Read shards again that have not changed.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = this one.")] = 0,
    report: Annotated[Path | None, typer.Option("--json", help="File for the whole report.")] = None,
) -> None:
    """Check hashes, index, rows, media and duplicates. Stopped half-way, it goes on. Exit code 1 when anything is wrong."""
    from mmscale.data_tools.inspection.verify import verify_folder, write_report

    reports = {}
    for folder in folders:
        with progress("bytes") as update:
            reports[folder] = verify_folder(folder, update, decode=decode, again=again, workers=workers)
        _show_report(folder, reports[folder])
    if report:
        write_report(reports, report)
    if any(found.findings for found in reports.values()):
        raise typer.Exit(1)


def _show_report(folder: Path, report: VerifyReport) -> None:
    from mmscale.data_tools.inspection.verify import summarize

    typer.echo(f"{folder}: {report.samples} of {report.indexed} samples usable in {report.shards} shards")
    if report.remembered:
        typer.echo(
            f"{report.remembered} of these shards are as at the last check and were not read again (--again reads them)"
        )
    if report.findings:
        rows = [(shard, reason, str(count), text) for shard, reason, count, text in summarize(report)]
        table("found", ("shard", "reason", "count", "first"), rows)
    if report.notes:
        notes = [(note.kind, str(note.count), note.examples[0]) for note in report.notes]
        table("worth knowing, and no fault", ("what", "count", "first"), notes)


def stats(
    folders: Folders,
    tokenizer: Tokenizer = None,
    png: Annotated[Path | None, typer.Option(help="File for histograms.")] = None,
) -> None:
    """Print how many samples, pictures, seconds of audio, turns, bytes and tokens of text there are."""
    from mmscale.data_tools.inspection.charts import draw_histograms
    from mmscale.data_tools.inspection.stats import dataset_stats
    from mmscale.streaming.tokenizer import TextTokenizer

    counter = TextTokenizer.load(tokenizer) if tokenizer else None
    values = {}
    for folder in folders:
        with progress("rows") as update:
            found = dataset_stats(folder, update, counter)
        _show_stats(folder, found)
        values[_short_name(folder, folders)] = found.values
    if png:
        draw_histograms(values, png)
        typer.echo(f"{png}: histograms")


def _short_name(folder: Path, folders: list[Path]) -> str:
    """The folder's own name, when no other has it."""
    own = folder.resolve().name
    return own if [f.resolve().name for f in folders].count(own) == 1 else str(folder)


def _show_stats(folder: Path, found: Stats) -> None:
    typer.echo(f"{folder}: {found.samples} samples in {found.shards} shards, {found.bytes / 2**20:.1f} MiB")
    typer.echo("media: " + (", ".join(f"{n} {kind}" for kind, n in found.media.items() if n) or "none"))
    if found.text_tokens:
        by_kind = ", ".join(f"{n:,} {_beside(kind)}" for kind, n in found.text_tokens.most_common())
        typer.echo(f"text tokens: {found.text_tokens.total():,} ({by_kind})")
    rows = [
        (name, f"{s.count}", *(f"{x:.6g}" for x in (s.total, s.smallest, s.median, s.p95, s.largest)))
        for name, s in found.spreads.items()
    ]
    table("spread", ("", "count", "sum", "min", "median", "p95", "max"), rows)
    if found.skipped:
        table("skipped", ("reason", "samples"), counts(found.skipped))


def _beside(media: str) -> str:
    return "without media" if media == "text" else f"beside {media}"


def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG [A.B=VALUE]... | DIR...", help="A run's YAML file, or dataset folders."),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Data-parallel sizes, such as 8,64 (the default); with --fit that of the run.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps to look at; else enough for steady figures.")] = None,
    png: Annotated[Path | None, typer.Option(help="File for a picture.")] = None,
    fit: Annotated[Path | None, typer.Option(help="Run directory: fits data.cost to its step times.")] = None,
    tokenizer: Tokenizer = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Folders: tokens of a pack.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Folders: packs of a step.")] = 64,
    image_tokens: Annotated[int, typer.Option(min=1, help="Folders: tokens of an image or a frame.")] = 576,
    video_frames: Annotated[int, typer.Option(min=1, help="Folders: most frames of a clip.")] = 8,
    audio_tokens_per_s: Annotated[float, typer.Option(min=0, help="Folders: tokens of a second of sound.")] = 25.0,
) -> None:
    """Tell before any training how full packs are, how even the ranks, how long an epoch. No medium is read."""
    from mmscale.data_tools.inspection import plan_tables
    from mmscale.data_tools.inspection.charts import draw_plan
    from mmscale.data_tools.inspection.plan_folders import Assumed, folder_plan
    from mmscale.data_tools.inspection.plan_report import plan_report, run_plan
    from mmscale.streaming.tokenizer import TextTokenizer

    sizes = _numbers(ranks) if ranks else ()
    if fit:
        plan_tables.show_fit(fit, sizes[0] if sizes else None)
        return
    sizes = sizes or (8, 64)
    if words and Path(words[0]).is_dir():
        assumed = Assumed(seq_len, max(sizes), image_tokens, video_frames, audio_tokens_per_s)
        counter = TextTokenizer.load(tokenizer) if tokenizer else None
        with _counting() as on_batch:
            data = folder_plan([Path(word) for word in words], assumed, counter, batch, on_batch)
        plan_tables.show_assumed(assumed, counter is not None)
    else:
        data = run_plan(_open(words))
    report = plan_report(data, sizes, steps)
    plan_tables.show_plan(data, report)
    if png:
        draw_plan(report, png)
        typer.echo(f"{png}: fill, balance and tokens")


def _numbers(text: str) -> tuple[int, ...]:
    from mmscale.errors import ConfigError

    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise ConfigError(f"--ranks: expected numbers such as 8,64, found '{text}'; write them with commas")
    return tuple(int(part) for part in text.split(","))


def _open(words: list[str] | None) -> RunStream:
    """The stream of a run's config and the overrides behind it."""
    from mmscale.data_tools.inspection.run_stream import open_run_stream
    from mmscale.errors import ConfigError

    if not words:
        raise ConfigError("expected a run's config or dataset folders, found neither; see --help")
    with _counting() as on_batch:
        return open_run_stream(Path(words[0]), words[1:], on_batch)


@contextmanager
def _counting() -> Iterator[Callable[[], None]]:
    """A bar while tokens are counted, which is long at the first look at a dataset; gives what moves it on."""
    done = count(1)
    with progress("batches of samples") as update:
        yield lambda: update(next(done), None, "counting tokens")


def preview(
    words: Annotated[
        list[str], typer.Argument(metavar="DIR | CONFIG [A.B=VALUE]...", help="A dataset folder, or a run's YAML file.")
    ],
    out: Annotated[Path, typer.Option(help="PNG file to write; a pack may also be .html.")] = Path("preview.png"),
    num: Annotated[int, typer.Option(help="Folder: samples to show.")] = 8,
    seed: Annotated[int, typer.Option(help="Folder: which samples are drawn.")] = 0,
    tokenizer: Tokenizer = None,
    pack: Annotated[int, typer.Option(help="Config: number of the pack, from 0.")] = 0,
) -> None:
    """Draw some samples of a folder with their text, or one pack of a run exactly as it is trained."""
    if Path(words[0]).is_dir():
        from mmscale.data_tools.inspection.preview import write_preview
        from mmscale.errors import ConfigError

        if len(words) > 1:
            raise ConfigError(f"expected one folder, found {len(words)}; preview them one by one")
        if out.suffix != ".png":
            raise ConfigError(f"--out {out}: expected a name that ends with .png, found '{out.suffix}'; rename it")
        shown = write_preview(Path(words[0]), out, num, seed, tokenizer)
        typer.echo(f"{out}: {shown} samples of {words[0]}")
    else:
        from mmscale.data_tools.inspection.pack_preview import write_pack_preview

        typer.echo(f"{out}: {write_pack_preview(_open(words), pack, out).title}")
