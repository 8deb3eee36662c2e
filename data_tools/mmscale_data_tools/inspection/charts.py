"""The pictures of `stats` and `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import ConfigError
from mmscale.figure import new_figure
from mmscale.types import MODALITIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmscale.data_tools.inspection.plan_report import PlanReport

Values = NDArray[Any]

_NOTHING = np.zeros(0)
_BINS = 40
_COLUMNS = 3
_WIDE = 100
"""Quantities whose largest value is so many times the smallest get a logarithmic axis."""


def draw_histograms(sources: Mapping[str, Mapping[str, Values]], out: Path) -> None:
    """Writes a PNG with a histogram per quantity, a line per source.

    Args:
        sources: source -> quantity (with its unit) -> values.
        out: the PNG to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: `out` cannot be written.
    """
    quantities = list(dict.fromkeys(name for values in sources.values() for name in values))
    rows = max(1, -(-len(quantities) // _COLUMNS))
    figure = new_figure(5 * _COLUMNS, 3.4 * rows, "the histograms")
    panels = np.atleast_1d(figure.subplots(rows, _COLUMNS)).ravel()
    for panel, quantity in zip(panels, quantities, strict=False):
        _draw_histogram(panel, quantity, {name: values.get(quantity, _NOTHING) for name, values in sources.items()})
    for panel in panels[len(quantities) :]:
        panel.set_axis_off()
    save(figure, out)


def _draw_histogram(panel: Axes, quantity: str, sources: Mapping[str, Values]) -> None:
    together = np.concatenate(list(sources.values()))
    low, high = float(together.min()), float(together.max())
    logarithmic = low > 0 and high > _WIDE * low
    edges = np.geomspace(low, high, _BINS) if logarithmic else np.linspace(low, high if high > low else low + 1, _BINS)
    alone = len(sources) == 1
    for i, (name, values) in enumerate(sources.items()):
        if values.size:
            panel.stairs(np.histogram(values, edges)[0], edges, fill=alone, color=f"C{i}", label=name)
    panel.set(title=quantity, xscale="log" if logarithmic else "linear", ylabel="count")
    panel.grid(alpha=0.3)
    if not alone:
        panel.legend(fontsize=8)


def save(figure: Figure, out: Path) -> None:
    """Writes a figure as PNG. Raises ConfigError when `out` cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=90, format="png")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --png") from error


def draw_plan(report: PlanReport, out: Path) -> None:
    """Writes a PNG: how full the packs are, how even the cost of each micro-step is, and which tokens each source gives.

    Raises as `draw_histograms`.
    """
    figure = new_figure(16, 4.8, "the picture of the plan")
    fill, balance, tokens = figure.subplots(1, 3)
    _draw_fill(fill, report)
    _draw_balance(balance, report)
    _draw_tokens(tokens, report)
    save(figure, out)


def _draw_fill(panel: Axes, report: PlanReport) -> None:
    low = min(0.95, float(report.fill.min()))
    panel.stairs(*np.histogram(report.fill * 100, np.linspace(low * 100, 100, _BINS)), fill=True)
    panel.set(
        title=f"fill of {len(report.fill)} packs, mean {report.fill.mean():.2%}", xlabel="% of seq_len", ylabel="packs"
    )
    panel.set_yscale("symlog")
    panel.grid(alpha=0.3)


def _draw_balance(panel: Axes, report: PlanReport) -> None:
    for i, found in enumerate(report.imbalance):
        turns = np.arange(len(found.ratios)) * found.ranks
        panel.plot(turns, found.ratios, color=f"C{i}", label=f"{found.ranks} ranks, mean {found.mean:.3f}")
        panel.plot(
            turns,
            found.random_ratios,
            color=f"C{i}",
            alpha=0.35,
            linestyle=":",
            label=f"random order, {found.random_mean:.3f}",
        )
    panel.set(title="cost of a micro-step: dearest rank / mean", xlabel="pack", ylabel="max / mean")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def _draw_tokens(panel: Axes, report: PlanReport) -> None:
    names = [source.name for source in report.sources]
    bottom = np.zeros(len(names))
    total = sum(sum(source.tokens.values()) for source in report.sources)
    for kind in ("text", *MODALITIES):
        shares = np.array([100 * source.tokens.get(kind, 0) / total for source in report.sources])
        if shares.any():
            panel.barh(names, shares, left=bottom, label=kind)
        bottom += shares
    panel.set(title="tokens by source and kind", xlabel="% of all tokens")
    panel.invert_yaxis()
    panel.legend(fontsize=8)
