"""Steering sets: what a request can ask for by name.

AUSTEER_SETS holds an object, or the path of a JSON file with one, from names to sets::

    {"kind":  {"plan": "plans/kind", "alpha": 8},
     "brief": {"plan": "plans/brief", "alpha": 2, "k": 10, "scope": "generation"},
     "both":  {"plans": [{"plan": "plans/kind", "alpha": 8}, {"plan": "plans/brief", "alpha": 2}]}}

A plan is what :meth:`austeer.Plan.from_pretrained` takes. ``k`` keeps a plan's most important AUs (by default all), and
``scope`` says which tokens are steered, as in :func:`austeer.steer` (by default all). Where plans of a set meet at one
AU, their changes add up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from austeer_kernels import coalesce

from ..errors import AusteerError, SteeringError
from ..plans.fit import LayerUnits, units_by_layer
from ..plans.plan import Plan
from ..plans.serving import KEY, VARIABLE
from ..steering.scope import Scope, parse_scope


class ServingError(AusteerError):
    """Steering sets that cannot be read, or that an engine cannot run as it was started."""


@dataclass(frozen=True)
class PlanPart:
    """One plan of a set: its source, strength, and how many of its AUs (None: all)."""

    plan: str
    alpha: float
    k: int | None = None


@dataclass(frozen=True)
class Spec:
    """A set as it was asked for; no plan has been read yet."""

    parts: tuple[PlanPart, ...]
    scope: Scope


@lru_cache(maxsize=8)
def parse(value: str) -> Mapping[str, Spec]:
    """The sets that AUSTEER_SETS asks for, by name.

    Raises:
        ServingError: the value or the file is no such object.
    """
    text = value
    if not value.lstrip().startswith("{"):
        try:
            text = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(
                f"{VARIABLE}: found {value!r}, which is neither JSON nor a file that can be read ({error})"
            ) from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ServingError(f"{VARIABLE}: found no valid JSON ({error})") from error
    if not isinstance(content, dict) or not content or not all(content):
        raise ServingError(
            f"{VARIABLE}: found {_short(content)}, expected a name for each set: "
            '{"kind": {"plan": "plans/kind", "alpha": 8}}'
        )
    return {name: _spec(f"{VARIABLE}, set {name!r}", entry) for name, entry in content.items()}


def _spec(where: str, entry: Any) -> Spec:
    if not isinstance(entry, dict):
        raise ServingError(f'{where}: found {_short(entry)}, expected an object such as {{"plan": "plans/kind"}}')
    entry = dict(entry)
    scope = entry.pop("scope", "all")
    several = "plans" in entry
    parts = entry.pop("plans") if several else [entry]
    if several and entry:
        raise ServingError(f"{where}: found {', '.join(map(repr, entry))} beside 'plans'; put it into each of them")
    if not isinstance(parts, list) or not parts:
        raise ServingError(f"{where}, plans: found {_short(parts)}, expected a list of at least one plan")
    try:
        return Spec(tuple(_part(where, part) for part in parts), parse_scope(scope))
    except SteeringError as error:
        raise ServingError(f"{where}, {error}") from error


def _part(where: str, part: Any) -> PlanPart:
    expected = "an object of 'plan', 'alpha' and, if not all AUs, 'k'"
    if not isinstance(part, dict) or set(part) - {"plan", "alpha", "k"} or {"plan", "alpha"} - set(part):
        found = ", ".join(map(repr, part)) if isinstance(part, dict) else _short(part)
        raise ServingError(f"{where}: found {found or 'nothing'}, expected {expected}")
    plan, alpha, k = part["plan"], part["alpha"], part.get("k")
    if not isinstance(plan, str) or not plan:
        raise ServingError(f"{where}, plan: found {_short(plan)}, expected a folder or a file")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ServingError(f"{where}, alpha: found {_short(alpha)}, expected a finite number")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ServingError(f"{where}, k: found {_short(k)}, expected an integer from 1")
    return PlanPart(plan, float(alpha), k)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def load(specs: Mapping[str, Spec]) -> dict[str, list[tuple[Plan, float]]]:
    """The plans of each set, cut to their k, each with its alpha.

    Raises:
        AusteerError: a plan cannot be read, or has fewer AUs than k.
    """
    loaded: dict[str, list[tuple[Plan, float]]] = {}
    for name, spec in specs.items():
        loaded[name] = []
        for part in spec.parts:
            try:
                plan = Plan.from_pretrained(part.plan)
                loaded[name].append((plan if part.k is None else plan.top(part.k), part.alpha))
            except AusteerError as error:
                raise ServingError(f"{VARIABLE}, set {name!r}, plan {part.plan!r}: {error}") from error
    return loaded


@dataclass(frozen=True)
class Lists:
    """What ``steer_columns_`` takes for one site of one layer: a list of AUs for each set.

    index int64, gamma and shift float32 [sets, AUs of the longest list]; with ``magnitude`` gamma is for |x|.
    """

    index: Tensor
    gamma: Tensor
    shift: Tensor
    magnitude: bool


#: Where push meets scale in one set, push is divided by 1 + scale: smaller, and float16 would overflow in between.
SMALLEST_FACTOR = 1 / 16


def tables(sets: Sequence[Sequence[tuple[Plan, float]]]) -> dict[tuple[str, int], list[Lists]]:
    """The AUs of all sets at each steered (site, layer), with their strengths; to be applied one after the other.

    Raises:
        ServingError: push meets a scale of about -1 at an AU of one set.
    """
    found: dict[tuple[str, int], list[tuple[int, LayerUnits, float, int]]] = {}
    widths: dict[str, int] = {}
    for number, plans in enumerate(sets):
        for plan, alpha in plans:
            widths |= plan.model.widths
            for key, (units,) in units_by_layer([plan], plan.sites).items():
                found.setdefault(key, []).append((number, units, alpha, len(plan)))
    return {key: _lists(found[key], len(sets), widths[key[0]]) for key in sorted(found)}


def _lists(parts: Sequence[tuple[int, LayerUnits, float, int]], sets: int, width: int) -> list[Lists]:
    groups = []
    for magnitude in (True, False):
        of_sets = []
        for number in range(sets):
            none = torch.empty(0, device="cpu")
            own = [(none.long(), none, none)]
            for of, units, alpha, k in parts:
                if of == number and units.magnitude == magnitude:
                    own.append((units.index.long(), *units.strengths(alpha, k)))
            index, gamma, shift = map(torch.cat, zip(*own))
            of_sets.append((index, gamma, shift))
        groups.append(Lists(*coalesce(of_sets), magnitude))
    push, rest = groups
    # Push comes first, and what follows multiplies it by 1 + gamma, too, where a set has both at an AU.
    factor = torch.ones(sets, width + 1, device="cpu").scatter_(1, rest.index % (width + 1), 1 + rest.gamma)
    factor = factor.gather(1, push.index % (width + 1))  # -1 is the last column
    small = factor.abs() < SMALLEST_FACTOR
    if small.any():
        number, place = small.nonzero()[0].tolist()
        raise ServingError(
            f"{VARIABLE}, set number {number + 1}: found push and a scale of {factor[number, place] - 1:.4g} at AU "
            f"{push.index[number, place]}, expected one of them there; change an alpha a little"
        )
    groups[0] = replace(push, gamma=push.gamma / factor)
    return [lists for lists in groups if lists.index.shape[1]]


def set_of(params: Any) -> str | None:
    """The name of the set that a request's ``SamplingParams`` ask for."""
    return None if params is None else (params.extra_args or {}).get(KEY)
