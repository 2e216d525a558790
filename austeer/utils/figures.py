"""Figures, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..errors import AusteerError

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#9aa0a6"


def require_matplotlib() -> None:
    """Raises AusteerError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise AusteerError("figures need matplotlib: pip install 'austeer[plots]'")


def new_figure(columns: int, rows: int = 1):
    """A figure and its panels, row by row. Raises AusteerError if matplotlib is not installed."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained", dpi=150)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    """Raises AusteerError if it cannot be written, or its name has no known ending."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise AusteerError(
            f"{path}: cannot be drawn ({error}); expected a name ending in .png, .svg or .pdf"
        ) from error
