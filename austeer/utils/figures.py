"""Figures, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

from ..errors import AusteerError

#: Letters of a title in an inch.
LETTERS = 12

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9822b", "#2e8b57", "#9aa0a6"


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


def set_title(figure, text: str) -> None:
    """The figure's title, in as many lines as its width asks for."""
    figure.suptitle(textwrap.fill(text, int(LETTERS * figure.get_figwidth())), fontsize=10)


def text_color(color) -> str:
    """Black or white, whichever is read better on a ground of ``color``, as matplotlib names it, on white."""
    from matplotlib.colors import to_rgba

    *parts, opacity = to_rgba(color)
    parts = [opacity * part + 1 - opacity for part in parts]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # as WCAG 2 defines it
    return "black" if luminance > 0.179 else "white"  # where both have the same contrast


def save_figure(figure, path: Path) -> None:
    """Raises AusteerError if it cannot be written, or its name has no known ending."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise AusteerError(
            f"{path}: cannot be drawn ({error}); expected a name ending in .png, .svg or .pdf"
        ) from error
