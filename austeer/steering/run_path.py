"""A path that runs: it steers what goes into one module, or what comes out of it. Columns, fused and dense run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..errors import SteeringError
from ..models.patches import Patch
from ..models.sites import Site
from ..models.structure import first_tensor
from .path import Path
from .recomputation import expect_watched
from .routing import NOBODY, Routing, capturing
from .selfcheck import checked_tensor
from .tables import Table


def observable(x: Tensor) -> bool:
    """Whether values can be looked at now: outside compiled and captured graphs."""
    return not is_compiling() and not capturing(x.device)


class RunPath(Path):
    """A path in whose module's place a forward of ours runs, around the module's own.

    Args:
        tables: one, or two where plans with and without magnitude meet.
        routing: which tokens are steered; None for all of them.
        check: whether the first call is compared with the formula.
    """

    def __init__(
        self,
        site: Site,
        tables: Sequence[Table],
        module: nn.Module,
        routing: Routing | None = None,
        check: bool = False,
    ):
        super().__init__(site, tables[0], module)
        self.tables = tuple(tables)
        self.routing = routing
        self._check = check
        self._elements = 0
        self._patch = Patch(module)
        self._inner: Callable = module.forward

    @property
    def tokens(self) -> int | None:
        return self._elements // self.table.width if self.routing is None else self.routing.tokens

    def attach(self) -> None:
        self._patch.attach(self.at_input if self.site.side == "input" else self.at_output)
        self._inner = self._patch.inner

    def detach(self) -> None:
        try:
            self._patch.detach()
        except SteeringError:
            self.steer = _unsteered  # type: ignore[method-assign]  # what wraps our forward calls it still
            raise

    # --- the module's forward ----------------------------------------------------------------------------------------

    def at_input(self, *args, **kwargs):
        """The module's forward on a steered input."""
        if args:
            return self._inner(self.steer(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))  # every module that has an input-side site takes one tensor, whatever its name
        return self._inner(**{**kwargs, name: self.steer(kwargs[name])})

    def at_output(self, *args, **kwargs):
        """The module's forward, and its output steered."""
        output = self._inner(*args, **kwargs)
        if output.__class__ is Tensor:
            return self.steer(output)
        if isinstance(output, (tuple, list)):
            steered = [self.steer(first_tensor(output)), *output[1:]]
            return steered if isinstance(output, list) else tuple(steered)
        return self.steer(output)

    def steer(self, x: Tensor) -> Tensor:
        """The steered tensor, may be ``x`` itself."""
        if x.shape[-1] != self.table.width:
            raise SteeringError(
                f"site {self.site.name!r} of layer {self.site.layer} ({self.site.path}): found a tensor of width "
                f"{x.shape[-1]}, expected {self.table.width}. A model split over processes is steered if Transformers "
                "split it (DistributedConfig(tp_plan='auto'))"
            )
        rows = self.begin(x)
        if rows is NOBODY:
            return x
        if not self.checks_now(x):
            return self.apply(x, rows)
        return checked_tensor(self, x, rows)(self.apply(x, rows))

    def begin(self, x: Tensor):
        """Counts a call, follows ``x`` to its device, and gives each token's row of the tables (see ``rows_for``)."""
        if is_compiling():
            self.traced = True  # a count would be a guard, and so a recompilation at every call
        else:
            if self.module.training or (x.requires_grad and torch.is_grad_enabled()):
                expect_watched(self.site)
            self.calls += 1  # type: ignore[operator]
            if self.routing is None:
                self._elements += x.numel()
        if x.device != self.table.device:
            for table in self.tables:
                table.to(x.device)
        return None if self.routing is None else self.routing.rows_for(x)

    def checks_now(self, x: Tensor) -> bool:
        """Whether this call is to be compared with the formula: the first outside compiled and captured graphs."""
        if not observable(x) or not self._check:  # in this order: a compiled graph would be guarded by the second
            return False
        self._check = False
        return True

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Steers ``x`` [..., width], in place where nothing is differentiated.

        Args:
            rows: int32 [tokens], each token's row of the tables, -1 for none; None: the first row for all.
        """
        raise TypeError(f"{type(self).__name__} is abstract")


def _unsteered(x: Tensor) -> Tensor:
    return x
