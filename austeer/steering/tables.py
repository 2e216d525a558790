"""Strength tables: the device buffers that say how strongly each AU of one site and layer is steered, plan by plan.

A change of alpha or k refills them in place, so no hook, compiled graph or captured graph has to be made anew.
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
    """gamma and shift of the AUs of one (site, layer), on the device of the activations, one row a plan.

    The steered activation is x + gamma * (|x| if magnitude else x) + shift, with

    ========= ============= ============= =========
    operation gamma         shift         magnitude
    ========= ============= ============= =========
    scale     alpha * beta  0             False
    push      alpha * beta  0             True
    shift     0             alpha * delta False
    ========= ============= ============= =========

    Attributes:
        index: int64 [count], the AUs of all plans, distinct and ascending.
        gamma, shift: float32 [plans, count]; zeros where a plan does not have the AU.
        dense_gamma, dense_shift: float32 [plans, width], the same with zeros for all other AUs; None without ``dense``.
        gamma_rows, shift_rows: float32 [plans + 1, width], these and a row of zeros, for tokens that no plan steers.
        magnitude: whether gamma multiplies |x|. Plans that differ in this need two tables.
    """

    def __init__(self, entries: Sequence[LayerUnits], plans: int, width: int, device: torch.device, dense: bool = True):
        self.entries = tuple(entries)
        self.magnitude = entries[0].magnitude
        if any(entry.magnitude != self.magnitude for entry in entries):
            raise ValueError("found plans with and without magnitude in one table")
        self.shifts = any(entry.operation == "shift" for entry in entries)
        self.scales = any(entry.operation != "shift" for entry in entries)
        self._key: object = None
        self._gathered: tuple[Tensor, Tensor] | None = None
        self.width = width
        self.device = device
        self.gamma_rows: Tensor | None = None
        self.shift_rows: Tensor | None = None
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        with torch.inference_mode(False):  # inference tensors could not be refilled outside of that mode
            index = torch.cat([entry.index.long() for entry in entries]).unique()
            self._places = [torch.searchsorted(index, entry.index.long()) for entry in entries]
            # gamma and shift once more on the CPU, where alpha and k are set
            self._host = torch.zeros(2, plans, len(index), dtype=torch.float32)
            self.index = index.to(device)
            self.gamma, self.shift = zeros(plans, len(index)), zeros(plans, len(index))
            if dense:
                self.gamma_rows, self.shift_rows = zeros(plans + 1, width), zeros(plans + 1, width)
        self._view()

    def for_rows(self, rows: Tensor, key: object) -> tuple[Tensor, Tensor]:
        """gamma and shift of each token, float32 [tokens, width], from the dense tables.

        Args:
            rows: int64 [tokens], rows of ``gamma_rows``.
            key: equal in two calls if the rows are; None if that is not known. What was gathered last is kept, because
                decoding asks for the same rows at every token.
        """
        if key is not None and key == self._key and self._gathered is not None:
            return self._gathered
        assert self.gamma_rows is not None and self.shift_rows is not None
        gathered = (
            self.gamma_rows.index_select(0, rows) if self.scales else self.gamma_rows,
            self.shift_rows.index_select(0, rows) if self.shifts else self.shift_rows,
        )
        if key is not None:
            self._key, self._gathered = key, gathered
        return gathered

    def _view(self) -> None:
        self.dense_gamma = None if self.gamma_rows is None else self.gamma_rows[:-1]
        self.dense_shift = None if self.shift_rows is None else self.shift_rows[:-1]

    @torch.no_grad()
    def fill(self, strengths: Sequence[tuple[float, int]]) -> None:
        """Writes the strengths for each plan's alpha and k."""
        for entry, places in zip(self.entries, self._places):
            for row, values in zip(self._host, entry.strengths(*strengths[entry.plan])):
                row[entry.plan, places] = values
        self._key = None
        self.gamma.copy_(self._host[0])
        self.shift.copy_(self._host[1])
        for dense, values in ((self.dense_gamma, self.gamma), (self.dense_shift, self.shift)):
            if dense is not None:
                dense.index_copy_(1, self.index, values)

    def to(self, device: torch.device) -> None:
        """Moves the buffers, once, where activations turn out to be on another device than was expected."""
        for name in ("index", "gamma", "shift", "gamma_rows", "shift_rows"):
            buffer = getattr(self, name)
            setattr(self, name, None if buffer is None else buffer.to(device))
        self.device, self._key = device, None
        self._view()
