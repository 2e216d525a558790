"""The methods that momentum is compared with, by name, and their arms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import SelectionError, check_count
from ..plans.table import BY_UNIT, OPERATIONS
from .ablation import ablation_arms
from .arm import Arm, Material
from .caa import caa_arms
from .effect import effect_arms
from .iti import iti_arms
from .newton import newton_arms
from .ranked import all_arms, random_arms, ranked_arms
from .residual import SITE as RESIDUAL
from .sadi import sadi_arms
from .trained import trained_arms

#: Numbers of attention heads that are tried by methods that choose heads.
HEADS = (1, 4, 16, 48)


@dataclass(frozen=True)
class Wanted:
    """What is asked of a method; each takes of it what it has a choice in.

    Attributes:
        sites, operations, ks: as in a plan. layers: of vectors at one layer. heads: of ITI, and of SADI at "attention".
    """

    sites: tuple[str, ...]
    operations: tuple[str, ...]
    ks: tuple[int, ...]
    layers: tuple[int, ...] | None
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """Attributes:
    what: in one line. source: where it is from.
    make: its arms. measured: the sites that have to be measured for it; None: those that are asked for.
    profiled: whether it needs effects and a profile of these sites.
    """

    what: str
    source: str
    make: Callable[[Material, Wanted], Iterator[Arm]]
    measured: tuple[str, ...] | None = None
    profiled: bool = False


def _ranked(method: str) -> Callable[[Material, Wanted], Iterator[Arm]]:
    return lambda material, w: ranked_arms(material.momentum, method, w.sites, w.operations, w.ks)


_PAPER = "AUSteer (ICLR 2026)"

METHODS: dict[str, Method] = {
    "momentum": Method("the AUs of largest |beta|, the share of consistent pairs", _PAPER, _ranked("momentum")),
    "random": Method(
        "AUs drawn uniformly, with their own beta and delta; three draws",
        f"{_PAPER}, ablation",
        lambda material, w: random_arms(material.momentum, w.sites, w.operations, w.ks),
    ),
    "all": Method(
        "all AUs of a site together, softly weighted by beta (shift: by delta)",
        f"{_PAPER}, ablation and reviews",
        lambda material, w: all_arms(material.momentum, w.sites, w.operations),
    ),
    # The paper's ablation replaces the score that ranks; strengths stay beta's, so that only the choice differs.
    "difference": Method(
        "the AUs of largest |mean difference|; strengths still from beta", f"{_PAPER}, ablation", _ranked("difference")
    ),
    "standardised": Method(
        "the AUs of largest |mean difference| / standard deviation; strengths still from beta",
        "the standardised difference, not in the paper",
        _ranked("standardised"),
    ),
    "effect": Method(
        "the AUs of largest effect per side effect, shifted by the mean difference or by a Newton step",
        "ours",
        lambda material, w: effect_arms(material, w.sites, w.ks),
        profiled=True,
    ),
    "caa": Method(
        "the mean difference of the residual stream, added at one layer",
        "Rimsky et al. (ACL 2024)",
        lambda material, w: caa_arms(material.momentum, w.layers),
        (RESIDUAL,),
    ),
    "ablation": Method(
        "the mean difference of the residual stream, removed from it at one layer",
        "after Arditi et al. (NeurIPS 2024)",
        lambda material, w: ablation_arms(material.momentum, w.layers),
        (RESIDUAL,),
    ),
    "newton": Method(
        "the residual stream's vector of largest effect for its side effect, added at one layer",
        "the natural gradient, Amari (1998)",
        lambda material, w: newton_arms(material, w.layers),
        (RESIDUAL,),
        profiled=True,
    ),
    "trained": Method(
        "a vector trained on the pairs' log-odds, added to the residual stream at one layer",
        "after Subramani et al. (ACL 2022), Cao et al. (NeurIPS 2024)",
        lambda material, w: trained_arms(material, w.layers),
        (RESIDUAL,),
        profiled=True,
    ),
    "iti": Method(
        "the attention heads whose linear probes are best, shifted along the mean difference",
        "Li et al. (NeurIPS 2023)",
        lambda material, w: iti_arms(material, w.heads),
        (),
    ),
    "sadi": Method(
        "the elements (at attention: heads) of largest mean difference, amplified",
        "Wang et al. (ICLR 2025)",
        lambda material, w: sadi_arms(material, w.sites, w.ks, w.heads),
    ),
}


def arms(
    method: str,
    material: Material,
    *,
    sites: Iterable[str],
    operations: Iterable[str] = BY_UNIT,
    ks: Iterable[int],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] = HEADS,
) -> list[Arm]:
    """A method's candidates: plans, each with a number of AUs.

    Arms of one ranking share a plan: the AUs of a smaller k are the first of a larger one's.

    Args:
        method: one of ``METHODS``.
        sites, operations, ks: what the AUs are chosen for; methods that leave no choice take no notice: "caa",
            "ablation", "newton", "trained" and "iti" have a site and an operation of their own, "sadi" and "effect" an
            operation, and "all" no k.
        layers: those at which "caa", "newton" and "trained" add their vector, and "ablation" removes its direction; by
            default ten that are evenly spread, and for "trained", which takes long, two.
        heads: how many heads "iti" and, at "attention", "sadi" take.

    Raises:
        SelectionError: an unknown method; a site that was not measured; a k, layer or number of heads that the model
            does not have; too few pairs; no effects or no profile, for a method that needs them.
    """
    wanted = Wanted(
        tuple(dict.fromkeys(sites)),
        tuple(dict.fromkeys(operations)),
        tuple(dict.fromkeys(ks)),
        None if layers is None else tuple(dict.fromkeys(layers)),
        tuple(dict.fromkeys(heads)),
    )
    for name, found in (("sites", wanted.sites), ("operations", wanted.operations), ("ks", wanted.ks)):
        if not found:
            raise SelectionError(f"{name}: found none, expected at least one")
    for operation in wanted.operations:
        if operation not in OPERATIONS:
            raise SelectionError(f"operation: found {operation!r}, expected one of {', '.join(OPERATIONS)}")
    for what, counts in (("k", wanted.ks), ("heads", wanted.heads)):
        for count in counts:
            check_count(what, count, 2**31, "how many are steered", SelectionError)
    needed = sites_needed([method], wanted.sites)
    for site in needed:
        if site not in material.momentum.sites:
            raise SelectionError(
                f"method {method!r} needs site {site!r}, which was not measured; found "
                f"{', '.join(material.momentum.sites)}. Measure it too: measure(..., sites={sorted(needed)})"
            )
    return list(METHODS[method].make(material, wanted))


def sites_needed(methods: Iterable[str], sites: Iterable[str]) -> tuple[str, ...]:
    """The sites that have to be measured for some methods to choose at ``sites``.

    Raises:
        SelectionError: an unknown method.
    """
    asked, found = tuple(sites), dict[str, None]()
    for method in methods:
        if method not in METHODS:
            raise SelectionError(f"method {method!r} is not known; expected one of {', '.join(METHODS)}")
        measured = METHODS[method].measured
        found |= dict.fromkeys(asked if measured is None else measured)
    return tuple(found)


def profiles_needed(methods: Iterable[str], sites: Iterable[str]) -> tuple[str, ...]:
    """The sites of which effects and a profile are needed for some methods to choose at ``sites``; most need none."""
    return sites_needed([method for method in methods if METHODS[method].profiled], sites)
