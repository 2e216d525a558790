"""Which tokens of the forward pass at hand are steered, and with whose strengths.

One hook on the decoder works it out once a forward pass, for all sites: everything, nothing, or for each token the row
of the strength tables (-1: none). What a forward pass does not show, the prompt's length, it learns from ``generate``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import ModelHook
from torch import Tensor, nn

from .errors import SteeringError
from .hooks import Attachment
from .scope import END, Scope

#: No token of this forward pass is steered. (None stands for every token.)
NOBODY = object()

#: What only continuous batching passes to a decoder: its tokens are those of many requests in one row.
_PACKED = ("cu_seq_lens_q", "block_table")


class _Begin(ModelHook):
    def __init__(self, routing: Routing):
        self.routing = routing

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        self.routing.begin(args, kwargs)
        return args, kwargs


class Routing:
    """The tokens to steer, for a scope and for rows with plans of their own.

    Args:
        scope: the positions.
        plans: the names of the plans, in the order of the tables' rows; None where there is one plan for every row.

    Attributes:
        tokens: how many tokens of forward passes outside compiled graphs were steered so far, padding included.
    """

    def __init__(self, scope: Scope, plans: Sequence[str] | None, decoder: nn.Module, owner: nn.Module, device):
        self.scope = scope
        self._plans = plans
        self._owner = owner
        self._device = device
        self._attachment = Attachment(decoder, _Begin(self))
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._state: Any = NOBODY
        self._rows: list[int] | None = None  # what was chosen, on the host ...
        self._one: int | None = None  # ... or one plan for any number of rows
        self._buffer: Tensor | None = None  # int32 [rows], the same on the device, refilled in place
        self._expanded: tuple[int, int, Tensor] | None = None
        self._table_rows: Tensor | None = None
        self._prompt: int | None = None
        self._knows_prompt = False
        with torch.inference_mode(False):
            self._prompt_buffer = torch.zeros((), dtype=torch.int64, device=device)
        self._padding: tuple[Tensor, Tensor] | None = None  # of the batch given to generate, [batch] each
        self._batch: int | None = None
        self._tokens = 0
        self._counted: Tensor | None = None

    # --- life --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        self._attachment.attach()
        inner = getattr(self._owner, "generate", None)
        if inner is not None:
            self._had = vars(self._owner).get("generate")
            vars(self._owner)["generate"] = self._watched = self._watch(inner)

    def detach(self) -> None:
        if vars(self._owner).get("generate") is getattr(self, "_watched", self):
            if self._had is None:
                del vars(self._owner)["generate"]
            else:
                vars(self._owner)["generate"] = self._had
        self._attachment.detach()

    # --- rows --------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[str | None] | str | None:
        """What was chosen last: one name or None a row, or one name for all; None if nothing was."""
        if self._plans is None or (self._rows is None and self._one is None):
            return None
        if self._one is not None:
            return self._plans[self._one]
        return [None if row < 0 else self._plans[row] for row in self._rows or []]

    def choose(self, rows: Sequence[str | None] | str | None) -> None:
        """Sets each row's plan; None takes the choice back.

        Raises:
            SteeringError: an unknown name, or a single plan.
        """
        if self._plans is None:
            raise SteeringError(
                'rows: found one plan for all rows, expected plans with names; use steer(model, {"name": plan, ...})'
            )
        known = {name: number for number, name in enumerate(self._plans)}
        if isinstance(rows, str) or rows is None:
            names: list[str | None] = [] if rows is None else [rows]
        elif isinstance(rows, Sequence) and rows:
            names = list(rows)
        else:
            raise SteeringError(f"rows: found {rows!r}, expected a list with a plan's name or None for each row")
        for name in names:
            if name is not None and (not isinstance(name, str) or name not in known):
                raise SteeringError(f"rows: found {name!r}, expected one of {', '.join(map(repr, known))}, or None")
        numbers = [-1 if name is None else known[name] for name in names]
        self._one = numbers[0] if isinstance(rows, str) else None
        self._rows = None if isinstance(rows, str) or rows is None else numbers
        self._expanded = None
        if not numbers:
            return
        chosen = torch.tensor(numbers, dtype=torch.int32)
        with torch.inference_mode(False):
            if self._buffer is not None and self._buffer.shape == chosen.shape:
                self._buffer.copy_(chosen)  # in place: a captured graph reads it
            else:
                self._buffer = chosen.to(self._device)

    # --- the prompt --------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> int | None:
        return self._prompt

    @prompt.setter
    def prompt(self, length: int | None) -> None:
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise SteeringError(f"prompt_length: found {length!r}, expected a positive integer or None")
        self._prompt = length
        self._knows_prompt = length is not None
        self._prompt_buffer.fill_(length or 0)

    def _watch(self, inner: Callable) -> Callable:
        parameters = inspect.signature(inner)

        @functools.wraps(inner)
        def generate(*args, **kwargs):
            given = parameters.bind_partial(*args, **kwargs).arguments
            with self._generating({**given.pop("kwargs", {}), **given}):
                return inner(*args, **kwargs)

        return generate

    @contextmanager
    def _generating(self, given: Mapping[str, Any]) -> Iterator[None]:
        tokens = next(
            (
                t
                for t in map(given.get, ("inputs", "input_ids", "inputs_embeds"))
                if isinstance(t, Tensor) and t.numel()
            ),
            None,
        )
        before = self._prompt, self._padding, self._batch
        mask = given.get("attention_mask")
        try:
            if tokens is not None:
                self._batch = tokens.shape[0]
                if self._rows is not None and len(self._rows) != self._batch:
                    raise SteeringError(_wrong_rows(len(self._rows), self._batch))
                self.prompt = tokens.shape[1]
                if isinstance(mask, Tensor) and mask.dim() == 2:
                    self.prompt = mask.shape[1]  # longer than the tokens where those go on from a cache
                    self._padding = _padding(mask)
            else:
                self.prompt = 1  # generate begins from nothing with one token
            yield
        finally:
            self.prompt, self._padding, self._batch = before

    # --- a forward pass ----------------------------------------------------------------------------------------------

    def begin(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Called before each forward pass of the decoder with its arguments."""
        given = {**dict(zip(self._names, args)), **kwargs}
        x = given.get("input_ids")
        if x is None:
            x = given.get("inputs_embeds")
        if x is None:
            raise SteeringError("found neither input_ids nor inputs_embeds; expected one of them")
        if any(given.get(name) is not None for name in _PACKED):
            raise SteeringError(
                "continuous batching packs many requests in one row, so rows and scopes cannot be told apart; "
                "expected generate(), or one plan at scope='all'"
            )
        cache = given.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        batch, length = x.shape[0], x.shape[1]
        on_device = torch.compiler.is_compiling() or capturing(x.device)
        self._table_rows = None
        first, last = self._interval(given, past, batch, length, on_device)
        rows = self._rows_of(batch, on_device)
        if on_device or any(isinstance(n, Tensor) for n in (past, first, last)):
            self._state = self._tensor_state(rows, past, first, last, batch, length, x.device)
            if not on_device and isinstance(self._state, Tensor):
                count = (self._state >= 0).sum()
                self._counted = count if self._counted is None else self._counted.to(count.device) + count
        else:
            self._state = self._host_state(
                rows, max(first - past, 0), min(last - past, length), batch, length, x.device
            )

    def _interval(self, given: Mapping[str, Any], past, batch: int, length: int, on_device: bool):
        scope = self.scope
        if scope.name == "all":
            return 0, END
        if not self._knows_prompt:
            # Outside generate: a call of several tokens is prompt, a call of one on a filled cache is not.
            fresh = length > 1 or (not isinstance(past, Tensor) and past == 0)
            prompt = past + length if fresh else past
            if not fresh and scope.name == "last_prompt_token":
                return 0, 0
        else:
            prompt = self._prompt_buffer if on_device else self._prompt
        before, after = 0, 0
        if scope.name in ("range", "last_prompt_token"):
            before, after = self._padding_of(given, past, batch, length)
        return scope.interval(prompt, before, after)

    def _padding_of(self, given: Mapping[str, Any], past, batch: int, length: int):
        """Columns of padding before and after each row's prompt, [batch] each, or zeros if there is no mask."""
        if self._padding is not None:
            times = batch // self._padding[0].shape[0]
            return tuple(p if times == 1 else p.repeat_interleave(times) for p in self._padding)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return _padding(mask)
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[0] == batch > 1:
            return (past + length - 1 - positions[:, -1]).clamp(min=0), 0
        return 0, 0

    def _rows_of(self, batch: int, on_device: bool) -> Tensor | None:
        """int32 [batch], each row's plan; None if all rows have the only one."""
        if self._plans is None:
            return None
        if self._buffer is None or (self._rows is None and self._one is None):
            raise SteeringError(
                "found plans with names and no choice for the rows, expected steering.rows([...]) with a name or None "
                f"for each row, or one name for all (plans: {', '.join(map(repr, self._plans))})"
            )
        if self._rows is None:
            return self._buffer.expand(batch)
        times = 1 if self._batch is None else batch // self._batch
        if batch != times * len(self._rows):
            raise SteeringError(_wrong_rows(len(self._rows), batch))
        if times == 1:
            return self._buffer
        if on_device:
            return self._buffer.repeat_interleave(times)
        if self._expanded is None or self._expanded[0] != batch:
            self._expanded = (batch, times, self._buffer.repeat_interleave(times))  # beams, return sequences
        return self._expanded[2]

    def _host_state(self, rows: Tensor | None, a: int, b: int, batch: int, length: int, device: torch.device):
        """The state where the scope is the columns a to b of this forward pass, in every row."""
        steered = batch if self._rows is None else batch // len(self._rows) * sum(row >= 0 for row in self._rows)
        if a >= b or steered == 0:
            return NOBODY
        self._tokens += steered * (b - a)
        whole = a == 0 and b == length
        if rows is None or (self._one is not None and len(self._plans or ()) == 1):
            if whole:
                return None
            rows = torch.zeros(batch, dtype=torch.int32, device=device)
        if whole:
            return _each_token(rows.to(device), length)
        inside = rows.to(device)[:, None].expand(batch, b - a)
        return torch.nn.functional.pad(inside, (a, length - b), value=-1).reshape(-1)

    def _tensor_state(self, rows: Tensor | None, past, first, last, batch: int, length: int, device: torch.device):
        everywhere = isinstance(first, int) and isinstance(last, int) and (first, last) == (0, END)
        if everywhere:
            return None if rows is None else _each_token(rows.to(device), length)
        column = torch.arange(length, device=device) + _on(past, device)
        first, last = (n[:, None] if isinstance(n, Tensor) and n.dim() else n for n in (first, last))
        first, last = _on(first, device), _on(last, device)
        inside = ((column >= first) & (column < last)).expand(batch, length)
        chosen = torch.zeros((), dtype=torch.int32, device=device) if rows is None else rows.to(device)[:, None]
        return torch.where(inside, chosen, -1).to(torch.int32).reshape(-1)

    # --- for the sites -----------------------------------------------------------------------------------------------

    def rows_for(self, x: Tensor):
        """int32 [tokens], the table's row of each token of ``x`` [..., width] or -1; None: all row 0; or NOBODY."""
        state = self._state
        if state is None or state is NOBODY:
            return state
        if state.device != x.device:
            self._state = state = state.to(x.device)  # the next site is most likely on the same device
        if state.shape[0] * x.shape[-1] != x.numel():
            raise SteeringError(
                f"a site has {x.numel() // x.shape[-1]} tokens in a forward pass of {state.shape[0]}, expected as "
                "many: this model's tokens do not keep their places there, so rows and scopes cannot be told apart; "
                "use one plan with scope='all'"
            )
        return state

    def table_rows(self, rows: Tensor) -> Tensor:
        """int64 [tokens], for what ``rows_for`` gave: the row of tables whose last row, of zeros, is for no plan."""
        found = self._table_rows
        if found is None or found.device != rows.device:
            found = torch.where(rows < 0, 1 if self._plans is None else len(self._plans), rows).long()
            if not torch.compiler.is_compiling():  # where the compiler sees to it
                self._table_rows = found
        return found

    @property
    def tokens(self) -> int:
        return self._tokens + (0 if self._counted is None else int(self._counted))


def _each_token(rows: Tensor, length: int) -> Tensor:
    """[batch] -> [batch * length], contiguous also where ``rows`` only repeats one entry."""
    return rows[:, None].expand(-1, length).reshape(-1).contiguous()


def _on(n: int | Tensor, device: torch.device) -> int | Tensor:
    return n.to(device) if isinstance(n, Tensor) else n


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of a mask [batch, columns] are zero before its first and after its last one; [batch] each."""
    real = mask != 0
    before = (real.cumsum(1) == 0).sum(1)
    after = (real.flip(1).cumsum(1) == 0).sum(1)
    return before, after


def _wrong_rows(found: int, batch: int) -> str:
    return (
        f"rows: found {found} entries and a batch of {batch}, expected one entry for each row of the batch as it is "
        "given to generate (beams and return sequences follow), or of each direct call of the model"
    )
