"""The figures of a causal check, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

from pathlib import Path

from ..utils.figures import BLUE, GREEN, GREY, ORANGE, new_figure, require_matplotlib, save_figure, set_title
from .check import WAYS, CausalResult
from .statistics import Interval

COLORS = {"spread": GREY, "matched": ORANGE, "top": BLUE}
#: Smaller effects are drawn here: a logarithmic axis has no zero.
FLOOR = 1e-6

LABELS = {"spread": "any |beta|", "matched": "matched random", "top": "top by momentum"}

#: Of AUs or groups of them, by how they were chosen; where one is of several kinds, the last of them counts.
KINDS = {
    "random": ("random", GREY),
    "matched": ("others", GREY),
    "spread": ("others", GREY),
    "momentum": ("momentum", ORANGE),
    "top": ("momentum", ORANGE),
    "effect": ("predicted effect", BLUE),
    "per_side_effect": ("effect per side effect", GREEN),
}


def draw_causal(result: CausalResult, path: Path) -> None:
    """For each way: each AU's effect in the wanted direction against |beta|; |effect| of top AUs and their matches.

    Raises:
        AusteerError: matplotlib is not installed, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.ticker import LogLocator, NullFormatter

    ways = list(result.findings)
    figure, axes = new_figure(len(ways), 2)
    for way, above, below in zip(ways, axes, axes[len(ways) :]):
        for group, color in COLORS.items():
            units = [unit for unit in result.units if group in unit.groups]
            above.scatter(
                [abs(unit.beta) for unit in units],
                [unit.wanted(way) for unit in units],
                **{"s": 14, "color": color, "label": LABELS[group], "alpha": 0.8},
            )
        above.axhline(0, color="#333333", linewidth=0.8)
        above.set(xlabel="|beta|", title=f"{way}: {WAYS[way]}")
        above.title.set_fontsize(9)
        for group in ("matched", "top"):
            sizes = sorted(max(FLOOR, abs(unit.raised[way])) for unit in result.units if group in unit.groups)
            shares = [(i + 1) / len(sizes) for i in range(len(sizes))]
            below.step(sizes, shares, where="post", color=COLORS[group], label=LABELS[group])
        below.set(xlabel="|effect|, nats", xscale="log", ylim=(0, 1.02))
        least, most = below.get_xlim()
        # Over few decades the powers of ten alone are too few, and matplotlib's own further labels collide.
        below.xaxis.set_major_locator(LogLocator(subs=(1.0,) if most > 100 * least else (1.0, 2.0, 5.0)))
        below.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        below.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("effect in the wanted direction, nats")
    axes[len(ways)].set_ylabel("share of AUs with at most that")
    axes[0].legend(frameon=False, fontsize=8)
    set_title(
        figure,
        f"{result.model}, site {result.site}: single AUs steered alone, {result.items} held-out items of {result.task}",
    )
    save_figure(figure, path)


def draw_predicted(result: CausalResult, path: Path) -> bool:
    """Predicted against measured effects: of single AUs for each way, and of groups at each strength.

    Returns:
        Whether there is anything to draw: not without effects.

    Raises:
        AusteerError: matplotlib is not installed, or the file cannot be written.
    """
    ways = [way for way in result.findings if any(way in unit.predicted for unit in result.units)]
    strengths = [] if result.together is None else result.together.strengths
    if not ways and not strengths:
        return False
    columns = max(len(ways), len(strengths))
    figure, axes = new_figure(columns, bool(ways) + bool(strengths))
    for axis in axes:
        axis.set_visible(False)
    for axis, way in zip(axes, ways):
        points = [(list(unit.groups), unit.predicted[way], unit.raised[way]) for unit in result.units]
        agreement = result.findings[way].mixed
        _scatter(axis, points, f"single AUs, {way}", None if agreement is None else agreement.slope)
    for number, (axis, strength) in enumerate(zip(axes[columns if ways else 0 :], strengths)):
        assert result.together is not None
        points = [([g.kind], strength.alpha * g.predicted, g.raised[number]) for g in result.together.groups]
        _scatter(axis, points, f"ten AUs together, alpha {strength.alpha:g}", strength.slope)
    set_title(
        figure,
        f"{result.model}, site {result.site}: predicted by the gradient, and measured on {result.items} held-out items "
        f"of {result.task}",
    )
    save_figure(figure, path)
    return True


def _scatter(axis, points: list[tuple[list[str], float, float]], title: str, slope: Interval | None) -> None:
    """One panel of (kinds, predicted, measured), with the line of equality and the one of the slope."""
    axis.set_visible(True)
    for label, color in dict.fromkeys(KINDS.values()):
        own = [point[1:] for point in points if KINDS[_last(point[0])] == (label, color)]
        if own:
            axis.scatter(*zip(*own), s=16, color=color, alpha=0.8, label=label)
    ends = min(0.0, *(x for _, x, _ in points)), max(0.0, *(x for _, x, _ in points))
    axis.plot(ends, ends, color="#333333", linewidth=0.8, linestyle="--", label="as predicted")
    if slope is not None:
        axis.plot(ends, [slope[0] * end for end in ends], color="#333333", linewidth=0.8, label=f"slope {slope[0]:.2f}")
    axis.set(xlabel="predicted effect, nats", ylabel="measured effect, nats")
    axis.set_title(title, fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def _last(kinds: list[str]) -> str:
    return max(kinds, key=list(KINDS).index)
