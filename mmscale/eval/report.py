"""A run on one picture: loss curves with the resume points, and held-out questions with answer and truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmscale.figure import new_figure


def read_metrics(run: Path) -> tuple[dict[int, float], dict[int, float], list[int]]:
    """Training loss and validation loss by step, and the steps after which the run was resumed.

    Of a step that was done twice the last line counts.
    """
    train = {row["step"]: row["loss"] for row in _rows(run / "metrics.jsonl")}
    events = _rows(run / "events.jsonl")
    validation = {row["step"]: row["val_loss"] for row in events if row["event"] == "validation"}
    return train, validation, [row["step"] for row in events if row["event"] == "resume"]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_report(run: Path, answers: Sequence[Mapping[str, Any]], scores: Mapping[str, str], out: Path) -> None:
    """Writes the report as a PNG.

    Args:
        run: the run directory.
        answers: up to 24 rows with `picture` (uint8 [height, width, 3]), `question`, `answer`, `truth`.
        scores: task -> score text, shown beside the curves.
        out: the PNG to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(14, 11, "the report picture")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.6])
    top, bottom = halves
    axes = top.subplots(1, 2, width_ratios=[3, 1])
    _draw_curves(axes[0], *read_metrics(run))
    _draw_scores(axes[1], scores)
    cells = bottom.subplots(4, 6).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, row in zip(cells, answers, strict=False):
        _draw_answer(cell, row)
    figure.savefig(out, dpi=90)


def _draw_curves(
    axes: Any, train: Mapping[int, float], validation: Mapping[int, float], resumes: Sequence[int]
) -> None:
    axes.plot(list(train), list(train.values()), color="#4c72b0", linewidth=0.6, alpha=0.35)
    axes.plot(list(train), _running_mean(list(train.values())), color="#4c72b0", label="training (mean of 25 steps)")
    if validation:
        axes.plot(list(validation), list(validation.values()), "o-", color="#dd8452", label="validation (held out)")
    for number, step in enumerate(resumes):
        axes.axvline(step, color="#55a868", linestyle="--", label="stopped and resumed" if number == 0 else None)
    axes.set(xlabel="optimizer step", ylabel="loss per target token", yscale="log", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _running_mean(values: Sequence[float], width: int = 25) -> list[float]:
    """The mean of each value and the `width - 1` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))]


def _draw_scores(axes: Any, scores: Mapping[str, str]) -> None:
    axes.set_axis_off()
    axes.set_title("Exact match, held out")
    for i, (task, score) in enumerate(scores.items()):
        axes.text(0.05, 0.9 - 0.1 * i, task, transform=axes.transAxes, fontsize=12)
        axes.text(0.95, 0.9 - 0.1 * i, score, transform=axes.transAxes, fontsize=12, ha="right")


def _draw_answer(cell: Any, row: Mapping[str, Any]) -> None:
    cell.imshow(row["picture"])
    right = row["answer"] == row["truth"]
    cell.set_title(
        f"{row['question']}\nanswer: {row['answer']}   truth: {row['truth']}",
        fontsize=8,
        color="#1a7f37" if right else "#cf222e",
    )
