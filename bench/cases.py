"""One projection with some tokens: every way to steer it, what each must give, and the least that it must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

import austeer_kernels as ak
from austeer_kernels import launch, reference

from .graphs import check, copies_of

#: Rows of the table where each token has its own.
PLANS = 8
#: AUs at the projection. The dense tables of the fused kernel hold the largest number.
AUS = (1, 10, 100)

PLAIN, AGAIN = "plain", "plain again"
FUSED, FUSED_INPUT, FUSED_ROWS, FUSED_INPUT_ROWS = "fused", "fused input", "fused rows", "fused input rows"
COLUMNS = {k: f"columns {k}" for k in AUS}
COLUMNS_INPUT, COLUMNS_ROWS, COLUMNS_INPUT_ROWS = "columns input", "columns rows", "columns input rows"
ALONE = {k: f"columns {k} alone" for k in AUS}

#: What each form of the fused kernel would replace; of several the fastest counts.
RIVALS = {
    FUSED: tuple(COLUMNS.values()),
    FUSED_INPUT: (COLUMNS_INPUT,),
    FUSED_ROWS: (COLUMNS_ROWS,),
    FUSED_INPUT_ROWS: (COLUMNS_INPUT_ROWS,),
}


class Table:
    """Random AUs of one side of the projection: sparse and dense, one row a plan."""

    def __init__(self, width: int, count: int, plans: int, device: torch.device):
        self.index = torch.randperm(width, device=device)[: min(count, width)].sort().values
        self.lists = self.index.repeat(plans, 1)
        self.gamma, self.shift = (torch.rand(plans, len(self.index), device=device) - 0.5 for _ in range(2))
        zeros = torch.zeros(plans, width, device=device)
        self.dense_gamma, self.dense_shift = (zeros.index_copy(1, self.index, t) for t in (self.gamma, self.shift))
        #: Only changes signs, x - 2 x: applied again and again in place, nothing grows or vanishes.
        self.flipping = torch.full_like(self.gamma, -2.0), torch.zeros_like(self.shift)

    def steered(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """By the definition, rounded once, as PyTorch's own operators do."""
        return reference.steered_columns(x, self.dense_gamma, self.dense_shift, False, rows)


