"""A summary of a momentum file or a plan for people: top AUs, layers, and how far they stand out from chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from .errors import FileFormatError, SelectionError
from .momentum import Momentum
from .plan import FILE_NAME, AtomicUnit, Plan
from .selection import adjusted_p_values, effect_size, p_values, ranking, signed_rate


@dataclass(frozen=True)
class Overview:
    """Attributes:
    origin: what was measured, on how much. site: which site this is about.
    units: the top AUs. by_layer: how many of them lie in each layer.
    effect, p: effect size and two-sided p-value of each (momentum only).
    beta_histogram: how many AUs of the site have each |beta| (20 bins from 0 to 1), and how many chance alone would
        put there; momentum only.
    notes: what a reader should know.
    """

    origin: str
    site: str
    units: list[AtomicUnit]
    by_layer: list[int]
    effect: list[float] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    beta_histogram: tuple[list[int], list[float]] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "units": [asdict(unit) for unit in self.units]}


def of_file(path: Path, site: str | None, k: int) -> Overview:
    """The overview of a momentum file or a plan, whichever ``path`` is."""
    if path.is_dir() or path.name == FILE_NAME:
        return of_plan(Plan.from_pretrained(path), site, k)
    try:
        return of_momentum(Momentum.load(path), site, k)
    except FileFormatError as error:
        try:
            return of_plan(Plan.from_pretrained(path), site, k)
        except FileFormatError:
            raise error from None


def of_plan(plan: Plan, site: str | None, k: int) -> Overview:
    site = site or plan.sites[0]
    if site not in plan.sites:
        raise SelectionError(f"site {site!r} is not in the plan; found {', '.join(plan.sites)}")
    units = [unit for unit in plan if unit.site == site][:k]
    origin = f"plan of {len(plan)} AUs, {plan.operation}, from {plan.pairs} pairs on {plan.model.name}"
    return Overview(origin, site, units, _by_layer(units, plan.model.layers))


def of_momentum(momentum: Momentum, site: str | None, k: int) -> Overview:
    site = site or next(iter(momentum.sites))
    counters = momentum.counters(site)
    size = counters.positive.numel()
    plan = momentum.select(site, k=min(k, size))
    chosen = ranking(momentum, site)[: len(plan)]
    beta = signed_rate(counters, momentum.pairs).flatten().abs()
    cut = plan.beta[-1].abs().item()
    tied = int((beta.float() == cut).sum())
    inside = int((plan.beta.abs() == cut).sum())
    notes = []
    if tied > inside:
        notes.append(f"{tied} AUs share |beta| = {cut:.3f} at the cut; {inside} of them are in, by effect size")
    discoveries = int((adjusted_p_values(counters) <= 0.05).sum())
    notes.append(f"{discoveries} of {size} AUs pass a sign test at a false discovery rate of 5 %")
    return Overview(
        origin=f"momentum of {momentum.pairs} pairs on {momentum.model.name}",
        site=site,
        units=list(plan),
        by_layer=_by_layer(list(plan), momentum.model.layers),
        effect=effect_size(counters, momentum.pairs).flatten()[chosen].tolist(),
        p=p_values(counters).flatten()[chosen].tolist(),
        beta_histogram=_beta_histogram(beta, momentum.pairs),
        notes=notes,
    )


def _by_layer(units: list[AtomicUnit], layers: int) -> list[int]:
    return torch.bincount(torch.tensor([unit.layer for unit in units]), minlength=layers).tolist()


def _beta_histogram(beta: torch.Tensor, pairs: int) -> tuple[list[int], list[float]]:
    """Counts of |beta| in 20 bins, and their expectation if each sign were a fair coin."""
    bins = 20
    place = (beta * bins).long().clamp(max=bins - 1)
    counts = torch.arange(pairs + 1)
    chance = torch.from_numpy(stats.binom.pmf(counts.numpy(), pairs, 0.5))
    most = torch.maximum(counts, pairs - counts).double() / pairs
    expected = torch.zeros(bins, dtype=torch.float64).index_add_(0, (most * bins).long().clamp(max=bins - 1), chance)
    return torch.bincount(place, minlength=bins).tolist(), (expected * beta.numel()).tolist()
