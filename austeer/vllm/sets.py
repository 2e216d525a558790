"""Steering sets: what a request can ask for by name, as AUSTEER_SETS says it.

The variable holds the path of a folder, which is watched while the engine runs, or an object (JSON, or the path of a
file with it) with the sets and, if need be, what may come at run time::

    {"sets": {"kind":  {"plan": "plans/kind", "alpha": 8, "max_alpha": 12},
              "brief": {"plan": "plans/brief", "k": 10, "scope": "generation"},
              "both":  {"plans": [{"plan": "plans/kind", "alpha": 8}, {"plan": "plans/brief", "alpha": 2}]}},
     "slots": 64}

    {"sets": "plans/", "sites": ["attention", "neuron"], "units": 32, "max_kl": 0.2}

In a folder a set is a plan (a folder of :meth:`austeer.Plan.save_pretrained`, or NAME.safetensors), or such an object
in NAME.json. ``k`` keeps a plan's most important AUs (by default all); ``scope`` says which tokens are steered, as in
:func:`austeer.steer` (by default all); ``max_alpha`` and ``max_kl`` are the most that a request may ask for. Where
plans meet at one AU, their changes add up. A scope may be an answer's: "answer", with the markers that the model's
tokenizer is known for, or {"start": "</think>", "pauses": [["<tool_call>", "</tool_call>"]]}. ``when`` is the file of a
probe (:func:`austeer.fit_probe`) that decides at each prompt's last token whether the set's plans run on what follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import AusteerError, SteeringError
from ..models.sites import SITE_NAMES
from ..plans.serving import VARIABLE
from ..plans.table import OPERATIONS
from ..steering.scope import JUDGED, Scope, parse_scope


class ServingError(AusteerError):
    """Steering sets that cannot be read, or that an engine cannot run as it was started."""


@dataclass(frozen=True)
class PlanPart:
    """One plan of a set: its source, strength (None: each request gives it), and how many of its AUs (None: all)."""

    plan: str
    alpha: float | None = None
    k: int | None = None


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask of a set: of |alpha|, and of the KL that a plan's dose predicts; None: any."""

    alpha: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class AnswerText:
    """The scope of an answer, as :func:`austeer.answer_scope` takes it: its markers are to be found in a tokenizer."""

    start: str | None = None
    pauses: tuple[tuple[str, str], ...] | None = None

    def __str__(self) -> str:
        return f"answer from {self.start!r} on, but not between {self.pauses}"


@dataclass(frozen=True)
class Spec:
    """A set as it was asked for; no plan has been read yet.

    Attributes:
        when: the file of a probe; None: the plans always run.
    """

    parts: tuple[PlanPart, ...]
    scope: Scope | AnswerText
    limits: Limits = Limits()
    when: str | None = None


@dataclass(frozen=True)
class Declared:
    """What may come at run time, as far as it is said: the rest is that of the sets or, with a folder, the model's.

    Attributes:
        slots: distinct steerings (plans, with their strengths) of the requests that are in the engine at once.
        sites, operations: names. layers: the first and the one after the last.
        units: AUs of one steering at one site of one layer, at most.
        probes: the site and layer of probes.
    """

    slots: int | None = None
    sites: tuple[str, ...] | None = None
    layers: tuple[int, int] | None = None
    operations: tuple[str, ...] | None = None
    units: int | None = None
    probes: tuple[tuple[str, int], ...] = ()


#: The scope of sets that do not say theirs.
ALL = Scope("all")


@dataclass(frozen=True)
class Sets:
    """All that AUSTEER_SETS says.

    Attributes:
        named: the sets by name; none where there is a folder. folder: that is watched.
        scope, limits: of sets that do not say theirs.
    """

    named: Mapping[str, Spec] = field(default_factory=dict)
    folder: Path | None = None
    declared: Declared = Declared()
    scope: Scope | AnswerText = ALL
    limits: Limits = Limits()


EXPECTED = 'expected a folder, or an object such as {"sets": {"kind": {"plan": "plans/kind", "alpha": 8}}}'


