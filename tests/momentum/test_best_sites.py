"""The search over sites: one of which nothing is predicted is left out, and only if all are so there is an error."""

import pytest

import austeer
from austeer import SelectionError
from austeer.momentum.by_effect import best_sites
from naive_momentum import numbered_pairs

SITES = ["attention", "ffn"]


def without_effects(momentum, sites):
    """The momentum, in which shifts at these sites do nothing."""
    effects = momentum.effects
    none = {site: effects.counters(site) - effects.counters(site) for site in sites}
    return momentum.with_effects({**effects.sites, **none}, {**effects.half, **none})


def test_a_site_without_effects_is_left_out(tiny, demo):
    momentum = austeer.measure(tiny, demo[1], numbered_pairs(24), SITES, effects=True, progress=False)
    profile = austeer.profile(tiny, demo[1], SITES, ["The soup was warm.", "Two boats left."], draws=32, progress=False)
    assert {curve.sites for curve in best_sites(momentum, profile, SITES, "newton")} >= {("ffn",), ("attention",)}
    part = without_effects(momentum, ["attention"])
    assert ("attention",) not in {curve.sites for curve in best_sites(part, profile, SITES, "newton")}
    assert part.select("auto", profile=profile, kl=0.1).sites == ("ffn",)
    none = without_effects(momentum, SITES)
    with pytest.raises(SelectionError, match="attention"):
        best_sites(none, profile, SITES, "newton")
