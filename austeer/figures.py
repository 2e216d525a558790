"""Figures, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import AusteerError

if TYPE_CHECKING:
    from .demo import DemoResult
    from .overview import Overview

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#9aa0a6"


def require_matplotlib() -> None:
    """Raises AusteerError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise AusteerError("figures need matplotlib: pip install 'austeer[plots]'")


def _figure(panels: int):
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained", dpi=150)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise AusteerError(
            f"{path}: cannot be drawn ({error}); expected a name ending in .png, .svg or .pdf"
        ) from error


def draw_overview(overview: Overview, path: Path) -> None:
    """AUs by layer; for a momentum file also |beta| against what chance alone would give."""
    figure, axes = _figure(2 if overview.beta_histogram else 1)
    axes[0].bar(range(len(overview.by_layer)), overview.by_layer, color=BLUE)
    axes[0].set(xlabel="decoder layer", ylabel="AUs", title=f"top {len(overview.units)} AUs of site {overview.site}")
    if overview.beta_histogram:
        found, chance = overview.beta_histogram
        places = [(i + 0.5) / len(found) for i in range(len(found))]
        axes[1].bar(places, found, width=0.9 / len(found), color=BLUE, label="measured")
        axes[1].step(places, chance, where="mid", color=ORANGE, label="fair coin")
        axes[1].set(xlabel="|beta|", ylabel="AUs", yscale="log", ylim=(0.5, None), xlim=(0.45, 1))
        axes[1].set_title(overview.origin, fontsize=9)
        axes[1].legend(frameon=False)
    _save(figure, path)


def draw_demo(result: DemoResult, path: Path) -> None:
    """Held-out effect with its interval, trade-off on the tuning pairs, and the cost of each path."""
    figure, axes = _figure(3)
    rows = result.held_out[::-1]
    colors = [GREY if row.name.startswith("random") else BLUE for row in rows]
    spread = [[row.effect - row.low for row in rows], [row.high - row.effect for row in rows]]
    axes[0].barh(range(len(rows)), [row.effect for row in rows], xerr=spread, color=colors, ecolor="#333333", capsize=3)
    names = [row.name.replace(", ", "\n", 1) for row in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].axvline(0, color="#333333", linewidth=0.8)
    axes[0].set(xlabel="change of log-odds on held-out pairs, nats", title="Effect, with its interval")

    markers = {"attention": "o", "ffn": "s", "layer": "^", "neuron": "D"}
    for operation, color in zip(("scale", "push", "shift"), (GREY, ORANGE, BLUE)):
        for site, marker in markers.items():
            trials = [t for t in result.trials if (t.operation, t.site) == (operation, site)]
            if trials:
                points = [[getattr(t, name) for t in trials] for name in ("side_effect", "effect")]
                axes[1].scatter(*points, s=22, color=color, marker=marker, label=f"{operation}, {site}")
    axes[1].scatter(result.chosen.side_effect, result.chosen.effect, s=140, facecolors="none", edgecolors="black")
    axes[1].set(
        xlabel="side effect on neutral text, nats a token", ylabel="change of log-odds, nats", title="Settings tried"
    )
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    timings = list(result.timings.items())[:0:-1]  # the reference itself is 1 by definition
    ratios = [t.ratio for _, t in timings]
    spread = [[t.ratio - t.low for _, t in timings], [t.high - t.ratio for _, t in timings]]
    axes[2].errorbar(ratios, range(len(timings)), xerr=spread, fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    axes[2].set_yticks(range(len(timings)), [name for name, _ in timings], fontsize=8)
    axes[2].axvline(1, color="#333333", linewidth=0.8)
    axes[2].set(xlabel="time per token over unsteered, median and quartiles", title="Cost")
    _save(figure, path)