@lru_cache(maxsize=8)
def parse(value: str) -> Sets:
    """What AUSTEER_SETS says; no plan is read.

    Raises:
        ServingError: the value or the file is no such object.
    """
    if not value.lstrip().startswith("{"):
        if (folder := _folder(value)) is not None:
            return Sets(folder=folder)
        content = read_json(Path(value), f"{VARIABLE}: found {short(value)}, which is neither JSON, a folder nor ")
    else:
        content = loads(value, VARIABLE)
    if not isinstance(content, dict) or "sets" not in content:
        raise ServingError(f"{VARIABLE}: found {short(content)}, {EXPECTED}")
    return _sets(dict(content))


def _sets(content: dict[str, Any]) -> Sets:
    named = content.pop("sets")
    limits, scope = take_limits(content, VARIABLE, Limits()), take_scope(content, VARIABLE, ALL)
    declared = _declared(content)
    if isinstance(named, str):
        if (folder := _folder(named)) is None:
            raise ServingError(f"{VARIABLE}, sets: found {short(named)}, which is no folder; make it, it may be empty")
        return Sets(folder=folder, declared=declared, scope=scope, limits=limits)
    if not isinstance(named, dict) or not named or not all(named):
        raise ServingError(f"{VARIABLE}, sets: found {short(named)}, expected a name for each set, or a folder")
    specs = {name: spec_of(f"{VARIABLE}, set {name!r}", entry, scope, limits) for name, entry in named.items()}
    return Sets(specs, None, declared, scope, limits)


def _folder(value: str) -> Path | None:
    try:
        return Path(value).absolute() if Path(value).is_dir() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _declared(content: dict[str, Any]) -> Declared:
    found: dict[str, Any] = {}
    for name in ("slots", "units"):
        if name in content:
            found[name] = _count(content.pop(name), f"{VARIABLE}, {name}")
    for name, known in (("sites", SITE_NAMES), ("operations", OPERATIONS)):
        if name in content:
            values = content.pop(name)
            if not isinstance(values, list) or not values or not all(value in known for value in values):
                raise ServingError(f"{VARIABLE}, {name}: found {short(values)}, expected some of {list(known)}")
            found[name] = tuple(dict.fromkeys(values))
    if "layers" in content:
        layers = content.pop("layers")
        if not _is_pair(layers) or not 0 <= layers[0] < layers[1]:
            raise ServingError(
                f"{VARIABLE}, layers: found {short(layers)}, expected the first and the one after the last: [8, 24]"
            )
        found["layers"] = tuple(layers)
    if "probes" in content:
        probes = content.pop("probes")
        if not isinstance(probes, list) or not all(_is_place(place) for place in probes):
            raise ServingError(
                f'{VARIABLE}, probes: found {short(probes)}, expected the site and layer of each: [["layer", 12]]'
            )
        found["probes"] = tuple((site, layer) for site, layer in probes)
    if content:
        raise ServingError(
            f"{VARIABLE}: found {', '.join(map(repr, content))}, expected 'sets' and, if need be, 'slots', 'sites', "
            "'layers', 'operations', 'units', 'probes', 'scope', 'max_alpha', 'max_kl'"
        )
    return Declared(**found)


def spec_of(where: str, entry: Any, scope: Scope | AnswerText, limits: Limits) -> Spec:
    """A set from its object.

    Args:
        where: what errors call it. scope, limits: what it has if it does not say its own.

    Raises:
        ServingError: it is none.
    """
    if not isinstance(entry, dict):
        raise ServingError(f'{where}: found {short(entry)}, expected an object such as {{"plan": "plans/kind"}}')
    entry = dict(entry)
    limits, scope, when = take_limits(entry, where, limits), take_scope(entry, where, scope), entry.pop("when", None)
    if when is not None and (not isinstance(when, str) or not when):
        raise ServingError(f"{where}, when: found {short(when)}, expected the file of a probe")
    if when is not None and isinstance(scope, Scope) and scope.name not in JUDGED:
        raise ServingError(
            f"{where}, when: found scope {scope}, expected 'generation' or an answer's: a probe decides at the "
            "prompt's last token, on what comes after it"
        )
    several = "plans" in entry
    parts = entry.pop("plans") if several else [entry]
    if several and entry:
        raise ServingError(f"{where}: found {', '.join(map(repr, entry))} beside 'plans'; put it into each of them")
    if not isinstance(parts, list) or not parts:
        raise ServingError(f"{where}, plans: found {short(parts)}, expected a list of at least one plan")
    found = tuple(_part(where, part) for part in parts)
    if len(found) > 1 and limits.kl is not None:
        raise ServingError(
            f"{where}, max_kl: found it for several plans, what which cost together is not known; give max_alpha"
        )
    if len(found) > 1 and (missing := [part.plan for part in found if part.alpha is None]):
        raise ServingError(f"{where}, plan {missing[0]!r}: found no alpha, expected one for each of several plans")
    for part in found:
        if part.alpha is not None and limits.alpha is not None and abs(part.alpha) > limits.alpha:
            raise ServingError(f"{where}, alpha: found {part.alpha:g}, expected at most max_alpha, {limits.alpha:g}")
    return Spec(found, scope, limits, when)


