"""The verdict: which of the recorded hypotheses answers agree with, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

from ..plans.replay import APPLIED, NOT_APPLIED, Replay
from .comparison import Written, agreeing, difference, of_answer
from .record import LAYERS
from .verification import Verification

#: What engines differ by in float32, nats, with room: nothing smaller tells two hypotheses apart.
FLOOR = 1e-3
#: Steered answers may differ from their hypothesis by so many times what unsteered ones differ by: rounding of 16 bits
#: is larger where activations are.
ROOM = 5.0
#: Another hypothesis has to be so many times as far away.
CLEAR = 2.0
#: Where no unsteered answer can be had, the share of the steering's own effect that is taken for rounding.
SHARE = 0.1

CANNOT_TELL, SOMETHING_ELSE, TO_ALL = "cannot tell", "something else", "applied to every request"
STALE = "stale prompt cache"
STALE_REASON = (
    "applied to requests that reuse no prompt: the server keeps what it computed of a prompt, and gives it to requests "
    "that are steered otherwise"
)
CACHE_UNKNOWN = "a stale prompt cache is not ruled out: the server gave no answers to requests that reuse no prompt"


def verdict_on(
    replay: Replay,
    steered: Sequence[Written],
    unsteered: Sequence[Written] | None,
    engine: str,
    versions: dict[str, str],
) -> Verification:
    """Compares answers with a replay.

    Args:
        unsteered: of requests that ask for no plan; None where every request is steered.
    """
    known = {name: [of_answer(answer) for answer in answers] for name, answers in replay.answers.items()}
    found = {name: difference(steered, expected) for name, expected in known.items()}
    effect = difference(known[APPLIED], known[NOT_APPLIED])
    base = None if unsteered is None else {name: difference(unsteered, one) for name, one in known.items()}
    verdict, reason = _judged(found, base, effect)
    if verdict == NOT_APPLIED and base is None:
        reason = "and no request asked for it: see lora, set and body"
    return Verification(
        verdict=verdict,
        reason=reason,
        differences=found,
        unsteered=None if base is None else base[NOT_APPLIED],
        effect=effect,
        agreeing=agreeing(steered, known[APPLIED]),
        replay=replay,
        engine=engine,
        versions=versions,
    )


def _judged(found: dict[str, float], base: dict[str, float] | None, effect: float) -> tuple[str, str]:
    """The verdict, and what there is to say of it."""
    if base is None:
        noise, leaking, allowed = FLOOR, None, max(ROOM * FLOOR, SHARE * effect)
    else:
        nearest = min(base, key=lambda name: base[name])
        leaking = nearest if CLEAR * max(base[nearest], FLOOR) < base[NOT_APPLIED] else None
        noise = max(FLOOR, base[leaking or NOT_APPLIED])
        allowed = ROOM * noise
    if effect < 4 * FLOOR:
        return CANNOT_TELL, (
            f"the plan moves no log-probability by more than {effect:.1g} nats; record a replay at a larger alpha"
        )
    if noise > effect / CLEAR:
        return CANNOT_TELL, (
            f"unsteered requests are {noise:.2g} nats from the record, and steering itself moves {effect:.2g}: another "
            "model, other weights or tokens, or a coarse quantisation"
        )
    best = min(found, key=lambda name: found[name])
    if found[best] > allowed:
        return SOMETHING_ELSE, f"nearest to {best!r}, {found[best]:.2g} nats away; {allowed:.2g} may be rounding"
    near = _nearest(found, CLEAR * max(found[best], noise))
    if len(near) > 1 and APPLIED in near:
        others = " and ".join(repr(name) for name in near if name != APPLIED)
        return CANNOT_TELL, f"{APPLIED!r} is no nearer than {others}; record at a larger alpha, or run in float32"
    if near == [APPLIED] and leaking is not None:
        return TO_ALL, f"requests that ask for no plan are steered, too ({leaking!r})"
    faults = [f"applied elsewhere ({name})" if name in LAYERS else name for name in near]
    return " or ".join(faults), "" if len(near) == 1 else "these cannot be told apart"


def _nearest(found: dict[str, float], within: float) -> list[str]:
    """The hypotheses that are no farther away than that, nearest first; the nearest in any case."""
    order = sorted(found, key=lambda name: found[name])
    return [name for name in order if name == order[0] or found[name] < within]
