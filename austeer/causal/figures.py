"""The figure of a causal check, drawn with matplotlib (extra ``plots``)."""

from __future__ import annotations

from pathlib import Path

from ..utils.figures import BLUE, GREY, ORANGE, new_figure, require_matplotlib, save_figure, set_title
from .check import WAYS, CausalResult

COLORS = {"spread": GREY, "matched": ORANGE, "top": BLUE}
#: Smaller effects are drawn here: a logarithmic axis has no zero.
FLOOR = 1e-6

LABELS = {"spread": "any |beta|", "matched": "matched random", "top": "top by momentum"}


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
