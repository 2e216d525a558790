"""The KL of small shifts from forward passes alone: for models that cannot be differentiated.

Along one direction the divergence from the unsteered model is KL(a) = c a^2 + O(a^3), and what rounding alone makes is
added to it. Odd powers cancel in the mean of both signs, and what does not depend on a in a difference:

    c = (KL(h) - KL(h / 2)) / (h^2 - (h / 2)^2),  KL(h) the mean of both signs

where gradients give c for all directions at once (:func:`austeer.profile`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import SteeringError
from ..forward.neutral import neutral_texts
from ..models.structure import floating_dtype, unwrap
from ..plans.plan import Plan
from ..steering.side_effects import side_effects
from ..steering.steer import steer
from ..steering.steering import Steering

#: The KL of the step, nats a token: above what rounding makes, 2e-3 in bfloat16, and where the curve is a parabola yet.
STEP_KL = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

#: By what factor it may be missed, and by what factor the step changes at most from one pass to the next.
MISSED, CHANGE = 2.0, 30.0

#: Passes in search of the step, and the largest shift of an AU at which one that does anything shows that it does.
PASSES, SEEN = 12, 1e5


def estimate_kl(
    model: nn.Module,
    tokenizer,
    plans: Plan | Sequence[Plan],
    texts: Sequence[str] | None = None,
    *,
    batch_tokens: int = 2048,
) -> list[float]:
    """What :meth:`austeer.Profile.kl` predicts for each plan at alpha = 1, nats a token, without gradients.

    While it is small, KL(alpha) is alpha^2 times it: ``sqrt(kl / found)`` is the strength at which it is ``kl``. All
    plans, of any operation, are rows of one batch, with both signs; some four passes find the step and the answer.

    Example:
        >>> plan = momentum.select("attention", k=10, operation="shift")
        >>> [found] = austeer.estimate_kl(model, tokenizer, [plan])
        >>> alpha = (0.02 / found) ** 0.5

    Args:
        model: a Transformers decoder with its head, unsteered: quantised, offloaded or split as it may be.
        tokenizer: the model's own. plans: each by itself, not their sum.
        texts: text that steering should leave as it is; by default that of :func:`austeer.profile`.
        batch_tokens: tokens in a batch, padding included.

    Returns:
        One number a plan; 0 for one that changes nothing.

    Raises:
        SteeringError: a KL that does not become small with the strength, or what :func:`austeer.steer` refuses.
        PairsError: no text of two tokens. TaskError: bidirectional attention.
    """
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    chosen = neutral_texts() if texts is None else list(texts)
    coarse = STEP_KL[torch.bfloat16]  # also where products are rounded to 8 bits
    goal = coarse if getattr(unwrap(model), "is_quantized", False) else STEP_KL.get(floating_dtype(model), coarse)
    first = [1 / max(_largest(plan), 1e-30) for plan in plans]
    step = [*first]
    found = [0.0] * len(plans)
    waiting = list(range(len(plans)))
    by_name = {f"{number}{sign}": plan for number, plan in enumerate(plans) for sign in "+-"}
    with steer(model, by_name, alpha=0.0) as steering:
        for _ in range(PASSES):
            if not waiting:
                return found
            kl = _both_signs(model, tokenizer, chosen, steering, step, waiting, batch_tokens)
            there = [number for number in waiting if goal / MISSED <= kl[number] <= goal * MISSED]
            half = _both_signs(model, tokenizer, chosen, steering, [a / 2 for a in step], there, batch_tokens)
            there = [number for number in there if half[number] <= kl[number] / 2]  # a quarter, but for rounding
            for number in there:
                found[number] = (kl[number] - half[number]) / (0.75 * step[number] ** 2)
            nothing = [number for number in waiting if kl[number] == 0 and step[number] >= SEEN * first[number]]
            waiting = [number for number in waiting if number not in {*there, *nothing}]
            last = {number: (kl[number], step[number]) for number in waiting}
            for number in waiting:
                step[number] *= _change(kl[number], goal)
    number, (value, alpha) = next(iter(last.items()))
    raise SteeringError(
        f"plan {number}: found a KL of {value:.2g} nats a token at alpha {alpha:.2g}, expected a strength at which it "
        f"is about {goal:g}: it does not grow with the square of the strength, as where a router jumps from expert to "
        "expert; see what strengths do with austeer evaluate"
    )


def _largest(plan: Plan) -> float:
    """What an AU is changed by at alpha = 1, at most: a shift, or a part of it or of a direction."""
    if plan.operation == "ablate":
        return 1.0
    return float((plan.delta if plan.operation == "shift" else plan.beta).abs().max())


def _both_signs(
    model: nn.Module,
    tokenizer,
    texts: Sequence[str],
    steering: Steering,
    step: Sequence[float],
    chosen: Sequence[int],
    batch_tokens: int,
) -> dict[int, float]:
    """The mean KL of alpha = step and -step, of the plans with these numbers."""
    if not chosen:
        return {}
    steering.alpha = {f"{number}{sign}": float(f"{sign}1") * a for number, a in enumerate(step) for sign in "+-"}
    names = [f"{number}{sign}" for number in chosen for sign in "+-"]
    means = side_effects(model, tokenizer, texts, steering, names, batch_tokens=batch_tokens).mean()
    return {number: (means[2 * place][0] + means[2 * place + 1][0]) / 2 for place, number in enumerate(chosen)}


def _change(kl: float, goal: float) -> float:
    """By what the step is multiplied. A KL that is no number is that of a shift far too large."""
    if not math.isfinite(kl):
        return 1 / CHANGE
    return CHANGE if kl <= 0 else min(CHANGE, max(1 / CHANGE, math.sqrt(goal / kl)))
