"""A path that runs: it puts its strength tables on one module and takes them off again, leaving no trace.

It is an accelerate hook, so that it composes with device maps and offload. The paths that run are columns, fused and
dense; fold runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import SteeringError
from ..models.hooks import Attachment, Hook, is_hooked
from ..models.sites import Site
from ..models.structure import first_tensor
from .path import Path
from .routing import NOBODY, Routing, capturing
from .selfcheck import checked_tensor
from .tables import StrengthTable


def expect_free(path: Path) -> None:
    """Raises SteeringError where a hook of some steering is on the path's module."""
    if is_hooked(path.module, HookPath):
        raise SteeringError(
            f"{path.site.path}: found a module that is steered already (another model shares it, or the model was "
            "copied while it was steered), expected one that is not; copy before steering"
        )


def observable(x: Tensor) -> bool:
    """Whether values can be looked at now: outside compiled and captured graphs."""
    return not torch.compiler.is_compiling() and not capturing(x.device)


class HookPath(Path, Hook):
    """A path that is an accelerate hook on ``module``.

    Args:
        tables: one, or two where plans with and without magnitude meet.
        routing: which tokens are steered; None for all of them.
        check: whether the first call is compared with the formula.
    """

    def __init__(
        self,
        site: Site,
        tables: Sequence[StrengthTable],
        module: nn.Module,
        routing: Routing | None = None,
        check: bool = False,
    ):
        Path.__init__(self, site, tables[0], module)
        Hook.__init__(self)
        self.tables = tuple(tables)
        self.routing = routing
        self._check = check
        self._elements = 0
        self._attachment = Attachment(module, self)

    @property
    def tokens(self) -> int | None:
        return self._elements // self.table.width if self.routing is None else self.routing.tokens

    def attach(self) -> None:
        self._attachment.attach()

    def detach(self) -> None:
        self._attachment.detach()

    def begin(self, x: Tensor):
        """Counts a call, follows ``x`` to its device, and gives each token's row of the tables (see ``rows_for``)."""
        if torch.compiler.is_compiling():
            self.traced = True  # a count would be a guard, and so a recompilation at every call
        else:
            self.calls += 1  # type: ignore[operator]
            if self.routing is None:
                self._elements += x.numel()
        if x.device != self.table.device:
            for table in self.tables:
                table.to(x.device)
        return None if self.routing is None else self.routing.rows_for(x)

    def checks_now(self, x: Tensor) -> bool:
        """Whether this call is to be compared with the formula: the first outside compiled and captured graphs."""
        if not self._check or not observable(x):
            return False
        self._check = False
        return True


class TensorPath(HookPath):
    """A hook that steers the module's input or output and leaves its computation alone."""

    def __init__(self, site: Site, *args, **kwargs):
        super().__init__(site, *args, **kwargs)
        self._at_input = site.side == "input"

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        if self._at_input and args:
            args = (self.steer(args[0]), *args[1:])
        elif self._at_input:  # every module that has an input-side site takes one tensor, whatever its name
            name = next(iter(kwargs))
            kwargs = {**kwargs, name: self.steer(kwargs[name])}
        return args, kwargs

    def post_forward(self, module: nn.Module, output):
        if self._at_input:
            return output
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
        if self._check and self.checks_now(x):
            return checked_tensor(self, x, rows)(self.apply(x, rows))
        return self.apply(x, rows)

    def apply(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """Steers ``x`` [..., width], in place where nothing is differentiated.

        Args:
            rows: int32 [tokens], each token's row of the tables, -1 for none; None: the first row for all.
        """
        raise TypeError(f"{type(self).__name__} is abstract")
