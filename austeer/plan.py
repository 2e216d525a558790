"""Plan: which AUs, how strongly; and its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import files
from .errors import FileFormatError, PlanError, check_count
from .sites import SITE_NAMES, Fingerprint

OPERATIONS = ("scale", "push", "shift")
FORMAT, VERSION = "austeer-plan", 1
FILE_NAME = "austeer_plan.safetensors"


@dataclass(frozen=True)
class AtomicUnit:
    """One row of a plan."""

    site: str
    layer: int
    index: int
    beta: float
    delta: float


@dataclass(frozen=True, eq=False)
class Plan:
    """The AUs to steer, most important first, so that ``top(k)`` is a prefix.

    Attributes:
        site: the site's name, one an AU.
        layer, index: int32 [k], the decoder layer from 0, and the AU within the site.
        beta: float32 [k], the signed rate of consistent pairs (paper), in -1 .. 1.
        delta: float32 [k], the mean of positive minus negative activation, in the activation's own unit.
        operation: what steering does to the activation x of an AU, with the strength alpha:
            "scale": x + alpha * beta * x (the paper); "push": x + alpha * beta * |x|; "shift": x + alpha * delta.
        model: what the plan was measured on. pairs: how many pairs. ties: the tie rule. chat_template: whether the
            prompts went through one.

    Raises:
        PlanError: rows of unequal length, none, repeated, out of range or not finite.
    """

    site: tuple[str, ...]
    layer: Tensor
    index: Tensor
    beta: Tensor
    delta: Tensor
    operation: str
    model: Fingerprint
    pairs: int
    ties: str = "effect"
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise PlanError(f"operation: found {self.operation!r}, expected one of {', '.join(OPERATIONS)}")
        if not self.site:
            raise PlanError("a plan needs at least one AU; found none")
        for name, dtype in (
            ("layer", torch.int32),
            ("index", torch.int32),
            ("beta", torch.float32),
            ("delta", torch.float32),
        ):
            t = getattr(self, name)
            if not isinstance(t, Tensor) or t.dtype != dtype or tuple(t.shape) != (len(self.site),):
                found = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
                raise PlanError(f"{name}: found {found}, expected {dtype} [{len(self.site)}]")
            if not torch.isfinite(t).all():
                raise PlanError(f"{name}: found NaN or infinity, expected finite numbers")
        if self.beta.abs().max() > 1:
            raise PlanError(f"beta: found {float(self.beta.abs().max())}, expected -1 to 1")
        for name in self.sites:
            if name not in self.model.widths:
                raise PlanError(f"site {name!r} has no width in the plan's model; found {sorted(self.model.widths)}")
            layer, index = self.layer[self.of(name)], self.index[self.of(name)]
            for what, values, size in (("layer", layer, self.model.layers), ("index", index, self.model.widths[name])):
                if values.min() < 0 or values.max() >= size:
                    raise PlanError(
                        f"{what}: found {int(values.min())} to {int(values.max())} at site {name!r}, "
                        f"expected 0 to {size - 1}"
                    )
        if len(set(self.keys())) < len(self):
            raise PlanError("found the same AU twice; a plan names each AU once")

    def __repr__(self) -> str:
        where = ", ".join(f"{self.site.count(name)} at {name}" for name in self.sites)
        return f"Plan({len(self)} AUs: {where}; {self.operation}; {self.model.name}, {self.pairs} pairs)"

    def __len__(self) -> int:
        return len(self.site)

    def __iter__(self) -> Iterator[AtomicUnit]:
        columns = (self.layer.tolist(), self.index.tolist(), self.beta.tolist(), self.delta.tolist())
        return (AtomicUnit(*row) for row in zip(self.site, *columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._header() == other._header() and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def keys(self) -> list[tuple[str, int, int]]:
        """(site, layer, index) of each AU."""
        return list(zip(self.site, self.layer.tolist(), self.index.tolist()))

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the plan's sites, in the order of ``SITE_NAMES``; unknown ones last."""
        order = {name: i for i, name in enumerate(SITE_NAMES)}
        return tuple(sorted(set(self.site), key=lambda name: (order.get(name, len(order)), name)))

    def of(self, site: str) -> Tensor:
        """Positions of a site's AUs in the plan: int64 [k of the site]."""
        return torch.tensor([i for i, name in enumerate(self.site) if name == site], dtype=torch.int64)

    def take(self, positions: Tensor) -> Plan:
        """The plan of the AUs at ``positions``, in that order."""
        return replace(
            self,
            site=tuple(self.site[i] for i in positions.tolist()),
            layer=self.layer[positions],
            index=self.index[positions],
            beta=self.beta[positions],
            delta=self.delta[positions],
        )

    def top(self, k: int) -> Plan:
        """The k most important AUs.

        Raises:
            PlanError: k is not from 1 to the plan's length.
        """
        return self.take(torch.arange(check_count("k", k, len(self), "the plan's AUs", PlanError)))

    def with_operation(self, operation: str) -> Plan:
        """The same AUs under another operation."""
        return replace(self, operation=operation)

    def __add__(self, other: Plan) -> Plan:
        """Both plans' AUs, alternating by rank, so that a prefix still holds the most important of each.

        Raises:
            PlanError: the plans differ in model, operation or prompt form, or share an AU.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        mine, theirs = self.model, other.model
        same_widths = all(theirs.widths.get(name, width) == width for name, width in mine.widths.items())
        if (mine.model_type, mine.layers) != (theirs.model_type, theirs.layers) or not same_widths:
            raise PlanError(f"found a plan for {theirs}, expected one for {mine}; plans of one model add up")
        for what in ("operation", "chat_template"):
            if getattr(self, what) != getattr(other, what):
                raise PlanError(
                    f"{what}: found {getattr(other, what)!r} and {getattr(self, what)!r}, expected the same in both"
                )
        rank = torch.cat([torch.arange(len(self)), torch.arange(len(other))])
        joined = replace(
            self,
            site=self.site + other.site,
            layer=torch.cat([self.layer, other.layer]),
            index=torch.cat([self.index, other.index]),
            beta=torch.cat([self.beta, other.beta]),
            delta=torch.cat([self.delta, other.delta]),
            model=replace(mine, widths={**theirs.widths, **mine.widths}),
            pairs=min(self.pairs, other.pairs),
        )
        return joined.take(torch.argsort(rank, stable=True))

    def _header(self) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "model": self.model.to_json(),
            "pairs": self.pairs,
            "ties": self.ties,
            "chat_template": self.chat_template,
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes ``austeer_plan.safetensors`` into ``folder`` (made if missing) and returns the file's path."""
        path = Path(folder) / FILE_NAME
        names = self.sites
        tensors = {
            "site": torch.tensor([names.index(name) for name in self.site], dtype=torch.uint8),
            "layer": self.layer,
            "index": self.index,
            "beta": self.beta,
            "delta": self.delta,
        }
        files.write(path, FORMAT, VERSION, {**self._header(), "sites": list(names)}, tensors)
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Plan:
        """Reads a plan from a folder, or from the file itself.

        Raises:
            FileFormatError: the file is missing, truncated, foreign or of another version.
            PlanError: its content is not a valid plan.
        """
        path = Path(folder)
        if path.is_dir():
            path /= FILE_NAME
        header, tensors = files.read(path, FORMAT, VERSION)
        try:
            names = header.pop("sites")
            site = tuple(names[i] for i in tensors.pop("site").tolist())
            model = Fingerprint.from_json(header.pop("model"))
            return cls(site=site, model=model, **cast(dict[str, Any], tensors), **header)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: inconsistent content ({error}); make the plan anew") from error
