"""AUs by effect per side effect (:mod:`austeer.momentum.by_effect`), with each of its two kinds of step.

What a shift of an AU does to the wanted log-odds, by a gradient, against what it does to neutral text, by the model's
side-effect profile: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..momentum.by_effect import STEPS, Candidates, choose
from ..momentum.momentum import plan_of
from .arm import Arm, Material
from .newton import UNIT


def effect_arms(material: Material, sites: Iterable[str], ks: tuple[int, ...]) -> Iterator[Arm]:
    """An arm for each site, step and k; a smaller k has the first AUs of a larger one.

    A Newton step is solved anew for each k, and its predicted KL at a strength of 1 is ``UNIT``.

    Raises:
        SelectionError: fewer than k AUs have an effect of the sign that a step needs.
    """
    momentum, profile = material.momentum, material.with_profile("effect")
    for site in sites:
        found = Candidates.of(momentum, profile, [site])
        largest = choose(found, max(ks), "difference")
        shifted = plan_of(momentum, site, largest.order, "shift")
        yield from (Arm("effect", shifted, k, STEPS[0]) for k in ks)
        for k in ks:
            chosen = choose(found, k, "newton")
            plan = plan_of(momentum, site, chosen.order, "shift")
            plan = replace(plan, delta=chosen.steps.float())
            yield Arm("effect", replace(plan, delta=plan.delta * profile.alpha(plan, UNIT)), k, STEPS[1])
