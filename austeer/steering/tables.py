"""Strength tables: the device buffers that say how strongly each AU of one site and layer is steered, plan by plan.

A change of alpha or k refills them in place, so no patch, compiled graph or captured graph has to be made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..plans.fit import LayerUnits


def groups_of(entries: Sequence[LayerUnits], mine: range) -> list[list[LayerUnits]]:
    """What of ``entries`` this process holds, as columns of its slice; plans with and without magnitude apart."""
    groups: dict[bool, list[LayerUnits]] = {}
    for entry in entries:
        here = (entry.index >= mine.start) & (entry.index < mine.stop)
        if bool(here.any()):
            index, beta, delta, rank = (t[here] for t in (entry.index, entry.beta, entry.delta, entry.rank))
            part = LayerUnits(entry.plan, index - mine.start, beta, delta, rank, entry.operation, mine.start)
            groups.setdefault(entry.magnitude, []).append(part)
    return list(groups.values())


class StrengthTable:
    """gamma and shift of the AUs of one (site, layer), on the device of the activations: for each plan a list.

    The steered activation is x + gamma * (|x| if magnitude else x) + shift, with

    ========= ============= ============= =========
    operation gamma         shift         magnitude
    ========= ============= ============= =========
    scale     alpha * beta  0             False
    push      alpha * beta  0             True
    shift     0             alpha * delta False
    ========= ============= ============= =========

    Attributes:
        index: int64 [plans, most], each plan's AUs, ascending; -1 after the last of them.
        gamma, shift: float32 [plans, most]; zeros where ``index`` is -1.
        operands: float32 [width] each, what :mod:`austeer.steering.forms` takes for all tokens; None for several plans
            and without ``forms``.
        dense_gamma, dense_shift: float32 [plans, width], zeros for all other AUs; None without ``dense``.
        magnitude: whether gamma multiplies |x|. Plans that differ in this need two tables.
        scales, shifts: whether any gamma, any shift can be other than 0.
        given: (alpha, k) of each plan, as filled last.
    """

    def __init__(
        self,
        entries: Sequence[LayerUnits],
        plans: int,
        width: int,
        device: torch.device,
        forms: bool = True,
        dense: bool = False,
    ):
        self.entries = tuple(entries)
        self.magnitude = entries[0].magnitude
        if any(entry.magnitude != self.magnitude for entry in entries):
            raise ValueError("found plans with and without magnitude in one table")
        self.shifts = any(entry.operation == "shift" for entry in entries)
        self.scales = any(entry.operation != "shift" for entry in entries)
        self.width, self.device = width, device
        self.given: list[tuple[float, int]] = [(0.0, 0)] * plans
        self.operands: tuple[Tensor, ...] | None = None
        self.dense_gamma: Tensor | None = None
        self.dense_shift: Tensor | None = None
        self._order = [entry.index.argsort() for entry in entries]
        most = max(len(order) for order in self._order)
        with torch.inference_mode(False):  # inference tensors could not be refilled outside of that mode
            # One row more than plans, of zeros, for tokens that no plan steers.
            index = torch.full((plans + 1, most), -1, dtype=torch.int64, device="cpu")
            for entry, order in zip(entries, self._order):
                index[entry.plan, : len(order)] = entry.index[order]
            # gamma and shift once more on the CPU, where alpha and k are set
            self._host = torch.zeros(2, plans + 1, most, dtype=torch.float32, device="cpu")
            zeros = partial(torch.zeros, dtype=torch.float32, device=device)
            self._index, self._strengths = index.to(device), zeros(2, plans + 1, most)
            self._columns = torch.where(index >= 0, index, _free(index, width)[:, None]).to(device)
            if forms and plans == 1:
                self.operands = self._for_all()
            if dense:
                self.dense_gamma, self.dense_shift = zeros(plans, width), zeros(plans, width)
        self._view()

    @property
    def columns(self) -> int:
        """The most AUs that one plan has here."""
        return self._index.shape[1]

    def expanded(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """gamma and shift of every AU of the width for each token, [tokens, width] in ``dtype``, made anew.

        Args:
            rows: int64 [tokens], each token's plan, -1 for none; None: one row, of the first plan.
        """
        if rows is None:
            rows = torch.zeros(1, dtype=torch.int64, device=self.device)
        columns = self._columns[rows]  # -1 is the last row, of zeros
        blank = torch.zeros(len(rows), self.width, dtype=dtype, device=self.device)
        gamma, shift = (blank.scatter(1, columns, values[rows].to(dtype)) for values in self._strengths)
        return gamma, shift

    def spread(self, rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The operands of :mod:`austeer.steering.forms` for each token, [tokens, width] each (or [1]: 1, for push)."""
        gamma, shift = self.expanded(rows, dtype)
        if self.magnitude:
            return gamma, gamma.new_ones(1)
        first = (1 + gamma,) if self.scales else ()
        return (*first, shift) if self.shifts else first

    def _for_all(self) -> tuple[Tensor, ...]:
        """The operands of the first plan, [width] each, for every token."""
        return tuple(t.view(-1) for t in self.spread())

    @torch.no_grad()
    def fill(self, strengths: Sequence[tuple[float, int]]) -> None:
        """Writes the strengths for each plan's alpha and k."""
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

    def to(self, device: torch.device) -> None:
        """Moves the buffers, once, where activations turn out to be on another device than was expected."""
        with torch.inference_mode(False):  # as above
            for name in ("_index", "_columns", "_strengths", "dense_gamma", "dense_shift"):
                buffer = getattr(self, name)
                setattr(self, name, None if buffer is None else buffer.to(device))
            if self.operands is not None:
                self.operands = tuple(operand.to(device) for operand in self.operands)
        self.device = device
        self._view()

    def _view(self) -> None:
        self.index, self.gamma, self.shift = self._index[:-1], self._strengths[0, :-1], self._strengths[1, :-1]


def _free(index: Tensor, width: int) -> Tensor:
    """int64 [rows], a column that the row of ``index`` does not name; 0 where it names all, and so has no -1."""
    unused = torch.ones(len(index), width + 1, dtype=torch.bool, device="cpu")
    unused.scatter_(1, torch.where(index < 0, width, index), False)
    return unused[:, :width].int().argmax(1)
