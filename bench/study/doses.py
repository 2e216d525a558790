"""Strength in nats: the KL that is asked for, beside the one that is measured on other neutral text, site by site."""

from __future__ import annotations

import warnings
from typing import Any

import austeer
from austeer.errors import SelectionError, SteeringError, SteeringWarning
from austeer.forward.neutral import neutral_texts
from austeer.momentum.momentum import Momentum
from austeer.steering.side_effects import side_effects

from .rows import EFFECT_SITES, KS
from .trial import FINAL_TEXTS, Setting

#: The KLs that are asked for, nats a token.
KLS = (0.02, 0.05, 0.1)

#: By the strength that the profile gives (``exact=False``), and by that corrected on the profile's text (the default).
WAYS = ("predicted", "measured")


def doses(setting: Setting, momentum: Momentum) -> list[dict[str, Any]]:
    """For each site and k, the KL on held-out neutral text of a plan that is steered for each of ``KLS``.

    Returns:
        Rows of site, k, kl (asked for), and by each of ``WAYS`` the KL that came of it; None where it was refused.
    """
    found = []
    for site in EFFECT_SITES:
        for k in KS:
            try:
                plan = momentum.select(site, k, rank="effect", profile=setting.profile)
            except SelectionError:  # fewer AUs than that have an effect
                continue
            for kl in KLS:
                both = {how: _measured(setting, plan, kl, how == "measured") for how in WAYS}
                found.append({"site": site, "k": k, "kl": kl, **both})
    return found


def _measured(setting: Setting, plan: austeer.Plan, kl: float, exact: bool) -> float | None:
    """The KL on held-out neutral text of a plan that is steered for ``kl``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteeringWarning)  # of a prediction that is far off: it is recorded here
        try:
            steering = austeer.steer(setting.model, {"": plan}, kl=kl, exact=exact, check=False)
        except SteeringError:
            return None
    with steering:
        texts = neutral_texts("heldout")[:FINAL_TEXTS]
        return side_effects(setting.model, setting.tokenizer, texts, steering, [""]).mean()[0][0]
