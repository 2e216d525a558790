"""Plans that are added up, and the texts that show what they do, for tests inside serving engines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

import austeer

#: Prompts of unlike lengths, and how many tokens are written after each.
PROMPTS = (
    "The weekend trip was",
    "Compared with the inn across the road, this one felt",
    "My first impression of the new library:",
)
TOKENS = 16

#: Plans for different sites, each with its strength.
Parts = Sequence[tuple[austeer.Plan, float]]


def steered(model: nn.Module, parts: Parts) -> AbstractContextManager[Any]:
    """The model under our own steering; as it is where there is nothing to steer."""
    if not parts:
        return nullcontext()
    first, *rest = (plan for plan, _ in parts)
    return austeer.steer(model, sum(rest, first), alpha={plan.sites[0]: alpha for plan, alpha in parts})
