"""Draws a figure's data with matplotlib: one PNG on its own white ground, for light and dark pages alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from austeer.utils.figures import require_matplotlib
from austeer.utils.tables import signed

#: The ground, text, and lines of little weight.
_PAGE, _TEXT, _WEAK, _BAND = "#ffffff", "#1f2328", "#d1d9e0", "#59636e"
_CYCLE = ("#3987e5", "#e36209", "#2da44e", "#a371f7", "#c69026", "#e5534b", "#39c5cf", "#d4679f")
_MARKERS = "osD^vP<>X*"
#: Beyond this many percent the axis goes on logarithmically, so that small overheads stay readable beside large ones.
_LINEAR = 5.0


def make(drawing: str, data: Mapping[str, Any]):
    """A matplotlib figure of ``data``, drawn by the function of that name."""
    require_matplotlib()
    from matplotlib import rc_context

    style: dict[str, Any] = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), _PAGE),
        **dict.fromkeys(("grid.color", "axes.edgecolor", "legend.edgecolor"), _WEAK),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
    }
    with rc_context(style):  # type: ignore[arg-type]
        figure = _DRAWINGS[drawing](data)
        figure.suptitle(data["title"], fontsize=11)
    return figure


def _axes(panels: int, columns: int, width: float, height: float):
    """A figure with so many axes, each ``width`` x ``height`` inches, in rows of ``columns``."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5), layout="constrained", dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[panels:]:
        axis.remove()
    return figure, list(axes[:panels])


def _percent_axis(axis, least: float, most: float) -> None:
    """Linear, or, where overheads are large, linear in the middle and logarithmic beyond it."""
    from matplotlib.ticker import FuncFormatter

    if max(abs(least), abs(most)) > 6 * _LINEAR:
        axis.set_xscale("symlog", linthresh=_LINEAR, linscale=1.2)
        axis.set_xticks(
            [t for t in (-30, -10, -5, -2, 0, 2, 5, 10, 30, 100, 300, 1000) if 1.3 * least <= t <= 1.3 * most]
        )
        axis.set_xlim(min(1.3 * least, -1), 1.4 * most)
        axis.xaxis.minorticks_off()
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))


def _overheads(data: Mapping[str, Any]):
    """Points with intervals: a row for each variant, a colour for each batch; the band of two unsteered runs."""
    panels = data["panels"]
    names = list(dict.fromkeys(mark[0] for panel in panels for mark in panel["marks"]))
    batches = sorted({mark[1] for panel in panels for mark in panel["marks"]})
    height = 1.1 + len(names) * (0.18 + 0.13 * len(batches))
    figure, axes = _axes(len(panels), 2, 5.2, height)
    for number, (axis, panel) in enumerate(zip(axes, panels)):
        noise, ends = panel["noise"], [panel["noise"], -panel["noise"]]
        axis.axvspan(-noise, noise, color=_BAND, alpha=0.22, linewidth=0, label="A/A: unsteered twice")
        axis.axvline(0, color=_TEXT, linewidth=0.9)
        for at, batch in enumerate(batches):
            own = [mark for mark in panel["marks"] if mark[1] == batch]
            if not own:
                continue
            offset = (at - (len(batches) - 1) / 2) * 0.7 / max(len(batches), 2)
            places = [names.index(mark[0]) + offset for mark in own]
            medians = [mark[2] for mark in own]
            spread = [[mark[2] - mark[3] for mark in own], [mark[4] - mark[2] for mark in own]]
            style = {"fmt": _MARKERS[at], "color": _CYCLE[at % len(_CYCLE)], "markersize": 5, "capsize": 2.5}
            axis.errorbar(medians, places, xerr=spread, label=f"batch {batch}", elinewidth=1.3, **style)
            ends += [mark[i] for mark in own for i in (3, 4)]
        axis.set_yticks(range(len(names)), names if number % 2 == 0 else [""] * len(names))
        axis.set_ylim(len(names) - 0.4, -0.6)
        _percent_axis(axis, min(ends), max(ends))
        axis.set(xlabel="overhead, % over unsteered (95 % interval)", title=panel["title"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _bars(data: Mapping[str, Any]):
    """Horizontal bars, with their values; with an interval where one is given."""
    from matplotlib.ticker import MaxNLocator

    panels = data["panels"]
    most = max(len(panel["bars"]) for panel in panels)
    figure, axes = _axes(len(panels), 2, 5.2 if len(panels) > 1 else 8.5, 1.0 + 0.33 * most)
    for axis, panel in zip(axes, panels):
        bars = panel["bars"]
        places, values = range(len(bars)), [bar[1] for bar in bars]
        spread = [[bar[1] - bar[2] for bar in bars], [bar[3] - bar[1] for bar in bars]] if len(bars[0]) > 2 else None
        axis.barh(places, values, 0.66, xerr=spread, color=_CYCLE[0], ecolor=_TEXT, capsize=3)
        ends = [bar[-1] for bar in bars]
        least = min([0, *(bar[2] for bar in bars)]) if spread else 0
        margin = 0.012 * (max(ends) - least)
        for place, end, value in zip(places, ends, values):
            axis.text(max(end, 0) + margin, place, f"{value:#.3g}" if spread is None else signed(value, 2), va="center")
        axis.set_yticks(places, [bar[0] for bar in bars])
        axis.set_ylim(len(bars) - 0.45, -0.55)
        axis.set_xlim(least * 1.05, least + (max(ends) - least) * 1.18)
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set(xlabel=data["x"], title=panel["title"])
    return figure


def _ratios(data: Mapping[str, Any]):
    """Ratios as points: a row a task, a colour and mark a site; the band in which they are meant to be."""
    panels = data["panels"]
    tasks, sites = (list(dict.fromkeys(mark[at] for panel in panels for mark in panel["marks"])) for at in (0, 1))
    figure, axes = _axes(len(panels), 2, 5.2, 1.2 + 0.45 * len(tasks))
    most = max(mark[2] for panel in panels for mark in panel["marks"])
    for number, (axis, panel) in enumerate(zip(axes, panels)):
        axis.axvspan(1 - data["near"], 1 + data["near"], color=_BAND, alpha=0.22, linewidth=0)
        axis.axvline(1, color=_TEXT, linewidth=0.9)
        for at, site in enumerate(sites):
            own = [mark for mark in panel["marks"] if mark[1] == site]
            offset = (at - (len(sites) - 1) / 2) * 0.6 / max(len(sites), 2)
            places = [tasks.index(mark[0]) + offset for mark in own]
            axis.plot([mark[2] for mark in own], places, _MARKERS[at], color=_CYCLE[at], markersize=5, label=site)
        axis.set_yticks(range(len(tasks)), tasks if number % 2 == 0 else [""] * len(tasks))
        axis.set_ylim(len(tasks) - 0.4, -0.6)
        axis.set_xlim(0, max(1.5, 1.05 * most))
        axis.set(xlabel=data["x"], title=panel["title"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


_DRAWINGS: dict[str, Callable[[Mapping[str, Any]], Any]] = {"overheads": _overheads, "bars": _bars, "ratios": _ratios}
