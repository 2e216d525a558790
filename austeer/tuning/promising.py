"""The settings by effect per side effect that are worth trying: those of the largest predicted effect at equal KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..baselines.arm import Arm, Material
from ..errors import SelectionError
from ..momentum.by_effect import best_sites, site_sets

#: Settings that are tried, at most.
MOST = 8


def promising_arms(material: Material, sites: Sequence[str], ks: Sequence[int], together: bool) -> list[Arm]:
    """At most ``MOST`` arms of Newton's steps, for sites and numbers of AUs; all where nothing can be predicted.

    Args:
        together: whether all sites' AUs ranked together are tried, too.

    Raises:
        SelectionError: momentum without effects, no profile or one of another model, or too few AUs.
    """
    momentum, profile = material.momentum, material.with_profile("effect")
    kinds = site_sets(sites) if together else [(site,) for site in sites]
    settings = [(kind, k) for kind in kinds for k in ks]
    if len(settings) > MOST:
        try:
            curves = {curve.sites: curve for curve in best_sites(momentum, profile, sites, "newton")}
        except SelectionError:  # too few pairs to have halves, or none that predicts the other
            curves = {}

        def predicted(setting: tuple[tuple[str, ...], int]) -> float:
            curve = curves.get(setting[0])
            if curve is None:  # its halves predict nothing
                return -math.inf
            return float(np.interp(np.log(setting[1]), np.log(curve.k), curve.effect))

        if curves:
            settings = sorted(settings, key=predicted, reverse=True)[:MOST]
    arms: dict[str, Arm] = {}
    for kind, k in settings:
        plan = momentum.select(kind, k, rank="effect", step="newton", profile=profile)
        arm = Arm("effect", plan, k, "newton" if len(kind) == 1 else "newton, sites together")
        arms.setdefault(arm.digest, arm)  # together may be those of one site
    return list(arms.values())
