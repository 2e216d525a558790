"""Tables: the device buffers that say how strongly each AU of one site and layer is steered, plan by plan.

A change of alpha or k refills them in place, so no patch, compiled graph or captured graph has to be made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from austeer_kernels import reference

from ..plans.fit import LayerUnits

# The checked functions of austeer_kernels check what is true of every call here; naming the overload saves a search.
steer_columns_op = torch.ops.austeer.steer_columns_.default


def groups_of(entries: Sequence[LayerUnits], mine: range) -> list[list[LayerUnits]]:
    """What of ``entries`` this process holds, as columns of its slice; what has another form apart."""
    groups: dict[str, list[LayerUnits]] = {}
    for entry in entries:
        here = (entry.index >= mine.start) & (entry.index < mine.stop)
        if bool(here.any()):
            index, beta, delta, rank = (t[here] for t in (entry.index, entry.beta, entry.delta, entry.rank))
            part = LayerUnits(entry.plan, index - mine.start, beta, delta, rank, entry.operation, mine.start)
            groups.setdefault(entry.form, []).append(part)
    return list(groups.values())


class Table:
    """What of one (site, layer) is steered, on the device of the activations: for each plan a list of AUs.

    Attributes:
        entries: the plans' AUs, all of one form.
        index: int64 [plans, most], each plan's AUs, ascending; -1 after the last of them.
        operands: what :func:`austeer.steering.forms.steered` takes for all tokens; None for several plans, and where
            nobody asked for them.
        magnitude, scales, shifts, ablates: which operations it is of.
        given: (alpha, k) of each plan, as filled last.
    """

    #: Names of the tensors on the device.
    buffers: tuple[str, ...] = ("_index", "_columns")
    magnitude = scales = shifts = ablates = False

    def __init__(self, entries: Sequence[LayerUnits], plans: int, width: int, device: torch.device):
        self.entries = tuple(entries)
        if len({entry.form for entry in entries}) > 1:
            raise ValueError("found plans of several forms (such as with and without magnitude) in one table")
        self.width, self.device = width, device
        self.given: list[tuple[float, int]] = [(0.0, 0)] * plans
        self.operands: tuple[Tensor, ...] | None = None
        self._order = [entry.index.argsort() for entry in entries]
        most = max(len(order) for order in self._order)
        # One row more than plans, of no AUs, for tokens that no plan steers.
        index = torch.full((plans + 1, most), -1, dtype=torch.int64, device="cpu")
        for entry, order in zip(entries, self._order):
            index[entry.plan, : len(order)] = entry.index[order]
        with torch.inference_mode(False):  # inference tensors could not be refilled outside of that mode
            self._index = index.to(device)
            self._columns = torch.where(index >= 0, index, _free(index, width)[:, None]).to(device)

    @property
    def columns(self) -> int:
        """The most AUs that one plan has here."""
        return self._index.shape[1]

    @property
    def gain(self) -> float:
        """How many times larger than a tensor what comes of it can be, roughly; without shifts."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def spread(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The operands of :func:`austeer.steering.forms.steered` for each token, [tokens, width] or less, made anew.

        Args:
            rows: int64 [tokens], each token's plan, -1 for none; None: one row, of the first plan.
        """
        raise TypeError(f"{type(self).__name__} is abstract")

    def for_form(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, ...]:
        """The operands of :func:`austeer.steering.forms.form_of` for ``x``; ``rows`` as in ``steer_``."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def _for_all(self) -> tuple[Tensor, ...]:
        """The operands of the first plan, [width] or less each, for every token."""
        return tuple(t.view(-1) for t in self.spread())

    def _expanded(self, values: Sequence[Tensor], rows: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        """Each of ``values`` [plans + 1, most] for every AU of the width and each token, [tokens, width]."""
        rows = torch.zeros(1, dtype=torch.int64, device=self.device) if rows is None else rows
        columns = self._columns[rows]  # -1 is the last row, of zeros
        blank = torch.zeros(len(rows), self.width, dtype=dtype, device=self.device)
        return [blank.scatter(1, columns, one[rows].to(dtype)) for one in values]

    def fill(self, strengths: Sequence[tuple[float, int]]) -> None:
        """Writes the strengths for each plan's alpha and k."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def steer_(self, x: Tensor, rows: Tensor | None) -> None:
        """Steers ``x`` [tokens, width] in place, touching the AUs' columns alone.

        Args:
            rows: int32 [tokens], each token's plan, -1 for none; None: the first plan for all.
        """
        raise TypeError(f"{type(self).__name__} is abstract")

    def to(self, device: torch.device) -> None:
        """Moves the buffers, once, where activations turn out to be on another device than was expected."""
        with torch.inference_mode(False):  # as above
            for name in self.buffers:
                buffer = getattr(self, name)
                setattr(self, name, None if buffer is None else buffer.to(device))
            if self.operands is not None:
                self.operands = tuple(operand.to(device) for operand in self.operands)
        self.device = device
        self._view()

    def _view(self) -> None:
        """Makes the attributes that are views of the buffers."""
        self.index = self._index[:-1]


class StrengthTable(Table):
    """gamma and shift of the AUs of one (site, layer), for each plan a list.

    The steered activation is x + gamma * (|x| if magnitude else x) + shift, with

    ========= ============= ============= =========
    operation gamma         shift         magnitude
    ========= ============= ============= =========
    scale     alpha * beta  0             False
    push      alpha * beta  0             True
    shift     0             alpha * delta False
    ========= ============= ============= =========

    Attributes:
        gamma, shift: float32 [plans, most]; zeros where ``index`` is -1.
        operands: float32 [width] each; of ``forms``.
        dense_gamma, dense_shift: float32 [plans, width], zeros for all other AUs; None without ``dense``.
        magnitude: whether gamma multiplies |x|. Plans that differ in this need two tables.
        scales, shifts: whether any gamma, any shift can be other than 0.
    """

    buffers = (*Table.buffers, "_strengths", "dense_gamma", "dense_shift")

    def __init__(
        self,
        entries: Sequence[LayerUnits],
        plans: int,
        width: int,
        device: torch.device,
        forms: bool = True,
        dense: bool = False,
    ):
        super().__init__(entries, plans, width, device)
        self.magnitude = entries[0].form == "magnitude"
        self.shifts = any(entry.operation == "shift" for entry in entries)
        self.scales = any(entry.operation != "shift" for entry in entries)
        self.dense_gamma: Tensor | None = None
        self.dense_shift: Tensor | None = None
        with torch.inference_mode(False):  # as above
            # gamma and shift once more on the CPU, where alpha and k are set
            self._host = torch.zeros(2, plans + 1, self.columns, dtype=torch.float32, device="cpu")
            zeros = partial(torch.zeros, dtype=torch.float32, device=device)
            self._strengths = zeros(2, plans + 1, self.columns)
            if forms and plans == 1:
                self.operands = self._for_all()
            if dense:
                self.dense_gamma, self.dense_shift = zeros(plans, width), zeros(plans, width)
        self._view()

    @property
    def gain(self) -> float:
        return 1 + float(self.gamma.abs().max())

    def expanded(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """gamma and shift of every AU of the width for each token, [tokens, width] in ``dtype``, made anew.

        Args:
            rows: int64 [tokens], each token's plan, -1 for none; None: one row, of the first plan.
        """
        gamma, shift = self._expanded(list(self._strengths), rows, dtype)
        return gamma, shift

    def spread(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        gamma, shift = self.expanded(rows, dtype)
        if self.magnitude:
            return gamma, gamma.new_ones(1)
        first = (1 + gamma,) if self.scales else ()
        return (*first, shift) if self.shifts else first

    def for_form(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        if rows is None:
            assert self.operands is not None  # several plans have rows
            return self.operands
        return tuple(t.view(x.shape) if t.numel() == x.numel() else t for t in self.spread(rows.long()))

    @torch.no_grad()
    def fill(self, strengths: Sequence[tuple[float, int]]) -> None:
        self.given = list(strengths)
        for entry, order in zip(self.entries, self._order):
            for row, values in zip(self._host, entry.strengths(*strengths[entry.plan])):
                row[entry.plan, : len(order)] = values[order]
        self._strengths.copy_(self._host)
        if self.operands is not None:
            for operand, values in zip(self.operands, self._for_all()):
                operand.copy_(values)
        for dense, values in ((self.dense_gamma, self.gamma), (self.dense_shift, self.shift)):
            if dense is not None:
                dense.scatter_(1, self._columns[:-1], values)

    def steer_(self, x: Tensor, rows: Tensor | None) -> None:
        steer_columns_op(x, self.index, self.gamma, self.shift, self.magnitude, rows)

    def _view(self) -> None:
        super()._view()
        self.gamma, self.shift = self._strengths[0, :-1], self._strengths[1, :-1]


class DirectionTable(Table):
    """The direction of the AUs of one (site, layer) and how much of it is removed, for each plan.

    The steered activation is x - strength * d (d . x), d the plan's delta there at length 1 (of its first k AUs), and
    strength its alpha.

    Attributes:
        direction: float32 [plans, most], d; zeros where ``index`` is -1. strength: float32 [plans].
        operands: float32 [width], d, and [1], the strength.
    """

    ablates = True
    buffers = (*Table.buffers, "_directions", "_strengths")

    def __init__(
        self, entries: Sequence[LayerUnits], plans: int, width: int, device: torch.device, operands: bool = True
    ):
        super().__init__(entries, plans, width, device)
        with torch.inference_mode(False):  # as above
            self._host = torch.zeros(plans + 1, self.columns, dtype=torch.float32, device="cpu")
            self._directions = torch.zeros(plans + 1, self.columns, dtype=torch.float32, device=device)
            self._strengths = torch.zeros(plans + 1, dtype=torch.float32, device=device)
            if operands and plans == 1:
                self.operands = self._for_all()
        self._view()

    @property
    def gain(self) -> float:
        return 1 + float(self.strength.abs().max())

    def spread(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        strength = self._strengths[:1].clone() if rows is None else self._strengths[rows]
        return self._expanded([self._directions], rows, dtype)[0], strength[:, None].to(dtype)

    def for_form(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor | None, ...]:
        return self.index, self.direction, self.strength, rows

    @torch.no_grad()
    def fill(self, strengths: Sequence[tuple[float, int]]) -> None:
        self.given = list(strengths)
        for entry, order in zip(self.entries, self._order):
            self._host[entry.plan, : len(order)] = entry.direction(strengths[entry.plan][1])[order]
        self._directions.copy_(self._host)
        alphas = [0.0] * len(self._strengths)
        for entry in self.entries:
            alphas[entry.plan] = strengths[entry.plan][0]
        self._strengths.copy_(torch.tensor(alphas, dtype=torch.float32, device="cpu"))
        if self.operands is not None:
            for operand, values in zip(self.operands, self._for_all()):
                operand.copy_(values)

    def steer_(self, x: Tensor, rows: Tensor | None) -> None:
        reference.ablate_columns_(x, self.index, self.direction, self.strength, rows)

    def _view(self) -> None:
        super()._view()
        self.direction, self.strength = self._directions[:-1], self._strengths[:-1]


def table_of(
    entries: Sequence[LayerUnits], plans: int, width: int, device: torch.device, forms: bool, dense: bool
) -> Table:
    """The table of entries of one form, with what whole tensors are steered by where ``forms`` or ``dense`` do that."""
    if entries[0].form == "direction":
        return DirectionTable(entries, plans, width, device, forms or dense)
    return StrengthTable(entries, plans, width, device, forms, dense)


def _free(index: Tensor, width: int) -> Tensor:
    """int64 [rows], a column that the row of ``index`` does not name; 0 where it names all, and so has no -1."""
    unused = torch.ones(len(index), width + 1, dtype=torch.bool, device="cpu")
    unused.scatter_(1, torch.where(index < 0, width, index), False)
    return unused[:, :width].int().argmax(1)
