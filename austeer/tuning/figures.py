"""Figures of searches: k by strength as a heat map, settings tried, and methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..utils.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    new_figure,
    require_matplotlib,
    save_figure,
    set_title,
    text_color,
)
from ..utils.tables import signed
from .compare import CompareResult
from .held_out import HeldOut
from .tune import Trial, TuneResult

COLORS = {"scale": GREY, "push": ORANGE, "shift": BLUE, "ablate": GREEN}


def draw_tune(result: TuneResult, path: Path) -> None:
    """A heat map of k and strength for each site and operation, and the settings on held-out data."""
    single = [t for t in result.trials if not t.detail]
    pairs = [(site, operation) for operation in COLORS for site in result.settings["sites"]]
    panels = [(pair, cells) for pair in pairs if (cells := [t for t in single if (t.site, t.operation) == pair])]
    columns = min(3, len(panels) + 1)
    rows = math.ceil((len(panels) + 1) / columns)
    figure, axes = new_figure(columns, rows)
    most = max((t.items for t in single), default=0)
    largest = max((abs(t.effect) for t in single if math.isfinite(t.effect)), default=1.0) or 1.0
    for axis, ((site, operation), cells) in zip(axes, panels):
        _heat_map(axis, cells, largest, most)
        axis.set(title=f"{operation} at {site}", xlabel="alpha, as part of its limit", ylabel="k")
    _forest(axes[len(panels)], result.held_out, "on held-out data")
    set_title(figure, "change of log-odds, nats; n: by how many items it was judged, in bold by the most")
    for axis in axes[len(panels) + 1 :]:
        axis.axis("off")
    save_figure(figure, path)


def _heat_map(axis, cells: Sequence[Trial], largest: float, most: int) -> None:
    """Mean change of log-odds, with alpha in each cell; in bold where it was judged by the most items."""
    ks = sorted({t.k for t in cells})
    fractions = sorted({t.fraction for t in cells})
    places = {(ks.index(t.k), fractions.index(t.fraction)): t for t in cells}
    table = [[math.nan] * len(fractions) for _ in ks]
    for (row, column), t in places.items():
        table[row][column] = t.effect
    image = axis.imshow(table, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto", origin="lower")
    for (row, column), t in places.items():
        assert not isinstance(t.alpha, dict)
        text = f"{signed(t.effect, 2)}\nalpha {t.alpha:.3g}, n {t.items}"
        style = {"color": text_color(image.to_rgba(t.effect)), "weight": "bold" if t.items == most else "normal"}
        axis.text(column, row, text, ha="center", va="center", fontsize=7, **style)
    axis.set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
    axis.set_yticks(range(len(ks)), [str(k) for k in ks])


def draw_compare(result: CompareResult, path: Path) -> None:
    """Effect and accuracy of every method on held-out data, with intervals, and what it does to neutral text."""
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(3)
    figure.set_figheight(1.4 + 0.4 * len(result.held_out))
    _forest(axes[0], result.held_out, "effect")
    rows = result.held_out[::-1]
    values = [row.accuracy for row in rows]
    spread = [[row.accuracy - row.accuracy_low for row in rows], [row.accuracy_high - row.accuracy for row in rows]]
    axes[1].errorbar(values, range(len(rows)), xerr=spread, fmt="o", color=BLUE, ecolor=GREY, capsize=2)
    axes[1].axvline(result.unsteered.accuracy, color="#333333", linewidth=0.8, linestyle="--")
    axes[1].set(title="accuracy (dashed: unsteered)", xlabel="share of items", yticks=[], ylim=axes[0].get_ylim())
    axes[1].xaxis.set_major_locator(MaxNLocator(5))
    axes[2].barh(range(len(rows)), [row.kl for row in rows], color=GREY)
    axes[2].axvline(result.settings["max_kl"], color="#333333", linewidth=0.8, linestyle="--")
    axes[2].set(title="side effect (dashed: the limit)", xlabel="KL on held-out neutral text, nats a token", yticks=[])
    axes[2].set_ylim(axes[0].get_ylim())  # so that the rows of all three are beside their names
    save_figure(figure, path)


def _forest(axis, held_out: Sequence[HeldOut], title: str) -> None:
    rows = held_out[::-1]
    for y, (row, low, high) in enumerate(zip(rows, *spread_of(rows))):
        axis.errorbar(row.effect, y, xerr=[[low], [high]], fmt="o", color=COLORS[row.operation], capsize=2)
    axis.set_yticks(range(len(rows)), [row.name.replace(", ", "\n", 1) for row in rows], fontsize=7)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set(title=title, xlabel="change of log-odds, nats, 95 % interval")


def spread_of(rows: Sequence[HeldOut]) -> list[list[float]]:
    """How far each effect's interval reaches down and up; 0 where there is none."""
    down = [0.0 if row.low is None else row.effect - row.low for row in rows]
    return [down, [0.0 if row.high is None else row.high - row.effect for row in rows]]