#: (error, plain PyTorch's error), both relative to float64.
Check = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Variant:
    """One way to compute the steered projection.

    Attributes:
        calls: it, on each copy of the inputs.
        nbytes, operations: the least that a call has to move and to compute.
        check: compares its result with float64; returns its error and plain PyTorch's.
        pure: whether a call leaves its inputs as they were.
    """

    calls: tuple[Callable[[], Tensor], ...]
    nbytes: int
    operations: int
    check: Check
    pure: bool = True


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten then shows in its result."""
    empty = torch.empty
    torch.empty = lambda *a, **options: empty(*a, **options).fill_(float("nan"))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


class Case:
    """A weight [n, k] and ``tokens`` tokens, in copies that together exceed the L2 cache three times."""

    def __init__(self, n: int, k: int, tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.n, self.k, self.tokens, self.dtype, self.device = n, k, tokens, dtype, device
        torch.manual_seed(seed)
        size = torch.finfo(dtype).bits // 8
        self.nbytes = size * (n * k + tokens * (n + k))
        self.copies = copies_of(self.nbytes, device)
        self.weights = [torch.randn(n, k, device=device, dtype=dtype) * k**-0.5 for _ in range(self.copies)]
        self.x = [torch.randn(tokens, k, device=device, dtype=dtype) for _ in range(self.copies)]
        self.y = [torch.randn(tokens, n, device=device, dtype=dtype) for _ in range(self.copies)]
        self.row_plan = (torch.arange(tokens, device=device) % PLANS).int()
        self.output = {count: Table(n, count, 1, device) for count in AUS}
        # [steered at the input, a plan a token]
        sides = {(True, False): (k, 1), (False, True): (n, PLANS), (True, True): (k, PLANS)}
        self.tables = {form: Table(width, AUS[-1], plans, device) for form, (width, plans) in sides.items()}
        self.tables[False, False] = self.output[AUS[-1]]

    def __str__(self) -> str:
        return f"{self.n}x{self.k}, {self.tokens} tokens"

    def variants(self) -> dict[str, Variant]:
        """Every way, by name; plain PyTorch twice, so that the noise shows. No fused kernel beyond its tokens."""
        forms = [(False, False), (True, False), (False, True), (True, True)]
        listed = {PLAIN: self.plain(), AGAIN: self.plain()}
        if self.tokens <= launch.MOST_TOKENS:
            listed |= {name: self.fused(*form) for name, form in zip(RIVALS, forms)}
        listed |= {COLUMNS[count]: self.columns(count=count) for count in AUS}
        listed |= {RIVALS[name][0]: self.columns(*form) for name, form in zip(RIVALS, forms) if any(form)}
        return listed | {ALONE[count]: self.alone(count) for count in AUS}

    def plain(self) -> Variant:
        """PyTorch's product, unsteered."""

        def call(i: int) -> Tensor:
            return linear(self.x[i], self.weights[i])

        def right() -> tuple[float, float]:
            found = call(0)
            return check(f"{PLAIN}, {self}", found, found, linear(self.x[0].double(), self.weights[0].double()))

        return self._variant(call, right)

    def fused(self, at_input: bool = False, rows: bool = False) -> Variant:
        """The projection kernel, with the largest number of AUs."""
        table = self.tables[at_input, rows]
        gamma, shift, row_plan = table.dense_gamma, table.dense_shift, self.row_plan if rows else None

        def call(i: int) -> Tensor:
            return ak.steered_linear(
                self.x[i], self.weights[i], None, gamma, shift, prologue=at_input, row_plan=row_plan
            )

        def right() -> tuple[float, float]:
            with poisoned():
                found = call(0)
            return self._check("fused", found, table, at_input, row_plan)

        return self._variant(call, right, gamma.nbytes + shift.nbytes + (self.row_plan.nbytes if rows else 0))

    def columns(self, at_input: bool = False, rows: bool = False, count: int = AUS[-1]) -> Variant:
        """PyTorch's product, and the sparse kernel on its output, or before it on its input."""
        table = self.tables[at_input, rows] if at_input or rows else self.output[count]
        gamma, shift = table.flipping if at_input else (table.gamma, table.shift)
        row_plan = self.row_plan if rows else None

        def steer(y: Tensor, gamma: Tensor, shift: Tensor) -> Tensor:
            return ak.steer_columns_(y, table.lists, gamma, shift, row_plan=row_plan)

        def call(i: int) -> Tensor:
            if at_input:
                return linear(steer(self.x[i], gamma, shift), self.weights[i])
            return steer(linear(self.x[i], self.weights[i]), gamma, shift)

        def right() -> tuple[float, float]:
            if at_input:
                found = linear(steer(self.x[0].clone(), table.gamma, table.shift), self.weights[0])
            else:
                found = call(0)
            return self._check("columns", found, table, at_input, row_plan)

        more_bytes = self._sparse_bytes(table) + (self.row_plan.nbytes if rows else 0)
        return self._variant(call, right, more_bytes, pure=not at_input)

    def alone(self, count: int) -> Variant:
        """The sparse kernel on outputs that are there, warm or cold in the cache as the copies make them."""
        table = self.output[count]
        gamma, shift = table.flipping

        def right() -> tuple[float, float]:
            y = self.y[0].clone()
            plain, exact = table.steered(y, None), table.steered(y.double(), None)
            found = ak.steer_columns_(y, table.lists, table.gamma, table.shift)
            return check(f"{ALONE[count]}, {self}", found, plain, exact)

        calls = tuple((lambda y=y: ak.steer_columns_(y, table.lists, gamma, shift)) for y in self.y)
        return Variant(calls, self._sparse_bytes(table), 2 * self.tokens * len(table.index), right, pure=False)

    def _variant(self, call: Callable[[int], Tensor], right: Check, more_bytes: int = 0, pure: bool = True) -> Variant:
        calls = tuple((lambda i=i: call(i)) for i in range(self.copies))
        return Variant(calls, self.nbytes + more_bytes, 2 * self.tokens * self.n * self.k, right, pure)

    def _sparse_bytes(self, table: Table) -> int:
        touched = 2 * self.tokens * len(table.index) * (torch.finfo(self.dtype).bits // 8)
        return touched + table.lists.nbytes + 2 * table.gamma.nbytes

    def _check(
        self, name: str, found: Tensor, table: Table, at_input: bool, rows: Tensor | None
    ) -> tuple[float, float]:
        def formula(x: Tensor, weight: Tensor) -> Tensor:
            if at_input:
                return linear(table.steered(x, rows), weight)
            return table.steered(linear(x, weight), rows)

        x, weight = self.x[0], self.weights[0]
        return check(f"{name}, {self}", found, formula(x, weight), formula(x.double(), weight.double()))
