"""The steering tables of an engine: what may come where (the compiled structure), and the AUs of one row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from austeer_kernels import coalesce

from ..models.sites import Fingerprint
from ..plans.fit import LayerUnits, check_architecture, units_by_layer
from ..plans.plan import Plan
from ..plans.probe import Probe
from ..plans.serving import VARIABLE
from ..plans.table import OPERATIONS
from .catalog import Catalog, Entry, entries
from .sets import Declared, ServingError

#: AUs of one steering at one site of one layer, where plans come into a folder and nothing else is declared.
UNITS = 64

#: The kinds of list that a table has, by operation, in the order in which they are applied: a direction is removed from
#: what the model made, push goes by |x|, scale and shift are one.
KIND_OF = {"ablate": "direction", "push": "push", "scale": "linear", "shift": "linear"}
KINDS = tuple(dict.fromkeys(KIND_OF.values()))

#: Where push meets scale in one row, push is divided by 1 + scale: smaller, and float16 would overflow in between.
SMALLEST_FACTOR = 1 / 16

#: A list of a table: the site, the layer and the kind.
Place = tuple[str, int, str]


@dataclass(frozen=True)
class Structure:
    """Where steering may come, and how much: what the compiled graph is made for.

    Attributes:
        model: the engine's, with the widths of all its sites.
        slots: rows of each table. room: AUs of a row at each place, at most; in the order in which they are applied.
        probes: the site and layer of each that there may be.
    """

    model: Fingerprint
    slots: int
    room: Mapping[Place, int]
    probes: tuple[tuple[str, int], ...] = ()

    @cached_property
    def places(self) -> list[Place]:
        return list(self.room)

    @cached_property
    def digest(self) -> str:
        """Of all that is compiled."""
        shapes = [self.slots, [[*place, count] for place, count in self.room.items()], self.probes]
        return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()

    def to_json(self) -> dict:
        room = [[*place, count] for place, count in self.room.items()]
        return {"model": self.model.to_json(), "slots": self.slots, "room": room, "probes": self.probes}

    @classmethod
    def from_json(cls, data: dict) -> Structure:
        room = {(site, layer, kind): count for site, layer, kind, count in data["room"]}
        probes = tuple((site, layer) for site, layer in data["probes"])
        return cls(Fingerprint.from_json(data["model"]), data["slots"], room, probes)

    def row(self, parts: Sequence[tuple[Plan, float]], probe: Probe | None = None) -> Row:
        """The AUs of plans at their strengths, and the probe that decides whether they run.

        Raises:
            PlanError: a plan or the probe is not for this model.
            ServingError: there is no room for them, push meets a scale of about -1, or two directions one layer.
        """
        for plan, _ in parts:
            self.check_model(plan)
        lists = lists_of(parts)
        for place, (index, _, _) in lists.items():
            self._check_room(place, len(index))
        numbers = {place: number for number, place in enumerate(self.places)}
        number = [torch.full((len(lists[p][0]),), numbers[p], dtype=torch.int32, device="cpu") for p in lists]
        index, gamma, shift = map(torch.cat, zip(*lists.values()))
        if not bool((gamma.isfinite() & shift.isfinite()).all()):
            raise ServingError("found an alpha with which a strength is no float32 number any more; give a smaller one")
        return Row(torch.cat(number), index, gamma, shift, *self._probe(probe))

    def _probe(self, probe: Probe | None) -> tuple[Tensor, Tensor]:
        """The number of a probe's place, and its direction with the threshold behind it; nothing for none."""
        if probe is None:
            return torch.empty(0, dtype=torch.int32, device="cpu"), torch.empty(0, device="cpu")
        self.check_model(probe, "the probe")
        place = probe.site, probe.layer
        if place not in self.probes:
            raise ServingError(
                f"found a probe at site {probe.site!r} of layer {probe.layer}, expected one of "
                f"{[list(one) for one in self.probes]}, which the engine was started for; declare "
                f'"probes": [["{probe.site}", {probe.layer}]] in {VARIABLE}, and start it anew'
            )
        number = torch.tensor([self.probes.index(place)], dtype=torch.int32, device="cpu")
        return number, torch.cat([probe.direction, torch.tensor([probe.threshold], device="cpu")])

    def check_model(self, plan: Plan | Probe, what: str = "the plan") -> None:
        """Raises PlanError where a plan or a probe is for another model."""
        sites = plan.sites if isinstance(plan, Plan) else (plan.site,)
        widths = {name: width for name, width in self.model.widths.items() if name in sites}
        check_architecture(plan.model, sites, replace(self.model, widths=widths), what)

    def _check_room(self, place: Place, count: int) -> None:
        site, layer, kind = place
        room = self.room.get(place)
        if room is None:
            there = sorted({(s, k) for s, _, k in self.room})
            names = {kind: " and ".join(o for o in OPERATIONS if KIND_OF.get(o) == kind) for kind in KINDS}
            declared = ", ".join(f"{names[k]} at {s}" for s, k in there)
            raise ServingError(
                f"found {names[kind]} at site {site!r} of layer {layer}, expected what the engine was started for "
                f"({declared}); declare 'sites', 'layers' or 'operations' in {VARIABLE}, and start it anew"
            )
        if count > room:
            raise ServingError(
                f"found {count} AUs at site {site!r} of layer {layer}, expected at most {room}, which the engine was "
                f'started for; give a smaller k, or declare "units": {count} in {VARIABLE}, and start it anew'
            )


