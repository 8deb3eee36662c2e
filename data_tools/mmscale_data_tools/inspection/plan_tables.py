"""A plan's report as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import typer

from mmscale.data_tools.console import counts, table
from mmscale.data_tools.inspection.plan_folders import BYTES_PER_TOKEN, Assumed
from mmscale.data_tools.inspection.plan_report import PlanInput, PlanReport, SourceReport
from mmscale.types import MODALITIES


def show_plan(data: PlanInput, report: PlanReport) -> None:
    """Prints the report: packs, sources, balance, what is left out, the longest samples, advice."""
    rules, packs = data.plan.rules, len(report.fill)
    typer.echo(
        f"run: {data.steps:,} steps of {data.global_batch} packs of {rules.seq_len:,} tokens; looked at the first {packs:,} packs"
    )
    low = (report.fill < 0.98).mean()
    typer.echo(
        f"fill: mean {report.fill.mean():.2%}, least {report.fill.min():.2%}, {low:.1%} of the packs below 98 %; padding: none, "
        f"a pack is as long as its {report.documents:.1f} documents (on average)"
    )
    _show_sources(report)
    _show_balance(report)
    skipped = sum((Counter(source.skipped) for source in report.sources), Counter[str]())
    if skipped:
        table("left out of every epoch", ("reason", "samples"), counts(skipped))
    rows = [(sample, f"{tokens:,}", reason or "") for sample, tokens, reason in report.largest]
    table("longest samples", ("sample", "tokens", "left out"), rows)
    for line in report.advice:
        typer.echo(f"advice: {line}")


def _show_sources(report: PlanReport) -> None:
    kinds = [kind for kind in ("text", *MODALITIES) if any(source.tokens[kind] for source in report.sources)]
    total = sum(sum(source.tokens.values()) for source in report.sources)
    rows = [(*_source_cells(s), *(f"{s.tokens[kind] / total:.1%}" for kind in kinds)) for s in report.sources]
    typer.echo(
        f"below: share of the draws, epochs in the run, steps of one epoch, share of all tokens ({', '.join(kinds)})"
    )
    table("sources", ("source", "samples", "usable", "draws", "epochs", "steps", *kinds), rows)


def _source_cells(source: SourceReport) -> Iterator[str]:
    yield source.name
    yield f"{source.rows:,}"
    yield f"{source.usable:,}"
    yield f"{source.share:.1%}"
    yield f"{source.epochs:.3g}"
    yield f"{source.epoch_steps:.4g}"


def _show_balance(report: PlanReport) -> None:
    rows = [
        (str(b.ranks), f"{b.mean:.4f}", f"{b.worst:.4f}", f"{b.random_mean:.4f}", f"{b.random_worst:.4f}")
        for b in report.imbalance
    ]
    if rows:
        header = ("ranks", "mean", "worst", "random order: mean", "worst")
        table("cost of the dearest rank / mean over ranks, per micro-step", header, rows)


def show_assumed(assumed: Assumed, counted: bool) -> None:
    """Says what a plan of folders takes for granted."""
    text = (
        "counted, without chat template" if counted else f"estimated as {BYTES_PER_TOKEN} bytes each (give --tokenizer)"
    )
    typer.echo(
        f"assumed: {assumed.image_tokens} tokens an image or frame, at most {assumed.frames} frames a clip, "
        f"{assumed.audio_tokens_per_s:g} tokens a second of sound, the cost of a 7B model; text tokens are {text}"
    )


def show_fit(run: Path, ranks: int | None) -> None:
    """Fits the cost to a run and prints it as YAML."""
    from mmscale.data_tools.inspection.plan_fit import fit_run

    found = fit_run(run, ranks)
    error = found.fitted
    typer.echo(
        f"{run}: {found.steps} steps on {found.ranks} ranks; steps that the fit had not seen are predicted within "
        f"{error.mean_error:.2%} on average, {error.worst_error:.2%} at worst"
    )
    typer.echo(
        "in seconds, for the config of the next run (another cost is another plan: a run cannot change it on its way):"
    )
    typer.echo(found.yaml, nl=False)
