"""An empty figure to draw on: the one module that imports matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmscale.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width_in: float, height_in: float, needed_for: str) -> Figure:
    """A figure of this size in inches; `savefig` writes it, no display is needed.

    Raises MissingExtraError when matplotlib is not installed; the text says what it is `needed_for`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "demo", needed_for, error) from error
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
