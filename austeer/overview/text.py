"""An overview as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ..plans.evidence import Evidence
from ..statistics import DetectableRate, Stability
from .overview import KS, Overview, percent

_SHADES = " ▁▂▃▄▅▆▇█"


def unit_table(overview: Overview, rows: int) -> list[list[str]]:
    """The first AUs, with a row of headings."""
    of_momentum = overview.significance is not None
    table = [["rank", "layer", "AU", "beta", "95 %", "delta", "effect", "p", "q"]]
    if not of_momentum:
        table = [["rank", "layer", "AU", "beta", "delta"]]
    for i, unit in enumerate(overview.units[:rows]):
        cells = [str(i), str(unit.layer), str(unit.index), f"{unit.beta:+.3f}", f"{unit.delta:+.4f}"]
        if of_momentum:
            cells.insert(4, f"{overview.low[i]:.2f}-{overview.high[i]:.2f}")
            cells += [f"{overview.effect[i]:.2f}", _small(overview.p[i]), _small(overview.q[i])]
        table.append(cells)
    return table


def layer_lines(overview: Overview, width: int) -> list[str]:
    """A heat map of ranks and layers: a row for each bin of ranks, a column for each layer (or some, if they are many).

    Args:
        width: of the terminal, in columns.
    """
    names = [f"{first}-{last}" for first, last in overview.ranks] + [f"top {len(overview.units)}"]
    margin = max(map(len, names)) + 2
    layers = len(overview.by_layer)
    room = width - margin - len("    most 1000")
    together = -(-layers // max(room, 10))
    header = ""
    for column in range(0, -(-layers // together), 5):
        header = header.ljust(column) + str(together * column)
    lines = [f"  {'layer':<{margin}}{header}"]
    for name, counts in zip(names, [*overview.by_rank, overview.by_layer]):
        cells = [sum(counts[i : i + together]) for i in range(0, layers, together)]
        most = max(cells)
        row = "".join(_SHADES[-(-(len(_SHADES) - 1) * cell // most)] if cell else "·" for cell in cells)
        lines.append(f"  {name:<{margin}}{row}  most {most}")
    return lines


def stability_table(found: Stability) -> list[list[str]]:
    """The overlap of the halves, what chance gives, and what all pairs may give, at some k."""
    at = {k: i for i, k in enumerate(found.k) if k in KS} or {k: i for i, k in enumerate(found.k)}
    rows = {
        f"agreed by {found.pairs[0]} and {found.pairs[1]} pairs": found.overlap,
        "by chance": found.chance,
        "to be expected of all pairs": found.expected,
    }
    table = [["chosen again of the top", *map(str, at)]]
    return table + [[name, *(percent(values[i]) for i in at.values())] for name, values in rows.items()]


def summary_lines(overview: Overview) -> Iterator[str]:
    """What the sign tests, the ties and the power come to."""
    found, ties = overview.significance, overview.ties
    if found is not None:
        yield (
            f"{found.discoveries} of {found.size} AUs pass a sign test at a false discovery rate of "
            f"{percent(found.fdr)}; {found.below} have p <= 0.05, by chance {found.chance:.0f}; the largest |beta| is "
            f"{found.beta:.3f}"
        )
    if ties is not None and ties.tied > ties.inside:
        yield f"{ties.tied} AUs share |beta| = {ties.beta:.3f} at the cut; {ties.inside} of them are in, by effect size"
    if overview.power is not None:
        yield power_line(overview.power)


def power_line(power: DetectableRate) -> str:
    if power.rate is None:
        with_these = f"{power.pairs} pairs find no AU, not even one with the same sign on all of them"
    else:
        with_these = f"{power.pairs} pairs find AUs with one sign on {percent(power.rate)} of the pairs or more"
    needed = ", ".join(f"{percent(rate)} takes {pairs}" for rate, pairs in power.needed.items())
    return f"{with_these} (power {power.power:g}, p <= {power.level:.1e}); {needed}"


def site_table(overview: Overview) -> list[list[str]]:
    """All sites: what stands out, and the halves' overlap; of their effects, too, where they were measured."""
    every = [*overview.sites, *overview.effects]
    ks = [k for k in KS if any(k in brief.k for brief in every)]
    table = [["site", "AUs", "|beta|", "pass", *(f"top {k}" for k in ks)]]
    for number, brief in enumerate(every):
        overlap = dict(zip(brief.k, brief.overlap))
        found = brief.significance
        name = f"{brief.site}, effects" if number >= len(overview.sites) else brief.site
        cells = [name, str(found.size), f"{found.beta:.3f}", str(found.discoveries)]
        table.append(cells + [percent(overlap[k]) if k in overlap else "" for k in ks])
    return table


def evidence_table(evidence: Evidence) -> list[list[str]]:
    """The strengths that were tested."""
    table = [["alpha", "effect", "95 %", "share", "side effect", "on"]]
    for row in evidence.tested:
        alpha = row.alpha
        name = ", ".join(f"{site} {a:g}" for site, a in alpha.items()) if isinstance(alpha, dict) else f"{alpha:g}"
        table.append(
            [
                name + (" *" if row.alpha == evidence.alpha else ""),
                f"{row.effect:+.3g}",
                "" if row.low is None else f"{row.low:+.3g} to {row.high:+.3g}",
                "" if row.share is None else f"{row.share:.0%}",
                "" if row.side_effect is None else f"{row.side_effect:+.3g}",
                row.data,
            ]
        )
    return table


def evidence_lines(evidence: Evidence) -> Iterator[str]:
    """What the columns are, and what steering costs."""
    if evidence.tested:
        side = f"; side effect: {evidence.side_effect}" if evidence.side_effect else ""
        start = "; * to start with" if evidence.alpha is not None else ""
        yield f"effect: {evidence.effect}{side}{start}"
    for cost in evidence.overhead:
        interval = "" if cost.low is None else f" [{cost.low:+.1f}, {cost.high:+.1f}]"
        yield f"cost: {cost.percent:+.1f} %{interval} by {cost.path} on {cost.device} ({cost.setting})"


def _small(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"
