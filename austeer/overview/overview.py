"""A summary of a momentum file or a plan for people: top AUs, layers, how far they stand out from chance, and whether
the same AUs would be chosen again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileFormatError, SelectionError
from ..momentum.momentum import Momentum
from ..plans.dose_table import DoseRow, dose_legend, dose_rows
from ..plans.evidence import Evidence
from ..plans.files import FILE_NAME
from ..plans.plan import Plan
from ..plans.table import AtomicUnit
from ..statistics import (
    DetectableRate,
    Stability,
    Ties,
    adjusted_p_values,
    beta_histogram,
    chance_below,
    effect_size,
    p_values,
    ranking,
    rate_interval,
    signed_rate,
    stability,
    ties_at_cut,
)

#: Where stability is told, and where the bins of ranks end.
KS = (10, 30, 100, 300, 1000)
#: The false discovery rate at which AUs are counted.
FDR = 0.05
#: A score of two halves below which a ranking is called chance, and from which on it is called stable.
CHANCE, STABLE = 0.1, 0.5
#: |beta| levels on either side of the cut whose AUs are counted.
LEVELS = 8


@dataclass(frozen=True)
class Significance:
    """Sign tests of all AUs of a site.

    Attributes:
        size: how many AUs. discoveries: how many pass at a false discovery rate of ``fdr``.
        below: how many have p <= 0.05. chance: how many would by chance alone.
        beta: the largest |beta|.
    """

    size: int
    fdr: float
    discoveries: int
    below: int
    chance: float
    beta: float


@dataclass(frozen=True)
class SiteBrief:
    """A site in one row: ``k`` and, for each, the halves' overlap and what chance gives (none without halves)."""

    site: str
    significance: Significance
    k: tuple[int, ...] = ()
    overlap: tuple[float, ...] = ()
    chance: tuple[float, ...] = ()