@dataclass(frozen=True)
class Row:
    """The AUs of one row of all tables.

    Attributes:
        place: int32 [AUs], ascending, the number of each one's place in the structure.
        index: int64 [AUs], columns of the site. gamma, shift: float32 [AUs]; gamma of push is for |x|. Of a direction,
            gamma is that, of length 1, and shift its strength, at each AU.
        probed: int32 [1], the number of its probe's place; [0] where it has none.
        probe: float32 [width + 1], the probe's direction and, behind it, its threshold; [0] likewise.
    """

    place: Tensor
    index: Tensor
    gamma: Tensor
    shift: Tensor
    probed: Tensor
    probe: Tensor

    def save(self, path: Path) -> None:
        """Raises ServingError where it cannot be written."""
        try:
            save_file({field.name: getattr(self, field.name).contiguous() for field in fields(self)}, path)
        except (OSError, SafetensorError) as error:
            raise ServingError(f"{path}: cannot be written ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> Row:
        return cls(**load_file(path))

    def by_place(self) -> Iterable[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """(number of the place, (index, gamma, shift)) of each place that has AUs."""
        if not len(self.place):
            return ()
        numbers, counts = self.place.unique_consecutive(return_counts=True)
        split = zip(*(t.split(counts.tolist()) for t in (self.index, self.gamma, self.shift)))
        return zip(numbers.tolist(), split)


def lists_of(parts: Sequence[tuple[Plan, float]]) -> dict[Place, tuple[Tensor, Tensor, Tensor]]:
    """Index, gamma and shift of plans at their strengths, by place: lower layers first, push before what is linear.

    Raises:
        ServingError: push meets a scale of about -1 at an AU.
    """
    found: dict[tuple[str, int], list[tuple[LayerUnits, float, int]]] = {}
    for plan, alpha in parts:
        for key, (units,) in units_by_layer([plan], plan.sites).items():
            found.setdefault(key, []).append((units, alpha, len(plan)))
    lists: dict[Place, tuple[Tensor, Tensor, Tensor]] = {}
    for (site, layer), of_layer in sorted(found.items(), key=lambda item: item[0][::-1]):
        kinds: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for kind in KINDS:
            own = [
                (units.index.long(), *_values(units, alpha, k))
                for units, alpha, k in of_layer
                if KIND_OF[units.operation] == kind
            ]
            if kind == "direction" and len(own) > 1:
                raise ServingError(
                    f"found {len(own)} plans of 'ablate' at site {site!r} of layer {layer}, expected one; what two "
                    "directions remove does not add up"
                )
            if own:
                index, gamma, shift = coalesce([tuple(map(torch.cat, zip(*own)))])  # type: ignore[list-item]
                kinds[kind] = index[0], gamma[0], shift[0]
        if {"push", "linear"} <= kinds.keys():
            kinds["push"] = _beside_scale(site, layer, kinds["push"], kinds["linear"])
        lists |= {(site, layer, kind): values for kind, values in kinds.items()}
    return lists


def _values(units: LayerUnits, alpha: float, k: int) -> tuple[Tensor, Tensor]:
    """gamma and shift as a row has them."""
    if units.operation != "ablate":
        return units.strengths(alpha, k)
    direction = units.direction(k)
    return direction, torch.full_like(direction, alpha)


def _beside_scale(
    site: str, layer: int, push: tuple[Tensor, Tensor, Tensor], linear: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Push where linear changes follow, which multiply it by 1 + gamma where both have an AU: divided by that."""
    index, gamma, shift = push
    factor = torch.ones(int(max(index.max(), linear[0].max())) + 1, device="cpu")
    factor[linear[0]] = 1 + linear[1]
    factor = factor[index]
    small = factor.abs() < SMALLEST_FACTOR
    if small.any():
        place = int(small.nonzero()[0])
        raise ServingError(
            f"found push and a scale of {factor[place] - 1:.4g} at AU {index[place]} of site {site!r}, layer {layer}, "
            "expected one of them there; change an alpha a little"
        )
    return index, gamma / factor, shift


def structure_of(catalog: Catalog, model: Fingerprint, slots: int) -> Structure:
    """What an engine is made for: the room that its named sets need, and what is declared.

    Args:
        model: the engine's, with the widths of all its sites. slots: where none are declared.

    Raises:
        AusteerError: a named set cannot be read, is for another model or needs more than is declared.
    """
    declared = catalog.sets.declared
    room: dict[Place, int] = {}
    named = entries(catalog)
    needs = [_needs(entry) for entry in named.values()]
    longest = max((count for need in needs for count in need.values()), default=UNITS)
    if not named or declared != Declared(slots=declared.slots, probes=declared.probes):
        needs.append(_declared(declared, model, list(named.values()), longest))
    for need in needs:
        for place, count in need.items():
            room[place] = max(room.get(place, 0), count)
    order = sorted(room, key=lambda place: (place[1], place[0], KINDS.index(place[2])))
    probes = {(entry.probe.site, entry.probe.layer) for entry in named.values() if entry.probe is not None}
    probes |= set(declared.probes)
    rows = declared.slots or max(slots, len(named))
    found = Structure(model, rows, {place: room[place] for place in order}, tuple(sorted(probes)))
    for name, entry in named.items():
        for plan in entry.plans:
            found.check_model(plan, f"set {name!r}: the plan")
        if entry.probe is not None:
            found.check_model(entry.probe, f"set {name!r}: the probe")
    if wrong := [place for place in probes if place[0] not in model.widths or place[1] >= model.layers]:
        raise ServingError(f"{VARIABLE}, probes: found {list(wrong[0])}, expected a layer from 0 to {model.layers - 1}")
    return found


def _needs(entry: Entry) -> dict[Place, int]:
    parts = [(plan, 1.0 if alpha is None else alpha) for plan, alpha in zip(entry.plans, entry.alphas)]
    return {place: len(index) for place, (index, _, _) in lists_of(parts).items()}


def _declared(declared: Declared, model: Fingerprint, named: Sequence[Entry], longest: int) -> dict[Place, int]:
    """The room that is declared; what is left open is that of the named sets, or the model's.

    Args:
        longest: AUs of a list where none are declared.
    """
    plans = [plan for entry in named for plan in entry.plans]
    sites = declared.sites or tuple(sorted({site for plan in plans for site in plan.sites})) or tuple(model.widths)
    operations = declared.operations or tuple({plan.operation for plan in plans}) or ("scale", "shift")
    if unknown := set(sites) - set(model.widths):
        raise ServingError(
            f"{VARIABLE}, sites: found {min(unknown)!r}, expected some of {', '.join(model.widths)}, which "
            f"{model.model_type} has"
        )
    first, last = declared.layers or (0, model.layers)
    if last > model.layers:
        raise ServingError(f"{VARIABLE}, layers: found {first} to {last - 1}, expected 0 to {model.layers - 1} at most")
    units = declared.units or longest
    kinds = sorted({KIND_OF[operation] for operation in operations}, key=KINDS.index)
    return {
        (site, layer, kind): min(units, model.widths[site])
        for layer in range(first, last)
        for site in sites
        for kind in kinds
    }
