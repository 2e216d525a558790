"""The steering sets that there are: named in AUSTEER_SETS and read once, or in a folder and read as it changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from ..errors import AusteerError
from ..plans.files import FILE_NAME
from ..plans.plan import Plan
from ..plans.probe import Probe
from ..plans.serving import VARIABLE
from .sets import Limits, PlanPart, ServingError, Sets, Spec, parse, read_json, short, spec_of

#: Names that an error lists, at most; and tries to read a file that changes meanwhile.
SHOWN, TRIES = 12, 3


@dataclass(frozen=True)
class Entry:
    """A set with its plans.

    Attributes:
        plans: cut to their k. alphas: None where the request has to give it.
        probe: that decides whether they run; None: they do.
    """

    spec: Spec
    plans: tuple[Plan, ...]
    alphas: tuple[float | None, ...]
    probe: Probe | None = None

    @property
    def limits(self) -> Limits:
        return self.spec.limits

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of what each plan does, and of the probe if there is one: requests ask for them again and again."""
        plans = tuple(plan.digest for plan in self.plans)
        return plans if self.probe is None else (*plans, self.probe.digest)


@dataclass(frozen=True)
class _Read:
    """What was read of a name in a folder: from which files, as they were, and what came of it."""

    files: tuple[Path, ...]
    state: tuple
    result: Entry | AusteerError


class Catalog:
    """Sets by name.

    Those of a folder are looked up anew at each request: new, replaced and removed ones are seen without a restart.
    """

    def __init__(self, sets: Sets):
        self.sets = sets
        self._named: dict[str, Entry] = {}
        self._read: dict[str, _Read] = {}

    def names(self) -> list[str]:
        """Those that there are now, sorted; whether they can be read is not looked at."""
        if self.sets.folder is None:
            return sorted(self.sets.named)
        found = set()
        with os.scandir(self.sets.folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if path.suffix in (".safetensors", ".json"):
                    found.add(path.stem)
                elif (path / FILE_NAME).is_file():
                    found.add(entry.name)
        return sorted(found)

    def __getitem__(self, name: object) -> Entry:
        """The set of a name, as it is now.

        Raises:
            ServingError: there is none. AusteerError: it cannot be read.
        """
        if self.sets.folder is None:
            if not isinstance(name, str) or name not in self.sets.named:
                raise self._unknown(name)
            if name not in self._named:
                self._named[name] = entry_of(self.sets.named[name], f"{VARIABLE}, set {name!r}")
            return self._named[name]
        if not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise self._unknown(name)
        try:
            found = self._of_folder(self.sets.folder, name).result
        except (OSError, ValueError) as error:  # no name for a file, or the folder is gone
            raise ServingError(f"steering set {short(name)}: cannot be looked for ({error})") from error
        if isinstance(found, AusteerError):
            raise found
        return found

    def _unknown(self, name: object) -> ServingError:
        names = self.names()
        listed = ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        where = "" if self.sets.folder is None else f" in {self.sets.folder}"
        expected = f"one of {listed}{where}" if names else f"a name; there is none{where}"
        return ServingError(f"found the steering set {short(name)}, expected {expected}")

    def _of_folder(self, folder: Path, name: str) -> _Read:
        for _ in range(TRIES):
            sources = [folder / name / FILE_NAME, folder / f"{name}.safetensors", folder / f"{name}.json"]
            sources = [path for path in sources if path.is_file()]
            known = self._read.get(name)
            if known is not None and [*known.files[: len(sources)]] == sources and _state(known.files) == known.state:
                return known
            if not sources:
                self._read.pop(name, None)
                raise self._unknown(name)
            if len(sources) > 1:
                raise ServingError(
                    f"steering set {name!r}: found {' and '.join(map(str, sources))}, expected one of them; remove one"
                )
            found = self._load(sources[0], name)
            if _state(found.files) == found.state:  # it was not written to meanwhile
                self._read[name] = found
                return found
        raise ServingError(f"steering set {name!r}: found a file that changes while it is read; ask again later")

    def _load(self, source: Path, name: str) -> _Read:
        files: tuple[Path, ...] = (source,)
        where = f"steering set {name!r}"
        state = _state(files)
        try:
            if source.suffix == ".json":
                spec = spec_of(where, read_json(source, f"{where}: no "), self.sets.scope, self.sets.limits)
                parts = tuple(PlanPart(str(source.parent / part.plan), part.alpha, part.k) for part in spec.parts)
                when = None if spec.when is None else str(source.parent / spec.when)
                paths = [Path(part.plan) for part in parts] + ([] if when is None else [Path(when)])
                # Both that a path may become: what is not there yet, or is another kind, may come.
                files = (source, *(file for path in paths for file in (path, path / FILE_NAME)))
                state = _state(files)
                for path, given in zip(paths, [*(part.plan for part in spec.parts), spec.when]):
                    _expect(path, given, where)
                spec = Spec(parts, spec.scope, spec.limits, when)
            else:
                spec = Spec((PlanPart(str(source)),), self.sets.scope, self.sets.limits)
            return _Read(files, state, entry_of(spec, where))
        except AusteerError as error:
            return _Read(files, state, error)


def _expect(path: Path, given: str | None, where: str) -> None:
    """Raises ServingError where what a set's file in the folder names, seen from there, is not there."""
    if not path.exists():
        raise ServingError(
            f"{where}: found {given!r}, expected a file or a folder seen from {path.parent}; fetch a plan of the Hub "
            f"into it: austeer pull {given} --out FOLDER"
        )


def _state(files: tuple[Path, ...]) -> tuple:
    """What tells whether files have changed; None for one that is not there."""

    def one(path: Path) -> tuple[int, ...] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    return tuple(map(one, files))


def entry_of(spec: Spec, where: str) -> Entry:
    """A set with its plans read.

    Raises:
        ServingError: a plan cannot be read, has fewer AUs than k, or no dose where the set has a max_kl.
    """
    plans, alphas = [], []
    for part in spec.parts:
        try:
            plan = Plan.from_pretrained(part.plan)
            plan = plan if part.k is None else plan.top(part.k)
        except AusteerError as error:
            raise ServingError(f"{where}, plan {part.plan!r}: {error}") from error
        if spec.limits.kl is not None and plan.dose is None:
            raise ServingError(
                f"{where}, max_kl: found a plan without a dose, which cannot be held to it; give max_alpha, or make "
                "the plan of shifts with a profile (austeer select --profile)"
            )
        plans.append(plan)
        alphas.append(part.alpha)
    try:
        probe = None if spec.when is None else Probe.load(spec.when)
    except AusteerError as error:
        raise ServingError(f"{where}, when {spec.when!r}: {error}") from error
    return Entry(spec, tuple(plans), tuple(alphas), probe)


@lru_cache(maxsize=8)
def catalog_of(value: str) -> Catalog:
    """The one catalog of this process for a value of AUSTEER_SETS.

    Raises:
        ServingError: the value cannot be read.
    """
    return Catalog(parse(value))


def catalog() -> Catalog | None:
    """That of AUSTEER_SETS as it is; None where it is not set."""
    value = os.environ.get(VARIABLE)
    return None if value is None else catalog_of(value)


def entries(found: Catalog) -> Mapping[str, Entry]:
    """All sets that are named in AUSTEER_SETS itself, read.

    Raises:
        AusteerError: one cannot be.
    """
    return {name: found[name] for name in found.sets.named}
