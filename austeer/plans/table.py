"""The table of a plan: which AUs, how strongly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import PlanError, check_count
from ..models.sites import SITE_NAMES, Fingerprint
from ..pairs.chat import ChatForm, check_chat_form
from .dose import Dose
from .evidence import Evidence
from .replay import Replay

if TYPE_CHECKING:
    from typing_extensions import Self

#: What is done to each AU by itself; and "ablate", which removes the direction that a layer's AUs form together.
BY_UNIT = ("scale", "push", "shift")
OPERATIONS = (*BY_UNIT, "ablate")
TIES = ("effect", "public")
#: What AUs are ranked by, and how far a shift of strength 1 moves them.
RANKED_BY = ("momentum", "difference", "effect")
STEPPED_BY = ("difference", "newton")
#: The same of a plan, which may be a sum of plans that differ in them.
MIXED = "mixed"
RANKS, STEPS = (*RANKED_BY, MIXED), (*STEPPED_BY, MIXED)
#: The columns that are tensors, one entry an AU.
COLUMNS = {"layer": torch.int32, "index": torch.int32, "beta": torch.float32, "delta": torch.float32}


@dataclass(frozen=True)
class AtomicUnit:
    """One row of a plan."""

    site: str
    layer: int
    index: int
    beta: float
    delta: float


@dataclass(frozen=True, eq=False)
class PlanTable:
    """The rows of a :class:`austeer.Plan` and what is done with them: all of it but files and the Hub."""

    site: tuple[str, ...]
    layer: Tensor
    index: Tensor
    beta: Tensor
    delta: Tensor
    operation: str
    model: Fingerprint
    pairs: int
    ties: str = "effect"
    chat_template: ChatForm = False
    evidence: Evidence | None = None
    rank: str = "momentum"
    step: str = "difference"
    dose: Dose | None = None
    replay: Replay | None = None

    def __post_init__(self) -> None:
        for name, names in (
            ("operation", OPERATIONS),
            ("ties", TIES),
            ("rank", RANKS),
            ("step", STEPS),
        ):
            value = getattr(self, name)
            if value not in names:
                raise PlanError(f"{name}: found {value!r}, expected one of {', '.join(names)}")
        for what, kind in (("site", tuple), ("model", Fingerprint), ("pairs", int)):
            if type(getattr(self, what)) is not kind:
                raise PlanError(f"{what}: found {type(getattr(self, what)).__name__}, expected {kind.__name__}")
        try:
            check_chat_form(self.chat_template)
        except (TypeError, ValueError) as error:
            raise PlanError(str(error)) from error
        if self.pairs < 0 or not all(isinstance(name, str) for name in self.site):
            raise PlanError(f"found {self.pairs} pairs and sites {set(map(type, self.site))}, expected 0 or more, str")
        if not self.site:
            raise PlanError("a plan needs at least one AU; found none")
        for name, dtype in COLUMNS.items():
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
            rows = self.of(name)
            layer, index = self.layer[rows], self.index[rows]
            for what, values, size in (("layer", layer, self.model.layers), ("index", index, self.model.widths[name])):
                least, greatest = int(values.min()), int(values.max())
                if least < 0 or greatest >= size:
                    raise PlanError(f"{what}: found {least} to {greatest} at site {name!r}, expected 0 to {size - 1}")
            if (layer.long() * self.model.widths[name] + index).unique().numel() < len(rows):
                raise PlanError("found the same AU twice; a plan names each AU once")
        self.expect_directions(len(self))
        if self.dose is not None and (self.operation, len(self.dose.kl)) != ("shift", len(self)):
            raise PlanError(
                f"dose: found that of {len(self.dose.kl)} AUs in a plan of {self.operation!r} with {len(self)}, "
                "expected as many, of 'shift'"
            )
        if self.replay is not None and not isinstance(self.replay, Replay):
            raise PlanError(f"replay: found {type(self.replay).__name__}, expected a Replay")
        if self.evidence is not None:
            if not isinstance(self.evidence, Evidence):
                raise PlanError(f"evidence: found {type(self.evidence).__name__}, expected Evidence")
            if self.evidence.sites() - set(self.sites):
                raise PlanError(
                    f"evidence: found an alpha for sites {sorted(self.evidence.sites())}, expected {list(self.sites)}"
                )

    def __repr__(self) -> str:
        where = ", ".join(f"{self.site.count(name)} at {name}" for name in self.sites)
        return f"Plan({len(self)} AUs: {where}; {self.operation}; {self.model.name}, {self.pairs} pairs)"

    def __len__(self) -> int:
        return len(self.site)

    def __iter__(self) -> Iterator[AtomicUnit]:
        columns = (getattr(self, name).tolist() for name in COLUMNS)
        return (AtomicUnit(*row) for row in zip(self.site, *columns))

    def __eq__(self, other: object) -> bool:
        names = ("operation", "model", "pairs", "ties", "chat_template", "evidence", "rank", "step", "dose", "replay")
        return (
            isinstance(other, PlanTable)
            and all(getattr(self, name) == getattr(other, name) for name in names)
            and list(self) == list(other)
        )

    __hash__ = None  # type: ignore[assignment]

    def keys(self) -> list[tuple[str, int, int]]:
        """(site, layer, index) of each AU."""
        return list(zip(self.site, self.layer.tolist(), self.index.tolist()))

    @property
    def digest(self) -> str:
        """SHA-256 of the operation, the AUs and their strengths, in their order: what a plan does, and no more."""
        found = hashlib.sha256(f"{self.operation} {self.keys()}".encode())
        for values in (self.beta, self.delta):
            found.update(values.numpy().tobytes())
        return found.hexdigest()

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the plan's sites, in the order of ``SITE_NAMES``; unknown ones last."""
        order = {name: i for i, name in enumerate(SITE_NAMES)}
        return tuple(sorted(set(self.site), key=lambda name: (order.get(name, len(order)), name)))

    def of(self, site: str) -> Tensor:
        """Positions of a site's AUs in the plan: int64 [k of the site]."""
        return torch.tensor([i for i, name in enumerate(self.site) if name == site], dtype=torch.int64, device="cpu")

    def take(self, positions: Tensor) -> Self:
        """The plan of the AUs at ``positions``, in that order.

        With the evidence and the replay only if that is all, in this order; with the dose if it is the first of them.
        """
        first = positions.tolist() == list(range(len(positions)))
        whole = first and len(positions) == len(self)
        return replace(
            self,
            evidence=self.evidence if whole else None,
            replay=self.replay if whole else None,
            dose=self.dose.top(len(positions)) if first and self.dose is not None else None,
            site=tuple(self.site[i] for i in positions.tolist()),
            **{name: getattr(self, name)[positions] for name in COLUMNS},
        )

    def top(self, k: int) -> Self:
        """The k most important AUs.

        Raises:
            PlanError: k is not from 1 to the plan's length.
        """
        return self.take(torch.arange(check_count("k", k, len(self), "the plan's AUs", PlanError), device="cpu"))

    def expect_directions(self, k: int) -> None:
        """Raises PlanError where the plan ablates, and the first ``k`` AUs form no direction in a layer that has some.

        No other operation needs one.
        """
        if self.operation != "ablate":
            return
        largest: dict[tuple[str, int], float] = {}
        for (site, layer, _), size in zip(self.keys()[:k], self.delta[:k].abs().tolist()):
            largest[site, layer] = max(size, largest.get((site, layer), 0.0))
        for (site, layer), size in largest.items():
            if not size:
                raise PlanError(
                    f"delta: found zeros alone among the first {k} AUs at site {site!r} of layer {layer}, expected "
                    "other numbers: 'ablate' removes the direction of delta; take other AUs, or another operation"
                )

    def with_operation(self, operation: str) -> Self:
        """The same AUs under another operation, of which there is no evidence, no dose and no replay.

        Raises:
            PlanError: an unknown operation, or "ablate" of AUs that form no direction.
        """
        if operation == self.operation:
            return self
        return replace(self, operation=operation, evidence=None, dose=None, replay=None)

    def with_evidence(self, evidence: Evidence | None) -> Self:
        """The same plan with what is known of its effect and cost, for its file and its card.

        Raises:
            PlanError: the evidence names a site that the plan does not have.
        """
        return replace(self, evidence=evidence)

    def with_dose(self, dose: Dose | None) -> Self:
        """The same plan with what its strengths do.

        Raises:
            PlanError: a dose of another number of AUs, or of another operation than "shift".
        """
        return replace(self, dose=dose)

    def with_replay(self, replay: Replay | None) -> Self:
        """The same plan with what a model writes under it; :func:`austeer.record_replay` makes one."""
        return replace(self, replay=replay)

    def __add__(self, other: Self) -> Self:
        """Both plans' AUs, alternating by rank, so that a prefix still holds the most important of each.

        Under "ablate" what both have at one site of one layer is one direction, of all these AUs: the sum ablates that
        one, and not one of each plan.

        Raises:
            PlanError: the plans differ in model, operation or prompt form, or share an AU.
        """
        if not isinstance(other, PlanTable):
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
        columns: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in (self, other)]) for name in COLUMNS}
        rank = torch.cat([torch.arange(len(self), device="cpu"), torch.arange(len(other), device="cpu")])
        joined = replace(
            self,
            evidence=None,
            dose=None,
            replay=None,
            rank=self.rank if self.rank == other.rank else MIXED,
            step=self.step if self.step == other.step else MIXED,
            site=self.site + other.site,
            **columns,
            model=replace(mine, widths={**theirs.widths, **mine.widths}),
            pairs=min(self.pairs, other.pairs),
        )
        return joined.take(torch.argsort(rank, stable=True))