@dataclass(frozen=True)
class Overview:
    """Attributes:
    origin: what was measured, on how much. site: which site this is about.
    units: the top AUs. by_layer: how many of them lie in each layer.
    ranks: bins of ranks, first and last from 1; by_rank: for each, how many AUs lie in each layer.

    Of momentum only:

    low, high: the exact 95 % interval of each AU's share of pairs with its sign. effect: its effect size.
    p, q: its two-sided p-value, and after Benjamini-Hochberg's correction over the site.
    significance: of the whole site. sites: all sites in brief.
    beta_edges, beta_histogram: how many AUs have |beta| in each bin, and how many by chance alone.
    ties: at the cut. levels: |beta| levels around the cut: the level, how many AUs have it, how many of them are in.
    stability: of two halves of the pairs; None if it is not known. power: what so many pairs can find.
    effects: all sites in brief once more, by the signs of their effects; none without effects.

    Of a plan only:

    evidence: what is known of its effect and cost. dose: what its strengths do, where a profile says.

    verdict: whether the ranking can be relied on, in words. notes: what else a reader should know.
    """

    origin: str
    site: str
    units: list[AtomicUnit]
    by_layer: list[int]
    ranks: list[tuple[int, int]] = field(default_factory=list)
    by_rank: list[list[int]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    effect: list[float] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    q: list[float] = field(default_factory=list)
    significance: Significance | None = None
    sites: list[SiteBrief] = field(default_factory=list)
    effects: list[SiteBrief] = field(default_factory=list)
    beta_edges: list[float] = field(default_factory=list)
    beta_histogram: tuple[list[int], list[float]] | None = None
    ties: Ties | None = None
    levels: list[tuple[float, int, int]] = field(default_factory=list)
    stability: Stability | None = None
    power: DetectableRate | None = None
    evidence: Evidence | None = None
    dose: list[DoseRow] = field(default_factory=list)
    verdict: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of_file(source: str | Path, site: str | None, k: int) -> Overview:
    """The overview of a momentum file or a plan, whichever ``source`` is; a plan's may be a Hub id.

    Raises:
        FileFormatError, PlanError, HubError: neither of both, or damaged, or not to be had.
        SelectionError: a site that is not in it.
    """
    from ..plans import hub

    path = Path(source)
    on_hub = isinstance(source, str) and not path.exists() and hub.split_id(source) is not None
    if on_hub or path.is_dir() or path.name == FILE_NAME:
        return of_plan(Plan.from_pretrained(source), site, k)
    try:
        return of_momentum(Momentum.load(path), site, k)
    except FileFormatError as error:
        try:
            return of_plan(Plan.from_pretrained(path), site, k)
        except FileFormatError:
            raise error from None


def of_plan(plan: Plan, site: str | None, k: int) -> Overview:
    """Raises SelectionError if the plan has no AU at ``site``."""
    site = site or plan.sites[0]
    if site not in plan.sites:
        raise SelectionError(f"site {site!r} is not in the plan; found {', '.join(plan.sites)}")
    of_site = [unit for unit in plan if unit.site == site]
    layers = torch.tensor([unit.layer for unit in of_site], device="cpu")
    ranks, by_rank = _by_rank(layers, plan.model.layers)
    rows = [] if plan.dose is None else dose_rows(plan.dose)
    notes = [dose_legend(plan.dose, plan.rank)] if rows and plan.dose is not None else []
    notes += [] if plan.evidence else ["no strength has been tested for its effect on held-out data"]
    how = f", by {plan.rank}" + (f" ({plan.step} step)" if plan.rank == "effect" else "")
    return Overview(
        origin=f"plan of {len(plan)} AUs{how}, {plan.operation}, from {plan.pairs} pairs on {plan.model.name}",
        site=site,
        units=of_site[:k],
        by_layer=_by_layer(layers[:k], plan.model.layers),
        ranks=ranks,
        by_rank=by_rank,
        evidence=plan.evidence,
        dose=rows,
        notes=notes,
    )


def of_momentum(momentum: Momentum, site: str | None, k: int) -> Overview:
    """Raises SelectionError if ``site`` was not measured."""
    site = site or next(iter(momentum.sites))
    counters, pairs = momentum.counters(site), momentum.pairs
    size, width = counters.positive.numel(), counters.positive.shape[1]
    k = min(k, size)
    order = ranking(momentum, site)
    chosen, layers = order[:k], torch.tensor(momentum.layers, device="cpu")[order // width]
    low, high = rate_interval(_most(momentum, site)[chosen].numpy(), pairs)
    ranks, by_rank = _by_rank(layers[: KS[-1]], momentum.model.layers)
    edges = np.linspace(0.0, 1.0, 41)
    found, expected = beta_histogram(counters, pairs, edges)
    unlike = pairs - momentum.identical
    notes, stable = [], None
    try:
        stable = stability(momentum, site, _ks(size, k))
    except SelectionError as error:
        notes.append(str(error))
    sites = [_brief(momentum, name) for name in momentum.sites]
    effects = momentum.effects
    significance = next(brief.significance for brief in sites if brief.site == site)
    ties = ties_at_cut(momentum, site, k)
    power = DetectableRate.of(unlike, size, significance.discoveries, FDR) if unlike else None
    return Overview(
        origin=f"momentum of {pairs} pairs on {momentum.model.name}",
        site=site,
        units=list(momentum.select(site, k=k)),
        by_layer=_by_layer(layers[:k], momentum.model.layers),
        ranks=ranks,
        by_rank=by_rank,
        low=low.tolist(),
        high=high.tolist(),
        effect=effect_size(counters, pairs).flatten()[chosen].tolist(),
        p=p_values(counters).flatten()[chosen].tolist(),
        q=adjusted_p_values(counters).flatten()[chosen].tolist(),
        significance=significance,
        sites=sites,
        effects=[] if effects is None else [_brief(effects, name) for name in effects.sites],
        beta_edges=edges.tolist(),
        beta_histogram=(found.tolist(), expected.tolist()),
        ties=ties,
        levels=_levels(_most(momentum, site), ties, pairs),
        stability=stable,
        power=power,
        verdict=_verdict(stable, k, significance, pairs),
        notes=notes,
    )


def _most(momentum: Momentum, site: str) -> Tensor:
    """|beta| * pairs of each AU, exact: int64 [size]."""
    counters = momentum.counters(site)
    return torch.maximum(counters.positive, counters.negative).flatten()


def _ks(size: int, *more: int) -> tuple[int, ...]:
    """Where stability is looked at: where it is told, and a series for the figure."""
    series = [round(first * 10**power) for power in range(1, 9) for first in (1, 1.5, 2, 3, 5, 7)]
    found = {k for k in (*series, *more) if k <= size}
    return tuple(sorted(found if size >= 2 * KS[0] else range(1, size + 1)))


def _brief(momentum: Momentum, site: str) -> SiteBrief:
    counters = momentum.counters(site)
    significance = Significance(
        size=counters.positive.numel(),
        fdr=FDR,
        discoveries=int((adjusted_p_values(counters) <= FDR).sum()),
        below=int((p_values(counters) <= 0.05).sum()),
        chance=chance_below(counters, 0.05),
        beta=float(signed_rate(counters, momentum.pairs).abs().max()),
    )
    ks = tuple(k for k in KS if k <= significance.size)
    try:
        found = stability(momentum, site, ks)
    except SelectionError:
        return SiteBrief(site, significance)
    return SiteBrief(site, significance, found.k, found.overlap, found.chance)


def _levels(most: Tensor, ties: Ties, pairs: int) -> list[tuple[float, int, int]]:
    """The |beta| levels around the cut, from the largest: the level, its AUs, and how many of them are in."""
    count = torch.bincount(most, minlength=pairs + 1)
    cut = round(ties.beta * pairs)
    present = count.nonzero().flatten()
    place = int(torch.searchsorted(present, cut))
    near = present[max(place - LEVELS, 0) : place + LEVELS + 1].flip(0).tolist()
    inside = {level: int(count[level]) if level > cut else ties.inside * (level == cut) for level in near}
    return [(level / pairs, int(count[level]), inside[level]) for level in near]


def _by_layer(layers: Tensor, count: int) -> list[int]:
    return torch.bincount(layers.long(), minlength=count).tolist()


def _by_rank(layers: Tensor, count: int) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Bins of ranks, each about three times as long as the one before, and how many AUs of each lie in each layer."""
    ends = [k for k in KS if k < len(layers)] + [min(len(layers), KS[-1])]
    starts = [0, *ends[:-1]]
    bins = [(start + 1, end) for start, end in zip(starts, ends)]
    return bins, [_by_layer(layers[start:end], count) for start, end in zip(starts, ends)]


def _verdict(found: Stability | None, k: int, significance: Significance, pairs: int) -> str:
    """Whether the top k can be relied on, in words."""
    if found is None:
        return "whether the ranking is stable is not known"
    score, overlap, expected, chance = (
        dict(zip(found.k, values)) for values in (found.score, found.overlap, found.expected, found.chance)
    )
    agreed = (
        f"halves of {found.pairs[0]} and {found.pairs[1]} pairs agree on {percent(overlap[k])} of their top {k} "
        f"(by chance {percent(chance[k])})"
    )
    # Of fewer AUs an overlap is luck, and of many AUs halves can agree on the signs and yet on none of the first.
    telling = [score[n] for n in found.k if 30 <= n <= 300] or list(found.score)
    if max(telling) < CHANCE:
        if overlap[k] - chance[k] >= CHANCE:
            often, same = ("as often ", " as with the same") if score[k] > -CHANCE else ("", "")
            agreed += f", {often}with opposite signs{same}"
        passing = "no AU passes the sign test"
        if significance.discoveries:
            passing = (
                f"the {significance.discoveries} AUs that pass the sign test are too alike to be ranked (one answer "
                "that is right more often than the other is enough to pass)"
            )
        return f"the ranking is chance: {agreed}, and {passing}. Give other pairs, or more, or take another site"
    again = f"another {pairs} pairs would choose about {percent(expected[k])} of it again"
    if score[k] < STABLE:
        settled = "settled only in part" if score[k] >= CHANCE else "not settled"
        return f"the top {k} is {settled}: {agreed}; {again}. More pairs settle more"
    return f"the top {k} is stable: {agreed}; {again}"


def percent(share: float) -> str:
    """A share for people; of small ones two digits."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{share:.0%}".replace("%", " %")
