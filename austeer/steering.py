"""steer(): puts a plan on a model and takes it off again; live alpha and k; a report of what was done."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .dispatch import PATHS, choose
from .errors import PlanError, SteeringError, SteeringWarning, check_count
from .fold import Fold, shared_storages
from .paths import Path
from .plan import Plan
from .sites import Layout, Site, decoder_of, find_sites, fingerprint, input_device, unwrap
from .strengths import StrengthTable

MODES = ("auto", *PATHS)

#: Decoder (not its wrapper, so that a model and its head-less part are one) -> how many AUs of it are steered.
_steered: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

#: Two threads that put plans on one model at once would each save what the other has changed.
_lock = threading.RLock()


@dataclass(frozen=True)
class SiteReport:
    """What happened at one site of one layer.

    Attributes:
        site, layer, module: where.
        path: "fold", "fused", "columns" or "dense".
        aus: how many AUs of the plan lie here.
        calls: how often the path ran outside compiled graphs; None for fold, which leaves nothing to run.
        compiled: whether the path is part of a compiled graph.
        reason: why this path and not a cheaper one; empty for the cheapest.
    """

    site: str
    layer: int
    module: str
    path: str
    aus: int
    calls: int | None
    compiled: bool
    reason: str

    def __str__(self) -> str:
        ran = "in the weights" if self.calls is None else f"ran {self.calls} times"
        ran += ", compiled" if self.compiled else ""
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.site:<9} layer {self.layer:>3}  {self.aus:>5} AUs  {self.path:<7} {ran}{why}"


class Report(tuple[SiteReport, ...]):
    """One ``SiteReport`` for each steered site and layer; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))


class Steering:
    """A plan on a model. Made by :func:`steer`; steers inside ``with``, or between ``attach`` and ``detach``."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        alpha: float | Mapping[str, float],
        k: int | None,
        mode: str,
        layout: Layout | None,
    ):
        if mode not in MODES:
            raise SteeringError(f"mode: found {mode!r}, expected one of {', '.join(MODES)}")
        if not isinstance(plan, Plan):
            raise PlanError(f"plan: found {type(plan).__name__}, expected an austeer.Plan")
        self.plan = plan
        self._alpha = _alphas(alpha, plan)
        self._k = self._checked_k(len(plan) if k is None else k)
        self._model = unwrap(model)
        self._mode, self._layout = mode, layout
        self._decoder = decoder_of(self._model)
        self._attached = False
        self._paths, self._reasons = self._plan_paths()  # so that what cannot be is refused here

    def _checked_k(self, k: int) -> int:
        return check_count("k", k, len(self.plan), "the plan's AUs", PlanError)

    def _plan_paths(self) -> tuple[list[Path], list[str]]:
        """A path for each site and layer of the plan, for the model as it is now."""
        paths: list[Path] = []
        reasons: list[str] = []
        mode = self._mode
        sites = find_sites(self._model, self.plan.sites, self._layout)
        _check_plan_fits(self.plan, self._model, sites)
        storages = shared_storages(self._model)
        device = input_device(self._model)
        plan = self.plan
        for name in plan.sites:
            positions = plan.of(name)
            for layer in plan.layer[positions].unique().tolist():
                rows = positions[plan.layer[positions] == layer]
                site = sites[name][layer]
                projection = self._model.get_submodule(site.projection) if site.projection else None
                module = self._model.get_submodule(site.path)
                kind, reason = choose(mode, projection, plan.operation, storages, site)
                if kind == "fused" and any(path.module is projection for path in paths):
                    kind, reason = "columns", "its projection is fused with another site already"
                target = projection if kind in ("fold", "fused") else module
                assert target is not None
                table = StrengthTable(
                    plan.index[rows],
                    plan.beta[rows],
                    plan.delta[rows],
                    rows,
                    site.width,
                    plan.operation,
                    _device_of(target, device),
                )
                paths.append(PATHS[kind](site, table, target))
                reasons.append(reason)
        return paths, reasons

    # --- strength, live ----------------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float | dict[str, float]:
        """The strength: one number, or one for each site of the plan. Setting it takes effect at the next forward."""
        values = set(self._alpha.values())
        return next(iter(values)) if len(values) == 1 else dict(self._alpha)

    @alpha.setter
    def alpha(self, value: float | Mapping[str, float]) -> None:
        self._alpha = _alphas(value, self.plan)
        self._refresh()

    @property
    def k(self) -> int:
        """How many AUs of the plan are steered, the most important first. Setting it takes effect at once."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        self._k = self._checked_k(value)
        self._refresh()

    def _refresh_tables(self) -> None:
        for path in self._paths:
            path.table.fill(self._alpha[path.site.name], self._k)

    def _refresh(self) -> None:
        self._refresh_tables()
        if self._attached:
            # Two folds can meet in one weight (ffn and neuron): undo all, last first, before any is done anew.
            folds = [path for path in self._paths if isinstance(path, Fold)]
            for path in reversed(folds):
                path.detach()
            for path in folds:
                path.attach()

    # --- life --------------------------------------------------------------------------------------------------------

    def attach(self) -> Steering:
        """Starts steering.

        Raises:
            SteeringError: the model is steered already.
        """
        with _lock:
            if self._decoder in _steered:
                raise SteeringError(
                    f"{type(self._model).__name__} is steered already, with {_steered[self._decoder]} AUs. "
                    "Leave that context first, or steer with the sum of both plans (plan_a + plan_b)"
                )
            self._paths, self._reasons = self._plan_paths()  # the model may have changed since
            _steered[self._decoder] = len(self.plan)
            self._attached = True
            try:
                self._refresh_tables()
                for path in self._paths:
                    path.attach()
            except BaseException:
                self.detach()
                raise
        return self

    def detach(self) -> None:
        """Stops steering; the model is what it was, bit for bit. Does nothing if it does not steer.

        Raises:
            SteeringError: a module could not be restored (it was replaced, say); all others are.
        """
        with _lock:
            if not self._attached:
                return
            failed = []
            for path in reversed(self._paths):
                try:
                    path.detach()
                except Exception as error:  # one module must not keep the others steered
                    failed.append(f"{path.site.path} ({error})")
            self._attached = False
            _steered.pop(self._decoder, None)
        if failed:
            raise SteeringError(f"{len(failed)} of {len(self._paths)} modules could not be restored: {failed[0]}")

    def __enter__(self) -> Steering:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None:
            self._warn_of_silence()

    def _warn_of_silence(self) -> None:
        silent = [p for p in self._paths if p.calls == 0 and not p.traced]
        if silent:
            site = silent[0].site
            warnings.warn(
                f"{len(silent)} of {len(self._paths)} steered sites never ran, first {site.name!r} of layer "
                f"{site.layer} ({site.path}): the model was not run, or not through these modules. See report()",
                SteeringWarning,
                stacklevel=3,
            )

    def report(self) -> Report:
        """Which path each site took, why, and how often it ran."""
        return Report(
            SiteReport(
                site=path.site.name,
                layer=path.site.layer,
                module=path.site.path,
                path=path.name,
                aus=path.table.index.numel(),
                calls=path.calls,
                compiled=path.traced,
                reason=reason,
            )
            for path, reason in zip(self._paths, self._reasons)
        )


