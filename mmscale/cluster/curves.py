"""The picture of a run: loss, throughput, fill and data wait over its steps, and where its time went."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import ConfigError
from mmscale.figure import new_figure
from mmscale.train.goodput import CATEGORIES, Account, duration
from mmscale.train.history import Event, History, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]

NUM_BINS = 700
"""Curves of more than twice as many steps are drawn as the median of so many bins, in a band from the smallest to the largest value."""

MAX_BORDERS = 40
"""Attempts whose borders are drawn; more would cover the curve."""

_NUM_LABELS = 8
_LABEL_CHARS = 12
_NUM_DOTS = 60
_DPI = 110
_COLOURS = {
    "compute": "#2a7f3f", "data_wait": "#d8b100", "exposed_comm": "#7b5ea7", "checkpoint": "#2f6fb0", "validation": "#6cb4d9",
    "redone": "#c0392b", "startup": "#e08a3c", "hang": "#6e1423", "shutdown": "#a5866b", "queue": "#9aa0a6", "idle": "#d5d8db",
    "other": "#444444",
}  # fmt: skip
_MARKS = {
    "rollback": "#6e1423",
    "spike": "#c0392b",
    "nonfinite": "#000000",
    "save_failed": "#e08a3c",
    "straggler": "#7b5ea7",
}
"""Events that get a line of their colour across the loss."""


class Curves:
    """The steps of a run as columns, filled from the newest back. Cost: 41 bytes per execution of a step."""

    def __init__(self) -> None:
        self._steps, self._lost = array("d"), array("b")
        self._columns = {name: array("d") for name in ("loss", "tokens_per_s", "fill", "data_wait")}

    def add(self, step: Step, is_lost: bool) -> None:
        """One step before those that are there; `is_lost`: it was done again later."""
        self._steps.append(step.step)
        self._lost.append(is_lost)
        values = (step.loss, step.tokens_per_s, step.fill, step.data_wait_frac)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(math.nan if value is None else value)

    @property
    def step(self) -> Values:
        """Numbers of the steps in the order in which they were done."""
        return np.array(self._steps)[::-1]

    @property
    def is_lost(self) -> NDArray[np.bool_]:
        """Which of them were done again later."""
        return np.array(self._lost, dtype=bool)[::-1]

    def column(self, name: str) -> Values:
        """`loss`, `tokens_per_s`, `fill` or `data_wait` of them; nan = none."""
        return np.array(self._columns[name])[::-1]


@dataclass(frozen=True)
class Band:
    """A curve with the smallest and the largest value around each of its points, which are medians."""

    x: Values
    low: Values
    middle: Values
    high: Values


def thin(x: Values, y: Values, num_bins: int = NUM_BINS) -> Band:
    """A curve of at most one point per bin; short curves as they are.

    Example:
        >>> band = thin(np.arange(6.0), np.array([0, 9, 1, 2, -3, 4.0]), 2)
        >>> band.x.tolist(), band.low.tolist(), band.middle.tolist(), band.high.tolist()
        ([1.0, 4.0], [0.0, -3.0], [1.0, 2.0], [9.0, 4.0])
    """
    if len(x) <= 2 * num_bins:
        return Band(x, y, y, y)
    bins = np.array_split(y, num_bins)
    middle = [float(np.nanmedian(one)) if np.isfinite(one).any() else math.nan for one in bins]
    low, high = ([float(pick.reduce(one)) for one in bins] for pick in (np.fmin, np.fmax))
    x = np.array([one[len(one) // 2] for one in np.array_split(x, num_bins)])
    return Band(x, np.array(low), np.array(middle), np.array(high))


def draw(history: History, curves: Curves, account: Account, out: Path) -> None:
    """Writes the PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: `out` cannot be written.
    """
    figure = new_figure(11, 12.5, "the picture of a run")
    grid = figure.subplots(5, 1, gridspec_kw={"height_ratios": [3, 2, 1.5, 1.5, 1.3]})
    panels: list[Axes] = list(grid)
    titles = {
        "loss": "loss", "tokens_per_s": "tokens/s", "fill": "fill of the packs", "data_wait": "share of the step\nwaiting for data",
    }  # fmt: skip
    for panel, (name, label) in zip(panels, titles.items(), strict=False):
        _draw_curve(panel, curves, name)
        _draw_borders(panel, history, account, with_labels=panel is panels[0])
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
        panel.sharex(panels[0])
        panel.tick_params(labelbottom=panel is panels[3])
    for panel in panels[2:4]:
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter("{x:.0%}")
    panels[1].set_ylim(bottom=0)
    panels[1].yaxis.set_major_formatter("{x:,.0f}")
    panels[3].set_xlabel("optimizer step")
    panels[3].xaxis.set_major_formatter("{x:,.0f}")
    _draw_events(panels[0], history.events)
    panels[0].legend(fontsize=8, loc="upper right", framealpha=0.9)
    _draw_goodput(panels[4], account)
    total = "" if history.total_steps is None else f" of {history.total_steps:,}"
    last = int(curves.step[-1]) if len(curves.step) else 0
    figure.suptitle(f"{history.folder.name}: step {last:,}{total}, {len(history.attempts)} attempts", fontsize=12)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=_DPI, format="png")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --out") from error


def _draw_curve(panel: Axes, curves: Curves, name: str) -> None:
    steps, values, is_lost = curves.step, curves.column(name), curves.is_lost
    kept = thin(steps[~is_lost], values[~is_lost])
    dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(kept.x) <= _NUM_DOTS else {}
    panel.plot(kept.x, kept.middle, color="#1f4e79", linewidth=1.1, label="steps that count", zorder=3, **dots)
    if kept.middle is not kept.low:
        label = f"smallest to largest of {np.count_nonzero(~is_lost) // NUM_BINS:,} steps"
        panel.fill_between(kept.x, kept.low, kept.high, color="#1f4e79", alpha=0.18, linewidth=0, label=label)
    lost = np.flatnonzero(is_lost)
    if not lost.size:
        return
    # a new piece wherever the numbers do not go on, so that attempts are not joined by a line
    pieces = np.split(lost, np.flatnonzero((np.diff(lost) > 1) | (np.diff(steps[lost]) != 1)) + 1)
    for number, piece in enumerate(pieces):
        again = thin(steps[piece], values[piece])
        # wide and behind: a step that was done again gives the same loss to the bit, and would lie under the curve
        panel.plot(
            again.x, again.middle, color="#c0392b", alpha=0.3, linewidth=4, solid_capstyle="butt", label=None if number else "done again later",
            marker="o" if len(piece) == 1 else "", markersize=6, markeredgewidth=0,
        )  # fmt: skip


def _draw_borders(panel: Axes, history: History, account: Account, with_labels: bool) -> None:
    """A line where each later attempt goes on."""
    borders = [(n, one) for n, one in enumerate(account.attempts, 1) if n > 1 and one.first_step is not None]
    if len(borders) > MAX_BORDERS:
        return
    for number, one in borders:
        assert one.first_step is not None, "those without were left out"
        panel.axvline(one.first_step - 0.5, color="#555555", linestyle=":", linewidth=0.9)
        if with_labels and len(borders) <= _NUM_LABELS:
            panel.annotate(
                f" {one.token if len(one.token) <= _LABEL_CHARS else f'attempt {number}'}", (one.first_step - 0.5, 1.0), xycoords=("data", "axes fraction"), fontsize=7.5,
                color="#555555", rotation=30, ha="left", va="bottom", annotation_clip=False,
            )  # fmt: skip


def _draw_events(panel: Axes, events: Iterable[Event]) -> None:
    seen: set[str] = set()
    checked = [
        (one.step, one.details["val_loss"]) for one in events if one.name == "validation" and "val_loss" in one.details
    ]
    if checked:
        x, y = zip(*checked, strict=True)
        panel.plot(x, y, "D", color="#e08a3c", markersize=4.5, label="validation loss", zorder=4)
    for event in events:
        if event.name in _MARKS:
            label = None if event.name in seen else event.name.replace("_", " ")
            panel.axvline(event.step, color=_MARKS[event.name], linewidth=1.2, alpha=0.7, label=label)
            seen.add(event.name)


def _draw_goodput(panel: Axes, account: Account) -> None:
    left, wall = 0.0, account.wall_s or 1.0
    for name in CATEGORIES:
        share = account.seconds[name] / wall
        if share <= 0:
            continue
        label = f"{name.replace('_', ' ')} {share:.1%}"
        panel.barh(0, share, left=left, color=_COLOURS[name], edgecolor="white", linewidth=0.6, label=label)
        if share > 0.06:
            colour = "black" if name in ("data_wait", "queue", "idle", "validation") else "white"
            panel.text(left + share / 2, 0, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=9)
        left += share
    panel.set(xlim=(0, 1), ylim=(-0.5, 0.5), yticks=[])
    panel.xaxis.set_major_formatter("{x:.0%}")
    panel.set_title(
        f"where {duration(account.wall_s)} of wall-clock went: goodput {account.goodput:.1%}", fontsize=10, loc="left"
    )
    if account.wall_s:
        panel.legend(fontsize=8, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False)
