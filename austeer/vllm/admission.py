"""What a request asks for, and whether it may: one answer for the HTTP layer, the front end and the scheduler."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import AusteerError
from ..plans.plan import Plan
from ..plans.probe import Probe
from ..plans.serving import ALPHA, KEY, KL
from ..steering.scope import Scope
from .catalog import Catalog, Entry, catalog
from .sets import AnswerText, ServingError, is_number, short
from .shared import read_structure

#: Where the scheduler tells the workers which row a request has. No client may write it.
ROW = f"{KEY}_row"


class RequestError(ServingError, ValueError):
    """A request that asks for what it cannot have: HTTP 400."""


@dataclass(frozen=True)
class Steering:
    """The steering of one request.

    Attributes:
        parts: plans and their strengths, added up. probe: that decides whether they run; None: they do.
        digest: of the plans' content and the strengths: what a row of the tables holds.
        salt: of these and of the scope: what keys and values depend on.
    """

    parts: tuple[tuple[Plan, float], ...]
    scope: Scope | AnswerText
    digest: str
    salt: str
    probe: Probe | None = None


def steering_of(extra: Mapping[str, Any] | None, sets: Catalog | None) -> Steering | None:
    """What a request's ``extra_args`` ask for; None for no steering.

    Raises:
        RequestError: what it asks for is not there, cannot be read, or is more than it may ask for.
    """
    ours = {key: value for key, value in (extra or {}).items() if isinstance(key, str) and key.startswith(KEY)}
    if not ours:
        return None
    if unknown := set(ours) - {KEY, ALPHA, KL}:
        raise RequestError(f"found {short(min(unknown))}, expected {KEY!r}, {ALPHA!r} or {KL!r}")
    if sets is None:
        raise RequestError(f"{KEY}: found {short(ours)}, and a server that has no steering sets")
    if KEY not in ours:
        raise RequestError(f"{min(ours)}: found it without {KEY!r}, expected a steering set's name there")
    try:
        return _steering(ours, sets)
    except RequestError:
        raise
    except AusteerError as error:
        raise RequestError(f"{KEY}: {error}") from error


def _steering(ours: Mapping[str, Any], sets: Catalog) -> Steering:
    names = ours[KEY] if isinstance(ours[KEY], list) else [ours[KEY]]
    if not names or len(set(map(repr, names))) < len(names):
        raise RequestError(f"{KEY}: found {short(names)}, expected the name of a set, or a list of different ones")
    entries = [sets[name] for name in names]
    if len({entry.spec.scope for entry in entries}) > 1:
        scopes = ", ".join(f"{name!r}: {entry.spec.scope}" for name, entry in zip(names, entries))
        raise RequestError(f"{KEY}: found sets of different scopes ({scopes}), expected one scope in a request")
    probes = {entry.digests[len(entry.plans) :] for entry in entries}
    if len(probes) > 1:
        raise RequestError(f"{KEY}: found sets {short(names)} with different probes, expected one for all, or none")
    alphas = _alphas(ours, names, entries)
    parts: list[tuple[Plan, float]] = []
    digests: list[str] = []
    for name, entry, alpha in zip(names, entries, alphas):
        own = entry.alphas if alpha is None else (alpha,)
        for plan, digest, strength in zip(entry.plans, entry.digests, own):
            if strength is None:
                raise RequestError(
                    f"{KEY}: found the set {name!r} without a strength, expected {ALPHA!r} or, where its plan has a "
                    f"dose, {KL!r} beside it"
                )
            _check_limits(name, entry, plan, strength)
            if any(digest == other.split()[0] for other in digests):
                raise RequestError(f"{KEY}: found one plan twice in {short(names)}, expected different plans")
            parts.append((plan, strength))
            digests.append(f"{digest} {strength!r}")
    if len(parts) > 1 and (bounded := [n for n, e in zip(names, entries) if e.limits.kl is not None]):
        raise RequestError(
            f"{KEY}: found the set {bounded[0]!r}, which has a max_kl, in a sum: what several plans cost together is "
            "not known; ask for it alone"
        )
    scope = entries[0].spec.scope
    text = "\n".join([*sorted(digests), str(*probes)])
    return Steering(tuple(parts), scope, _sha(text), _sha(f"{text}\n{scope}"), entries[0].probe)


def _alphas(ours: Mapping[str, Any], names: list[Any], entries: list[Entry]) -> list[float | None]:
    """The strength of each set that the request gives; None for the set's own."""
    given = [key for key in (ALPHA, KL) if key in ours]
    if len(given) > 1:
        raise RequestError(f"found {ALPHA!r} and {KL!r}, expected one of them")
    if not given:
        return [None] * len(names)
    (key,) = given
    values = ours[key] if isinstance(ours[key], list) else [ours[key]]
    if len(values) != len(names) or not all(map(is_number, values)):
        wanted = "a finite number" if len(names) == 1 else f"a list of {len(names)} finite numbers, one for each set"
        raise RequestError(f"{key}: found {short(ours[key])}, expected {wanted}")
    for name, entry in zip(names, entries):
        if len(entry.plans) > 1:
            raise RequestError(
                f"{key}: found it for the set {name!r} of {len(entry.plans)} plans, whose strengths are fixed; ask for "
                "sets of one plan each"
            )
    if key == ALPHA:
        return [float(value) for value in values]
    if len(names) > 1:
        raise RequestError(f"{KL}: found {len(names)} sets, expected one: what several cost together is not known")
    (plan,) = entries[0].plans
    if plan.dose is None:
        raise RequestError(f"{KL}: found the set {names[0]!r}, whose plan has no dose; expected {ALPHA!r}")
    return [plan.dose.alpha(values[0])]


def _check_limits(name: Any, entry: Entry, plan: Plan, alpha: float) -> None:
    most = entry.limits
    if most.alpha is not None and abs(alpha) > most.alpha:
        raise RequestError(f"{ALPHA}: found {alpha:.6g}, expected at most {most.alpha:g} of the set {name!r}")
    if most.kl is not None and plan.dose is not None and (kl := plan.dose.kl_of(alpha)) > most.kl * (1 + 1e-6):
        raise RequestError(
            f"{KL}: found {kl:.4g} nats a token (alpha {alpha:.6g}), expected at most {most.kl:g} of the set {name!r}"
        )


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


#: Digests of what was found to fit an engine, the last ones: to make a row takes milliseconds.
_fitting: OrderedDict[tuple[str, ...], None] = OrderedDict()
REMEMBERED = 4096


def checked(extra: Mapping[str, Any] | None) -> None:
    """Raises RequestError where the front end can see that a request asks for what it cannot have.

    That is all that the scheduler sees, where the engine runs on this machine.
    """
    steering = steering_of(extra, catalog())
    structure = None if steering is None else read_structure()
    if steering is None or structure is None:
        return
    models = {str(part.model) for part in (*(plan for plan, _ in steering.parts), steering.probe) if part is not None}
    key = steering.digest, *sorted(models), structure.digest
    if key in _fitting:
        return
    try:
        structure.row(steering.parts, steering.probe)
    except AusteerError as error:
        raise RequestError(f"{KEY}: {error}") from error
    _fitting[key] = None
    if len(_fitting) > REMEMBERED:
        _fitting.popitem(last=False)