def steer(
    model: nn.Module,
    plan: Plan,
    alpha: float | Mapping[str, float] = 1.0,
    *,
    k: int | None = None,
    mode: str = "auto",
    layout: Layout | None = None,
) -> Steering:
    """Steers a model with a plan, inside a ``with`` block (paper: x + alpha * beta * x at every position).

    ::

        with austeer.steer(model, plan, alpha=15) as steering:
            model.generate(**inputs)
            steering.alpha = 5

    Everything is checked before anything is touched, and on leaving the block the model is restored bit for bit, also
    after an exception. Only layers in which the plan has AUs are touched.

    Inside the block the model *is* the steered one: a copy or a checkpoint made there may hold steered weights (fold),
    and a training step on folded weights is lost for the steered rows on leaving; train with ``mode="columns"``. A
    compiled model is compiled again in each new block (not under fold): stay in one, and set ``alpha`` to 0.

    Args:
        model: a Transformers model on any devices, also offloaded or compiled, or PEFT's wrapper of one.
        plan: from ``Momentum.select`` or ``Plan.from_pretrained``.
        alpha: the strength; a number, or one for each site of the plan by name. 0 steers nothing, and a negative
            number steers the other way (not under "scale", see Plan).
        k: steer only the k most important AUs; all by default.
        mode: the path, see ``report()``: "fold" edits weights in place and costs nothing at run time, "fused" runs our
            projection kernel, "columns" runs the sparse kernel after the model's own computation, "dense" is the
            public code's arithmetic. "auto" takes fold where it is exact and possible, otherwise columns.
        layout: attribute paths of a model whose family is not known.

    Raises:
        PlanError: the plan is for another architecture, or k does not fit.
        SiteError: the model lacks a site.
        SteeringError: alpha is not finite, or ``mode`` is not possible at a site (which is named with the reason).
    """
    return Steering(model, plan, alpha, k, mode, layout)


def is_steered(model: nn.Module) -> bool:
    """Whether a plan is on the model now."""
    return decoder_of(unwrap(model)) in _steered


def _alphas(alpha: float | Mapping[str, float], plan: Plan) -> dict[str, float]:
    values = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(plan.sites, alpha)
    if set(values) != set(plan.sites):
        raise SteeringError(f"alpha: found sites {sorted(values)}, expected {sorted(plan.sites)}")
    largest = torch.finfo(torch.float32).max  # strengths are float32
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= largest:
            raise SteeringError(f"alpha: found {value!r} for site {name!r}, expected a finite float32 number")
    return {name: float(value) for name, value in values.items()}


def _check_plan_fits(plan: Plan, model: nn.Module, sites: Mapping[str, list[Site]]) -> None:
    found, expected = fingerprint(model, dict(sites)), plan.model
    widths = {name: expected.widths[name] for name in plan.sites}
    if (found.model_type, found.layers, found.widths) != (expected.model_type, expected.layers, widths):
        raise PlanError(
            f"the plan was made for {expected.name} ({expected.model_type}, {expected.layers} layers, widths {widths}) "
            f"and the model is {found.name} ({found.model_type}, {found.layers} layers, widths {found.widths}); "
            "measure and select on this model"
        )


def _device_of(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module's activations are expected: with its weights, unless those are offloaded."""
    device = next((p.device for p in module.parameters()), default)
    return default if device.type == "meta" else device
