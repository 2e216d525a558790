"""The demo's figures."""

from __future__ import annotations

from pathlib import Path

from ..tuning.figures import COLORS, spread_of
from ..utils.figures import BLUE, GREY, new_figure, save_figure
from .demo import DemoResult


def draw_demo(result: DemoResult, path: Path) -> None:
    """Held-out effect with its interval, what was tried on the tuning pairs, and the cost of each path."""
    figure, axes = new_figure(3)
    rows = result.held_out[::-1]
    colors = [GREY if row.method == "random" else BLUE for row in rows]
    effects = [row.effect for row in rows]
    axes[0].barh(range(len(rows)), effects, xerr=spread_of(rows), color=colors, ecolor="#333333", capsize=3)
    names = [f"{row.method} {row.operation}\n{row.detail or row.site}, k={row.k}" for row in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    axes[0].axvline(0, color="#333333", linewidth=0.8)
    axes[0].set(xlabel="change of log-odds on held-out pairs, nats", title="Effect, with its interval")
    figure.set_figheight(max(4, 1.4 + 0.17 * _settings_tried(axes[1], result)))

    timings = list(result.timings.items())[:0:-1]  # the reference itself is 1 by definition
    ratios = [t.ratio for _, t in timings]
    spread = [[t.ratio - t.low for _, t in timings], [t.high - t.ratio for _, t in timings]]
    axes[2].errorbar(ratios, range(len(timings)), xerr=spread, fmt="o", color=BLUE, ecolor=GREY, capsize=3)
    axes[2].set_yticks(range(len(timings)), [name for name, _ in timings], fontsize=8)
    axes[2].axvline(1, color="#333333", linewidth=0.8)
    axes[2].set(xlabel="time per token over unsteered, median and quartiles", title="Cost")
    save_figure(figure, path)


def _settings_tried(axis, result: DemoResult) -> int:
    """Each setting at the limit on the side effect (filled) and at a part of that strength; pale: by fewer pairs.

    Returns how many rows that makes.
    """
    settings = sorted(
        {(t.operation, t.site, t.k) for t in result.trials},
        key=lambda setting: (list(COLORS).index(setting[0]), setting),
    )
    most = max(t.items for t in result.trials)
    for t in result.trials:
        color = COLORS[t.operation]
        axis.scatter(
            t.effect,
            settings.index((t.operation, t.site, t.k)),
            s=30,
            facecolors=color if t.fraction == 1 else "white",
            edgecolors=color,
            alpha=1 if t.items == most else 0.5,
        )
    chosen = result.chosen
    place = settings.index((chosen.operation, chosen.site, chosen.k))
    axis.scatter(chosen.effect, place, s=140, facecolors="none", edgecolors="black")
    axis.set_yticks(range(len(settings)), [f"{o}, {site} k={k}" for o, site, k in settings], fontsize=8)
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.set(xlabel="change of log-odds on tuning pairs, nats")
    axis.set_title("Settings tried: filled at the limit, open weaker,\npale by fewer pairs", fontsize=9)
    return len(settings)
