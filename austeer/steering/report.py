"""What a steering did: for each site and layer the path it took, how often it ran, and the AUs with their weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .deciding import WhenReport
from .path import Path
from .scope import Scope
from .strength import Strength


@dataclass(frozen=True)
class UnitReport:
    """One AU of one plan.

    Attributes:
        plan: the plan's name; empty for a plan without one.
        index: the AU within its site and layer.
        strength: alpha * beta for scale and push, alpha * delta for shift, for ablate alpha * the AU's entry of the
            direction; 0 for AUs beyond k.
        share: its part of the sum of |strength| over the plan's AUs, 0 to 1.
    """

    plan: str
    index: int
    strength: float
    share: float


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site of one layer.

    Attributes:
        site, layer, module: where.
        path: "fold", "bias", "fused", "columns" or "dense".
        aus: how many AUs are steered here, of all plans.
        calls: how often the path ran outside compiled graphs, or a bias in its place; None where nothing is left to
            run: for fold, and for a bias that stays.
        tokens: how many tokens were steered in these calls, by any plan, padding included; None where calls are.
        compiled: whether the path is part of a compiled graph.
        reason: why this path and not a cheaper one; empty for the cheapest.
        share: the site's part of the plans' strength, 0 to 1, all plans counting alike.
        units: the AUs, plan by plan.
    """

    site: str
    layer: int
    module: str
    path: str
    aus: int
    calls: int | None
    tokens: int | None
    compiled: bool
    reason: str
    share: float
    units: tuple[UnitReport, ...]

    def __str__(self) -> str:
        ran = (
            "in the weights"
            if self.path == "fold"
            else "in the biases"
            if self.calls is None
            else f"ran {self.calls} times, {self.tokens} tokens steered"
        )
        ran += ", compiled" if self.compiled else ""
        why = f" ({self.reason})" if self.reason else ""
        where = f"{self.site:<9} layer {self.layer:>3}  {self.aus:>5} AUs {self.share:>6.1%} of the strength"
        return f"{where}  {self.path:<7} {ran}{why}"


class Report(tuple[SiteReport, ...]):
    """One ``SiteReport`` for each steered site and layer; prints as a table.

    Attributes:
        when: what a probe decided; None without one.
    """

    when: WhenReport | None = None

    def __str__(self) -> str:
        return "\n".join(map(str, self if self.when is None else [*self, self.when]))


def make_report(
    paths: Sequence[Path],
    reasons: Sequence[str],
    names: Sequence[str],
    levels: Strength,
    when: WhenReport | None = None,
) -> Report:
    """The report of ``paths`` with the strengths as they are now; ``names`` are the plans'."""
    strengths: list[list[tuple[int, int, float]]] = []  # for each path (plan, index, strength)
    totals = [0.0] * len(names)
    for path in paths:
        found = []
        for entry in (entry for table in path.tables for entry in table.entries):
            amounts = entry.amounts(*levels.of(path.site.name)[entry.plan])
            indices = (entry.index + entry.first).tolist()
            found += [(entry.plan, i, s) for i, s in zip(indices, amounts.tolist())]
        for plan, _, strength in found:
            totals[plan] += abs(strength)
        strengths.append(found)
    rows = []
    for path, reason, found in zip(paths, reasons, strengths):
        units = tuple(
            UnitReport(names[plan], index, strength, abs(strength) / totals[plan] if totals[plan] else 0.0)
            for plan, index, strength in found
        )
        rows.append(
            SiteReport(
                site=path.site.name,
                layer=path.site.layer,
                module=path.site.path,
                path=path.name,
                aus=len({unit.index for unit in units}),
                calls=path.calls,
                tokens=path.tokens,
                compiled=path.traced,
                reason=reason,
                share=sum(unit.share for unit in units) / len(names),
                units=units,
            )
        )
    report = Report(rows)
    report.when = when
    return report


def complaint(
    paths: Sequence[Path], changes: Sequence[str], scope: Scope, missed: bool = False, idle: bool = False
) -> str | None:
    """What a user should know when steering ends: that it did nothing, wholly or in part; None if all is well.

    Args:
        changes: of the steered modules inside the block, from :func:`austeer.steering.replaced.replaced`.
        missed: whether the scope is known to have held no token. idle: whether a probe wanted none steered.
    """
    silent = [path for path in paths if path.calls == 0 and not path.traced]
    if silent:
        site = silent[0].site
        return (
            f"{len(silent)} of {len(paths)} steered sites never ran, first {site.name!r} of layer {site.layer} "
            f"({site.path}): the model was not run, or not through these modules. See report()"
        )
    if changes:
        return (
            f"steered modules, or what lies around them, were replaced or wrapped inside the block ({len(changes)}, "
            f"first: {changes[0]}), and may not have been steered since; change the model before steering it"
        )
    if not idle and (missed or (scope.name != "all" and any(path.tokens == 0 and not path.traced for path in paths))):
        return f"the model ran and no token was steered: none was in the scope ({scope})"
    return None
