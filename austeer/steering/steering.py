"""Puts plans on a model and takes them off again; live alpha, kl, k and rows; a report of what was done."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

from torch import nn

from ..errors import SteeringError, SteeringWarning
from ..models.sites import Layout, find_sites
from ..models.structure import base_of, decoder_of, has_virtual_tokens, input_device, steered, unwrap, vocabulary_size
from ..plans.fit import check_plan_fits
from ..plans.plan import Plan
from ..plans.probe import Probe
from .answering import Answering
from .deciding import Deciding, WhenReport
from .editable import why_frozen
from .fold import Fold
from .path import Path, detach_all, expect_restored
from .path_choice import MODES, plan_paths
from .prompt import Prompt
from .recomputation import Recomputation
from .replaced import Forwards, forwards_of, replaced
from .report import Report, complaint, make_report
from .routing import Routing
from .row_plans import NO_NAMES, Rows
from .scope import JUDGED, ScopeLike, parse_scope
from .selfcheck import EditProbe
from .sharing import expect_apart, expect_free, mark, unmark
from .strength import Alpha, Strength, named_plans

#: Two threads that put plans on one model at once would each save what the other has changed.
_lock = threading.RLock()


class Steering:
    """Plans on a model. Made by :func:`austeer.steer`; steers inside ``with``, or between ``attach`` and ``detach``.

    Attributes:
        plans: name -> plan; one without a name is under "".
        scope: which tokens are steered. when: the probe that decides on which rows; None: on all.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan | Mapping[str, Plan],
        alpha: Alpha,
        k: int | Mapping[str, int] | None,
        scope: ScopeLike,
        mode: str,
        layout: Layout | None,
        check: bool,
        when: Probe | None = None,
    ):
        if mode not in MODES:
            raise SteeringError(f"mode: found {mode!r}, expected one of {', '.join(MODES)}")
        self.plans = named_plans(plan)
        self.scope = parse_scope(scope)
        self.when = when
        if when is not None and (not isinstance(when, Probe) or self.scope.name not in JUDGED):
            raise SteeringError(
                f"when: found {when!r} with scope {self.scope}, expected an austeer.Probe with scope='generation' or "
                "austeer.answer_scope(tokenizer): it judges the prompt as the model reads it unsteered"
            )
        self._named = isinstance(plan, Mapping)
        self._levels = Strength(self.plans, self._named)
        self._levels.set_alpha(alpha)
        self._levels.set_k(k)
        self._model = unwrap(model)
        self._mode, self._layout, self._check = mode, layout, check
        self._decoder = decoder_of(self._model)
        self._attached = False
        self._marked: list[nn.Module] = []
        self._forwards: Forwards = {}
        self._recomputation = Recomputation(self._decoder)
        self._routing: Routing | None = None
        if self._named or self.scope.name != "all":
            if self.scope.name != "all" and has_virtual_tokens(model):
                raise SteeringError(
                    f"scope {self.scope}: found a PEFT model with virtual tokens (prompt or prefix tuning), in which "
                    "positions count differently; expected scope='all', or an adapter of another kind"
                )
            device = input_device(self._model)
            rows = Rows(list(self.plans), device) if self._named else None
            scoped = self.scope.name != "all"
            answer = self.scope.answer
            deciding = None if when is None else Deciding(when, self._model, layout, device)
            answering = None if answer is None else Answering(answer, vocabulary_size(self._model), device)
            around = nullcontext if deciding is None else deciding.generating
            prompt = Prompt(base_of(self._model), device, rows.expect if rows else None, scoped, answering, around)
            self._routing = Routing(self.scope, rows, prompt, self._decoder, self._model, answering, deciding)
        with _lock:  # planning may run a block once, with a hook on it
            self._paths, self._reasons = self._plan_paths()  # so that what cannot be is refused here
        self._expect_finite()

    def __repr__(self) -> str:
        plans = ", ".join(f"{name!r}: {plan!r}" if self._named else repr(plan) for name, plan in self.plans.items())
        state = "on" if self._attached else "off"
        return f"Steering({type(self._model).__name__}, {plans}, alpha={self.alpha}, k={self.k}, {self.scope}, {state})"

    def _plan_paths(self) -> tuple[list[Path], list[str]]:
        """A path for each site and layer of the plans, for the model as it is now."""
        plans = list(self.plans.values())
        sites = find_sites(self._model, [name for plan in plans for name in plan.sites], self._layout)
        for plan in plans:
            check_plan_fits(plan, self._model, sites)
        at_run_time = "plans are chosen row by row" if self._named else ""
        if self.scope.name != "all":
            at_run_time = f"only some tokens are steered ({self.scope})"
        switched = not self._named and self.scope.name in ("prompt", "generation", "from_last_prompt_token")
        return plan_paths(self._model, plans, sites, self._mode, at_run_time, switched, self._routing, self._check)

    # --- strength, live ----------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan, where there is one."""
        if len(self.plans) > 1:
            raise SteeringError(f"found {len(self.plans)} plans, expected one; see steering.plans")
        return next(iter(self.plans.values()))

    @property
    def alpha(self) -> float | dict[str, Any]:
        """The strength: one number, or one for each site, or either of them for each plan by name.

        Setting it takes effect at the next forward pass.
        """
        return self._levels.alpha()

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        before = self._levels.alpha()
        self._levels.set_alpha(value)
        try:
            self._expect_finite()
        except SteeringError:
            self._levels.set_alpha(before)
            raise
        self._refresh()

    @property
    def k(self) -> int | dict[str, int]:
        """How many AUs of each plan are steered, the most important first. Setting it takes effect at once."""
        return self._levels.k()

    @k.setter
    def k(self, value: int | Mapping[str, int]) -> None:
        self._levels.set_k(value)
        self._refresh()

    def _expect_finite(self) -> None:
        for path in self._paths:
            for entry in (entry for table in path.tables for entry in table.entries):
                alpha, _ = self._levels.of(path.site.name)[entry.plan]
                if not bool(entry.amounts(alpha, sys.maxsize).isfinite().all()):
                    raise SteeringError(
                        f"alpha: found {alpha:g} for site {path.site.name!r}, with which a strength of layer "
                        f"{path.site.layer} is no float32 number any more; expected a smaller one"
                    )

    def _refresh_tables(self) -> None:
        for path in self._paths:
            for table in path.tables:
                table.fill(self._levels.of(path.site.name))
        if self._routing is not None and self._routing.rows is not None:
            self._routing.rows.renew()  # what was made from the tables for the rows as they are is out of date

    def _refresh(self) -> None:
        with _lock:
            self._refresh_tables()
            self._recomputation.changed()
            if self._attached:
                # Two folds can meet in one weight (ffn and neuron): undo all, last first, before any is done anew.
                folds = [path for path in self._paths if isinstance(path, Fold)]
                failed = detach_all(folds)
                for fold in folds:
                    fold.attach()
                for path in self._paths:
                    path.refresh()
                expect_restored(failed, folds)
                self._expect_no_copies()

    def _expect_no_copies(self) -> None:
        """Warns where edits no longer reach what runs."""
        if self._marked and (reason := why_frozen()):
            warnings.warn(
                f"{reason} since steering began, where neither another strength nor the end of steering arrives; "
                "compile it anew (torch.compiler.reset()), outside the block",
                SteeringWarning,
                stacklevel=4,
            )

    @property
    def kl(self) -> float | dict[str, float] | None:
        """KL(unsteered || steered) on neutral text, nats a token, as each plan's dose has it for the strength as it is.

        Setting it sets alpha, with what was measured on entering: strengths far beyond that are extrapolated. None
        where it is not known: a plan without a dose, or with another strength at each site.
        """
        return self._levels.kl()

    @kl.setter
    def kl(self, value: float | Mapping[str, float]) -> None:
        self.alpha = self._levels.alpha_for(value)

    # --- rows and prompt, live ---------------------------------------------------------------------------------------

    def rows(self, rows: Sequence[str | None] | str | None) -> AbstractContextManager[None]:
        """Chooses each row's plan for the forward passes that follow, for plans given by name.

        ::

            with austeer.steer(model, {"kind": a, "brief": b}) as steering, steering.rows(["kind", None, "brief"]):
                model.generate(**batch)

        Takes effect at once; used as a context manager it takes the choice back on leaving. Only buffers on the device
        change while the number of rows stays the same: nothing is compiled or captured again.

        Args:
            rows: for each row of the batch, as it is given to ``generate`` or to the model, a plan's name, or None for
                a row that is left as it is. Beams and return sequences follow their row. One name: for all rows of
                any batch. None: no choice.

        Raises:
            SteeringError: an unknown name, or a plan that was given without one. A batch of another size raises when
                it is run.
        """
        if self._routing is None or self._routing.rows is None:
            raise SteeringError(NO_NAMES)
        before = self._routing.rows.chosen
        self._routing.rows.choose(rows)
        return _chosen(self._routing.rows, rows, before)

    @property
    def prompt_length(self) -> int | None:
        """How many columns of the batch are prompt, padding included, for scopes that depend on it.

        ``generate`` sets it by itself. Where the model is called directly and this is None, a call of several tokens is
        taken as prompt and a call of one token on a filled cache as generation: set it for a prompt that is given in
        pieces, or for several generated tokens at once.
        """
        return None if self._routing is None else self._routing.prompt.length

    @prompt_length.setter
    def prompt_length(self, length: int | None) -> None:
        if self._routing is None:
            raise SteeringError("prompt_length: found scope 'all', expected a scope that depends on the prompt")
        self._routing.prompt.length = length

    # --- life --------------------------------------------------------------------------------------------------------

    def attach(self) -> Steering:
        """Starts steering.

        Raises:
            SteeringError: the model is steered already, or a folded layer fails the self-check.
        """
        with _lock:
            if self._decoder in steered:
                raise SteeringError(
                    f"{type(self._model).__name__} is steered already, with {steered[self._decoder]} AUs. "
                    "Leave that context first, steer with the sum of both plans (plan_a + plan_b), or give each row "
                    'its own (steer(model, {"a": plan_a, "b": plan_b}))'
                )
            expect_free(self._decoder)
            self._paths, self._reasons = self._plan_paths()  # the model may have changed since
            expect_apart(self._paths, self._decoder)
            steered[self._decoder] = sum(map(len, self.plans.values()))
            self._attached = True
            try:
                self._marked = mark(self._paths)
                self._forwards = forwards_of(self._model, self._decoder, self._paths)
                self._refresh_tables()
                probes = EditProbe.of(self._paths, self._model) if self._check else []
                if self._routing is not None:
                    self._routing.attach()
                for path in self._paths:
                    path.attach()
                self._recomputation.attach()
                with nullcontext() if self._routing is None else self._routing.switch.turned_on():
                    for probe in probes:
                        probe.check()
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
            self._recomputation.detach()
            failed = detach_all(self._paths)
            try:
                failed += [] if self._routing is None else self._routing.detach()
            finally:  # whatever could not be restored, it is steered no more
                self._attached = False
                unmark(self._marked)
                steered.pop(self._decoder, None)
        expect_restored(failed, self._paths)
        self._expect_no_copies()

    def __enter__(self) -> Steering:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None:
            changes = replaced(self._model, self._paths, self._forwards)
            missed = self._routing is not None and self._routing.missed
            found = self._decisions()
            idle = found is not None and found.decided > found.fired == 0
            message = complaint(self._paths, changes, self.scope, missed, idle)
            if message:
                warnings.warn(message, SteeringWarning, stacklevel=2)

    def report(self) -> Report:
        """Which path each site took and why, how often it ran, how many tokens it steered, and each AU's share.

        With ``when`` also what it decided.
        """
        return make_report(self._paths, self._reasons, list(self.plans), self._levels, self._decisions())

    def _decisions(self) -> WhenReport | None:
        deciding = None if self._routing is None else self._routing.deciding
        return None if deciding is None else deciding.report()


@contextmanager
def _chosen(
    rows: Rows, choice: Sequence[str | None] | str | None, before: Sequence[str | None] | str | None
) -> Iterator[None]:
    if rows.chosen != (choice if choice is None or isinstance(choice, str) else list(choice)):
        before = rows.chosen  # another choice was made since this context was made
        rows.choose(choice)
    try:
        yield
    finally:
        rows.choose(before)
