"""Figures of an overview (extra ``plots``)."""

from __future__ import annotations

from pathlib import Path

from ..utils.figures import BLUE, ORANGE, new_figure, save_figure, set_title
from .overview import Overview


def draw_overview(overview: Overview, path: Path) -> None:
    """AUs by rank and layer; of momentum also |beta| against chance, the stability of the top k, and ties at the cut.

    Raises:
        AusteerError: matplotlib is not installed, or the file cannot be written.
    """
    if overview.significance is None:
        figure, axes = new_figure(1)
        _draw_layers(figure, axes[0], overview)
    else:
        figure, axes = new_figure(2, 2)
        _draw_beta(axes[0], overview)
        _draw_layers(figure, axes[1], overview)
        _draw_stability(axes[2], overview)
        _draw_ties(axes[3], overview)
    set_title(figure, f"{overview.origin}, site {overview.site}")
    save_figure(figure, path)


def _draw_beta(axis, overview: Overview) -> None:
    assert overview.beta_histogram is not None
    found, chance = overview.beta_histogram
    edges = overview.beta_edges
    axis.stairs(found, edges, fill=True, color=BLUE, label="measured")
    axis.stairs(chance, edges, color=ORANGE, linewidth=1.6, label="fair coin")
    shown = [i for i, (count, expected) in enumerate(zip(found, chance)) if count or expected >= 0.5]
    axis.set(xlabel="|beta|", ylabel="AUs", yscale="log", ylim=(0.5, 6 * max(*found, *chance)))
    axis.set_xlim(edges[shown[0]] - 0.02, edges[shown[-1] + 1] + 0.02)
    if overview.ties is not None:
        axis.axvline(overview.ties.beta, color="#333333", linewidth=0.8, linestyle=":")
        place = axis.get_xaxis_transform()  # data across, a share of the axis upwards
        axis.text(overview.ties.beta, 0.98, f" top {overview.ties.k}", transform=place, fontsize=8, va="top")
    axis.set_title("|beta| of all AUs, and by chance alone")
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_layers(figure, axis, overview: Overview) -> None:
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in overview.by_rank]
    axis.spines[:].set_visible(False)
    image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    names = [f"{first} to {last}" for first, last in overview.ranks]
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="decoder layer", ylabel="rank", title="AUs by layer")
    figure.colorbar(image, ax=axis, label="% of the row", fraction=0.05, pad=0.02)


def _draw_stability(axis, overview: Overview) -> None:
    found = overview.stability
    axis.set_title("How much of the top k is chosen again")
    if found is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not known:\nno halves of the pairs", ha="center", va="center", transform=axis.transAxes)
        return
    percent = {name: [100 * v for v in getattr(found, name)] for name in ("overlap", "expected", "chance")}
    axis.plot(found.k, percent["expected"], color=BLUE, linestyle="--", label="to be expected of all pairs")
    label = f"halves of {found.pairs[0]} and {found.pairs[1]} pairs"
    axis.plot(found.k, percent["overlap"], color=BLUE, marker="o", markersize=3, label=label)
    axis.plot(found.k, percent["chance"], color=ORANGE, label="by chance")
    axis.set(xlabel="k", ylabel="overlap, %", xscale="log", ylim=(-3, 103))
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_ties(axis, overview: Overview) -> None:
    assert overview.ties is not None
    levels = overview.levels[::-1]
    inside, outside = [level[2] for level in levels], [level[1] - level[2] for level in levels]
    places = range(len(levels))
    axis.bar(places, inside, color=BLUE, label=f"in the top {overview.ties.k}")
    axis.bar(places, outside, bottom=inside, color="#c9d7ea", label="not in it")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xticks(places, [f"{level[0]:.3f}" for level in levels], rotation=60, fontsize=8)
    axis.set(xlabel="|beta|", ylabel="AUs", title=f"Ties: {overview.ties.tied} AUs share the last |beta|")
    axis.legend(frameon=False, fontsize=8, loc="upper right")
