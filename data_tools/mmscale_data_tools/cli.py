"""The command `mmscale-data`: what writes shards; what only looks at them is in `cli_inspect`. Heavy imports are lazy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmscale.config.env import secrets_from_env
from mmscale.data_tools import cli_inspect
from mmscale.data_tools.console import Folders, counts, progress, table
from mmscale.data_tools.kinds import HELP as KINDS_HELP
from mmscale.data_tools.kinds import Kind, Placement
from mmscale.errors import ConfigError, MmscaleError, RefusedInputError
from mmscale.redact import hide, redact

if TYPE_CHECKING:
    from mmscale.data_tools.build import BuildReport

Inputs = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Dataset folders, folders of tars, or tars.")]
Out = Annotated[Path, typer.Option(help="Dataset folder to write.")]
ShardMb = Annotated[int, typer.Option(min=1, help="Largest size of a shard in MiB.")]
ShardSamples = Annotated[int, typer.Option(min=1, help="Most samples in a shard.")]
Rename = Annotated[bool, typer.Option("--rename", help="Running numbers as keys, where tars have a key twice.")]
Zstd = Annotated[bool, typer.Option("--zstd", help="Write .tar.zst, for text; media in them are refused.")]
Force = Annotated[bool, typer.Option("--force", help="Write media into .tar.zst all the same.")]

app = typer.Typer(
    name="mmscale-data",
    help="Build, index, reshard, filter, verify and look at WebDataset shards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("convert")
@app.command("build")
def build(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Files or folders, as the kind says.")],
    kind: Annotated[Kind, typer.Option("--from", help=KINDS_HELP)],
    out: Out,
    media: Annotated[Path | None, typer.Option(help="Folder that file names in the rows are relative to.")] = None,
    captions: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of caption sidecars for tars; a second one holds long descriptions."),
    ] = None,
    placement: Annotated[
        Placement, typer.Option(help="front: media tags to the front of their turn, as LLaVA's code does.")
    ] = Placement.keep,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Take img2dataset's tars without a stats file too.")
    ] = False,
    rename: Rename = False,
    shard_mb: ShardMb = 512,
    shard_samples: ShardSamples = 10_000,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")] = False,
    zstd: Zstd = False,
    force: Force = False,
) -> None:
    """Write foreign data as shards with index and manifest. Stopped half-way, the same command continues."""
    from mmscale.data_tools.build import BuildOptions, build
    from mmscale.data_tools.readers.items import Source

    if captions and len(captions) > 2:
        raise ConfigError(f"--captions is given {len(captions)} times; give one folder, or two (short, long)")
    source = Source(tuple(sources), media, tuple(captions or ()), placement, unfinished, rename)
    options = BuildOptions(shard_mb * 2**20, shard_samples, strict, zstd, force)
    with progress("rows") as update:
        report = build(kind, source, out, options, lambda rows: update(rows, None, ""))
    _show(report, out)


@app.command()
def reshard(
    folders: Inputs,
    out: Out,
    shuffle: Annotated[int | None, typer.Option(help="Seed of a random order; the folders must be indexed.")] = None,
    rename: Rename = False,
    shard_mb: ShardMb = 512,
    shard_samples: ShardSamples = 10_000,
    zstd: Zstd = False,
    force: Force = False,
) -> None:
    """Write the samples of datasets or tars (also .tar.gz, .tar.zst) as new shards, as they are."""
    from mmscale.data_tools.build import BuildOptions
    from mmscale.data_tools.reshard import reshard

    options = BuildOptions(shard_mb * 2**20, shard_samples, zstd=zstd, force=force)
    with progress("samples") as update:
        report = reshard(folders, out, options, shuffle, rename, lambda rows: update(rows, None, ""))
    _show(report, out)


@app.command("filter")
def filter_(
    folders: Folders,
    out: Out,
    keys: Annotated[Path | None, typer.Option(help="File of keys to keep, one per line.")] = None,
    drop_keys: Annotated[Path | None, typer.Option(help="File of keys to leave out, one per line.")] = None,
    where: Annotated[
        str | None,
        typer.Option(help="Condition, such as 'width >= 64 and json.lang == \"en\"'; see docs/build-shards.md."),
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Leave out samples with the media and text of an earlier one.")
    ] = False,
    rename: Rename = False,
    shard_mb: ShardMb = 512,
    shard_samples: ShardSamples = 10_000,
    zstd: Zstd = False,
    force: Force = False,
) -> None:
    """Write the samples of datasets that meet conditions as new shards; the others are counted and listed."""
    from mmscale.data_tools.build import BuildOptions
    from mmscale.data_tools.filtering import Selection, filter_samples

    options = BuildOptions(shard_mb * 2**20, shard_samples, zstd=zstd, force=force)
    selection = Selection.read(keys, drop_keys, where, dedup)
    with progress("samples") as update:
        report = filter_samples(folders, out, selection, options, rename, lambda rows: update(rows, None, ""))
    _show(report, out)


def _show(report: BuildReport, out: Path) -> None:
    """Prints what was written. Raises RefusedInputError when that is nothing."""
    typer.echo(f"{out}: {report.rows} rows = {report.samples} samples + {report.rows - report.samples} skipped")
    if report.dropped_turns:
        typer.echo(f"{report.dropped_turns} leading turns that are not the user's will be dropped on reading")
    if report.skipped:
        table(f"skipped (listed in {out / 'skipped.jsonl'})", ("reason", "rows"), counts(report.skipped))
    if not report.samples:
        raise RefusedInputError(
            f"{out}: expected at least one usable row, found none of {report.rows}; see the table above"
        )


@app.command()
def index(
    folders: Folders,
    wids: Annotated[bool, typer.Option("--wids", help="Write wids-meta.json too, for wids and VILA.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Read shards again that did not change.")] = False,
) -> None:
    """Write the index of every shard in a folder, and its manifest. Use it for tars from elsewhere. Stopped, it goes on."""
    for folder in folders:
        _index(folder, wids, again)


def _index(folder: Path, wids: bool, again: bool) -> None:
    from mmscale.data_tools.indexing import index_folder

    with progress("shards") as update:
        report = index_folder(folder, update, wids=wids, again=again)
    manifest = report.manifest
    kept = f" ({report.kept} unchanged)" if report.kept else ""
    typer.echo(
        f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards{kept}, fingerprint {manifest.fingerprint}"
    )
    for finding in report.findings:
        typer.echo(f"note: {finding}")
    if report.skipped:
        table("skipped", ("reason", "samples"), counts(report.skipped))
    if manifest.quarantined:
        table("shards put aside", ("shard", "reason"), list(manifest.quarantined.items()))


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="Folder to write the demo data to.")]) -> None:
    """Write the demo's data: handwritten digits, rendered words, beeps and text, as real shards."""
    from mmscale.data_tools.demo import write_demo

    write_demo(folder)


cli_inspect.register(app)


def main() -> None:
    """Runs the command line; an error that we know is one line and its exit code, never a traceback."""
    from mmscale.logging import setup

    setup(level="WARNING")
    hide(secrets_from_env())
    try:
        app()
    except MmscaleError as e:
        typer.echo(redact(f"mmscale-data: {' '.join(str(e).split())}"), err=True)
        sys.exit(e.exit_code)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""  # a full disk is told without a name
        text = f"mmscale-data: {where}{e.strerror or e}; check the path, its permissions and the space left"
        typer.echo(redact(text), err=True)
        sys.exit(1)
