"""The strength at which an arm has a given side effect: what makes methods comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..baselines.arm import Arm, Candidate
from ..errors import TaskError
from .scorer import PLANS_AT_ONCE, Scorer, slices

#: The weakest and the strongest alpha that is tried.
WEAKEST, STRONGEST = 2.0**-10, 2.0**14

#: A side effect from this part of the limit up to the limit is near enough to it.
NEAR = 0.8

#: Forward passes for an arm, at most.
STEPS = 9


def check_limit(max_kl: float) -> None:
    """Raises TaskError unless it is a positive number."""
    if isinstance(max_kl, bool) or not 0 < max_kl < math.inf:
        raise TaskError(f"max_kl: found {max_kl!r}, expected a positive number of nats a token, for example 0.1")


@dataclass(frozen=True)
class Limit:
    """Where an arm reaches the limit.

    Attributes:
        alpha: the strongest that was seen to stay within; None if no strength that was tried did.
        kl, rise: its side effects, nats a token.
        reached: whether the side effect is near the limit, and not merely below it.
    """

    alpha: float | None
    kl: float = math.nan
    rise: float = math.nan
    reached: bool = False


def calibrate(
    scorer: Scorer,
    arms: Sequence[Arm],
    max_kl: float,
    texts: int | None = None,
    start: Callable[[Arm], float] | None = None,
    on_arm: Callable[[], None] = lambda: None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, Limit]:
    """For each arm, by its digest, the strongest alpha whose KL divergence on neutral text is within ``max_kl``.

    For small alpha the divergence is proportional to alpha squared, so the next alpha is extrapolated on logarithmic
    axes, with slope 2 at first and then that of the last two, or interpolated between two that lie on either side. All
    arms take a step together, as rows.

    Args:
        texts: how many of the scorer's neutral texts are run. start: the first alpha of an arm; by default what
            its plan's dose predicts, or 1.
        on_arm: called once for each arm that is done.
        is_over: whether time is up: then the strengths that were seen have to do.
    """
    seen: dict[str, dict[float, tuple[float, float]]] = {arm.digest: {} for arm in arms}
    waiting = {arm.digest: arm for arm in arms}
    first = start or (lambda arm: arm.plan.dose.alpha(0.9 * max_kl, arm.k) if arm.plan.dose is not None else 1.0)
    alphas = {arm.digest: min(max(first(arm), WEAKEST), STRONGEST) for arm in waiting.values()}
    for number in range(STEPS):
        if not waiting or (number and is_over()):
            break
        candidates = [Candidate(arm, alphas[digest]) for digest, arm in waiting.items()]
        for part in slices(candidates, PLANS_AT_ONCE):
            if number and is_over():
                break
            for candidate, (kl, rise) in zip(part, scorer.side_effects(part, texts)):
                digest = candidate.arm.digest
                seen[digest][candidate.alpha] = (kl if kl >= 0 else math.inf, rise)  # NaN: the model is broken
                following = _next(seen[digest], max_kl)
                if following is None:
                    del waiting[digest]
                    on_arm()
                else:
                    alphas[digest] = following
    for _ in waiting:
        on_arm()
    return {digest: _limit(values, max_kl) for digest, values in seen.items()}


def _next(seen: dict[float, tuple[float, float]], max_kl: float) -> float | None:
    """The alpha to try now; None if one is near enough, or none that is left would change anything."""
    within = {alpha: kl for alpha, (kl, _) in seen.items() if kl <= max_kl}
    beyond = {alpha: kl for alpha, (kl, _) in seen.items() if not kl <= max_kl}
    low, high = max(within, default=None), min(beyond, default=None)
    if low is not None and (within[low] >= NEAR * max_kl or low >= STRONGEST):
        return None
    if high is not None and high <= WEAKEST:
        return None
    target = math.log(0.9 * max_kl)
    if low is None or high is None:
        alpha = low if low is not None else high
        assert alpha is not None
        kl = seen[alpha][0]
        factor = math.exp((target - math.log(kl)) / _slope(seen)) if 0 < kl < math.inf else (1 / 16 if kl else 16)
        return min(max(alpha * min(max(factor, 1 / 16), 16.0), WEAKEST), STRONGEST)
    if low >= high:  # not monotonous: the strongest within stands
        return None
    place = 0.5
    if within[low] > 0 and beyond[high] < math.inf:
        ends = math.log(within[low]), math.log(beyond[high])
        place = min(max((target - ends[0]) / (ends[1] - ends[0]), 0.1), 0.9)
    following = low * (high / low) ** place
    return following if low < following < high else None


def _slope(seen: dict[float, tuple[float, float]]) -> float:
    """How steep the divergence is on logarithmic axes, by the last two strengths tried; 2 where there is one."""
    points = [(alpha, kl) for alpha, (kl, _) in seen.items() if 0 < kl < math.inf]
    if len(points) < 2:
        return 2.0
    (one, first), (other, second) = points[-2:]
    return min(max(math.log(second / first) / math.log(other / one), 0.5), 4.0)


def _limit(seen: dict[float, tuple[float, float]], max_kl: float) -> Limit:
    within = [alpha for alpha, (kl, _) in seen.items() if kl <= max_kl]
    if not within:
        return Limit(None)
    kl, rise = seen[max(within)]
    return Limit(max(within), kl, rise, kl >= NEAR * max_kl)
