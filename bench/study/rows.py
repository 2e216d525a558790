"""The rows of the study: each method, with the settings that it is tuned among, or that are predicted for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from austeer.baselines import arms
from austeer.baselines.arm import Arm, Material
from austeer.errors import SelectionError
from austeer.momentum.by_effect import EffectCurve, effect_curve
from austeer.plans.plan import Plan

KS = (10, 100)

#: Where methods that choose AUs choose them, and where AUs by effect do; the residual stream is the vectors'.
SITES, EFFECT_SITES = ("attention", "ffn"), ("attention", "ffn", "neuron")
MEASURED = ("attention", "ffn", "neuron", "layer")

HEADS = (1, 4, 16)

#: Layers at which a dense Newton step is tried: those where it promises most.
NEWTON_LAYERS = 4

#: What a row is: momentum's, one without gradients, by effect, or dense by gradients.
KINDS = ("effect", "dense", "plain", "momentum")

CAA, ITI, SADI, NEWTON, TRAINED = "CAA", "ITI", "SADI", "dense Newton step", "trained vector"


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the study's tables.

    Attributes:
        kind: one of ``KINDS``. arms: what it is tuned among; of one alone nothing is chosen.
    """

    name: str
    kind: str
    arms: Sequence[Arm]


def middle_layers(layers: int) -> tuple[int, ...]:
    """Every second layer of the middle and upper part, from a third of the depth on, the last one included."""
    return tuple(reversed(range(layers - 1, layers // 3, -2)))


def rows_of(material: Material) -> list[Row]:
    """All rows but the trained vector's, which waits for the best layer of the dense Newton step."""
    momentum = material.momentum
    vectors = middle_layers(momentum.model.layers)
    rows = []
    for operation in ("scale", "push", "shift"):
        found = arms("momentum", material, sites=SITES, operations=[operation], ks=KS)
        rows.append(Row(f"momentum, {operation}", "momentum", found))
    for method, name in (("random", "random AUs"), ("difference", "mean difference"), ("all", "all AUs")):
        rows.append(Row(name, "plain", arms(method, material, sites=SITES[:1], operations=["shift"], ks=KS)[: len(KS)]))
    rows += [
        Row(CAA, "plain", arms("caa", material, sites=SITES, ks=KS, layers=vectors)),
        Row(ITI, "plain", arms("iti", material, sites=SITES, ks=KS, heads=HEADS)),
        Row(SADI, "plain", arms("sadi", material, sites=SITES, ks=KS, heads=HEADS[:2])),
    ]
    newton = arms("newton", material, sites=SITES, ks=KS, layers=vectors)
    promising = sorted(newton, key=lambda arm: -_promise(material, arm))[:NEWTON_LAYERS]
    rows.append(Row(NEWTON, "dense", promising))
    for arm in arms("effect", material, sites=SITES[:1], ks=KS):
        rows.append(Row(f"effect {arm.detail} {arm.k}", "effect", [arm]))
    return rows


def trained_row(material: Material, layer: int) -> Row:
    """The vector trained at a layer."""
    return Row(TRAINED, "dense", arms("trained", material, sites=SITES, ks=KS, layers=[layer]))


def predicted_name(k: int | None) -> str:
    """The row of AUs by effect whose site, step, and k where none is given, are those of the largest prediction."""
    return f"effect predicted {k}" if k else "effect predicted"


def predicted_rows(material: Material, curves: Sequence[tuple[str, EffectCurve]]) -> list[Row]:
    """Rows whose site and step are chosen by prediction alone: for each k, and with the k of the curve, too.

    None where nothing is predicted.
    """
    rows = []
    for k in (*KS, None) if curves else ():
        step, curve = max(curves, key=lambda found: found[1].best if k is None else effect_at(found[1], k))
        plan = effect_plan(material, curve.sites, step, k or curve.enough)
        rows.append(Row(predicted_name(k), "effect", [Arm("effect", plan, len(plan), f"{step}, predicted")]))
    return rows


def curves_of(material: Material, step: str) -> list[tuple[str, EffectCurve]]:
    """What is predicted of a step at each site, and at all of them together; nothing where halves do not agree."""
    momentum, profile = material.momentum, material.with_profile("effect")
    found = []
    for sites in (*((site,) for site in EFFECT_SITES), EFFECT_SITES):
        with suppress(SelectionError):  # no k has an effect on the other half: no reason to stop, and no prediction
            found.append((step, effect_curve(momentum, profile, sites, step)))
    return found


def effect_at(curve: EffectCurve, k: int) -> float:
    """The predicted effect of k AUs, or of as many as a small site has, at 1 nat a token."""
    return next((effect for number, effect in zip(curve.k, curve.effect) if number >= k), curve.effect[-1])


def effect_plan(material: Material, sites: Sequence[str], step: str, k: int) -> Plan:
    """k AUs by effect of some sites."""
    return material.momentum.select(tuple(sites), k, rank="effect", step=step, profile=material.profile)


def _promise(material: Material, arm: Arm) -> float:
    """The predicted effect of a vector at the residual stream whose predicted side effect is the unit."""
    plan = arm.plan
    g = material.momentum.effect(plan.site[0])[material.momentum.layers.index(int(plan.layer[0]))]
    return float(g @ plan.delta.double())
