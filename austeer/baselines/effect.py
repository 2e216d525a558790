"""AUs by effect per side effect (:mod:`austeer.momentum.by_effect`), with each of its two kinds of step.

What a shift of an AU does to the wanted log-odds, by a gradient, against what it does to neutral text, by the model's
side-effect profile: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .arm import Arm, Material


def effect_arms(material: Material, sites: Iterable[str], ks: tuple[int, ...]) -> Iterator[Arm]:
    """An arm for each site, step and k; a smaller k has the first AUs of a larger one, and Newton's steps of its own.

    Raises:
        SelectionError: fewer than k AUs have an effect of the sign that a step needs.
    """
    momentum, profile = material.momentum, material.with_profile("effect")
    for site in sites:
        shifted = momentum.select(site, max(ks), rank="effect", step="difference", profile=profile)
        yield from (Arm("effect", shifted, k, "difference") for k in ks)
        for k in ks:
            yield Arm("effect", momentum.select(site, k, rank="effect", step="newton", profile=profile), k, "newton")