def _part(where: str, part: Any) -> PlanPart:
    expected = "an object of 'plan' and, if need be, 'alpha' and 'k'"
    if not isinstance(part, dict) or set(part) - {"plan", "alpha", "k"} or "plan" not in part:
        found = ", ".join(map(repr, part)) if isinstance(part, dict) else short(part)
        raise ServingError(f"{where}: found {found or 'nothing'}, expected {expected}")
    plan, alpha, k = part["plan"], part.get("alpha"), part.get("k")
    if not isinstance(plan, str) or not plan:
        raise ServingError(f"{where}, plan: found {short(plan)}, expected a folder or a file")
    if alpha is not None and not is_number(alpha):
        raise ServingError(f"{where}, alpha: found {short(alpha)}, expected a finite number")
    return PlanPart(plan, None if alpha is None else float(alpha), None if k is None else _count(k, f"{where}, k"))


def take_limits(entry: dict[str, Any], where: str, default: Limits) -> Limits:
    """The limits of an object, which loses them."""
    found = {}
    for name in ("alpha", "kl"):
        value = entry.pop(f"max_{name}", getattr(default, name))
        if value is not None and (not is_number(value) or value <= 0):
            raise ServingError(f"{where}, max_{name}: found {short(value)}, expected a positive number")
        found[name] = None if value is None else float(value)
    return Limits(**found)


def take_scope(entry: dict[str, Any], where: str, default: Scope | AnswerText) -> Scope | AnswerText:
    """The scope of an object, which loses it."""
    if "scope" not in entry:
        return default
    scope = entry.pop("scope")
    if scope == "answer":
        return AnswerText()
    if isinstance(scope, dict):
        start, pauses = scope.get("start"), scope.get("pauses")
        pairs = pauses is None or (isinstance(pauses, list) and all(_is_pair(pair, str) for pair in pauses))
        if set(scope) - {"start", "pauses"} or not (start is None or isinstance(start, str)) or not pairs:
            raise ServingError(
                f"{where}, scope: found {short(scope)}, expected an answer's markers: "
                '{"start": "</think>", "pauses": [["<tool_call>", "</tool_call>"]]}'
            )
        return AnswerText(start, None if pauses is None else tuple((opens, closes) for opens, closes in pauses))
    try:
        return parse_scope(scope)
    except SteeringError as error:
        raise ServingError(f"{where}, {error}") from error


def read_json(path: Path, otherwise: str) -> Any:
    """The content of a JSON file; raises ServingError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ServingError(f"{otherwise}a file that can be read ({error})") from error
    return loads(text, str(path))


def loads(text: str, where: str) -> Any:
    """JSON; raises ServingError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServingError(f"{where}: found no valid JSON ({error})") from error


def is_number(value: Any) -> bool:
    """A finite number that float32 can hold, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 3e38  # neither NaN nor infinity, and integers of any length


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ServingError(f"{where}: found {short(value)}, expected an integer from 1")
    return value


def _is_pair(value: Any, kind: type = int) -> bool:
    return isinstance(value, list) and [type(one) for one in value] == [kind, kind]


def _is_place(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] in SITE_NAMES and type(value[1]) is int
