"""Follows each row of a batch through its answer's markers, on the device: nothing waits for it.

``generate`` hands on whole texts before each forward pass, whatever became of rows and tokens since (beams change
places, drafted tokens are taken back): states are made of those. Where the model is called directly, a state moves on
by the tokens of each pass, and a text begins with an empty cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import SteeringError
from .markers import Answer, Automaton

#: Columns that are composed at once: each holds a number for each state.
_COLUMNS = 256


class Answering:
    """The states of the rows of the batch at hand.

    Args:
        vocabulary: how many tokens the model has. device: where it takes them.

    Raises:
        SteeringError: a marker's token is not among them.
    """

    def __init__(self, answer: Answer, vocabulary: int, device: torch.device):
        if (largest := max(answer.tokens(), default=0)) >= vocabulary:
            raise SteeringError(
                f"answer: found token {largest} in its markers, and the model's vocabulary has {vocabulary}; expected "
                "markers of the model's own tokenizer"
            )
        automaton = Automaton(answer)
        with torch.inference_mode(False):  # inference tensors could not be used outside of that mode
            self._classes = torch.zeros(vocabulary, dtype=torch.int64, device=device)
            for token, number in automaton.classes.items():
                self._classes[token] = number
            self._next = torch.tensor(automaton.next, dtype=torch.int64, device=device)  # [classes, states]
            self._on = torch.tensor(automaton.on, device=device)  # [states]
            self._states = torch.arange(len(automaton.on), device=device)
        self._inside: Tensor | None = None  # bool [batch, tokens] of the pass that generate has prepared
        self._current: Tensor | None = None  # int64 [batch], after the last token of a direct call
        self._columns: int | None = 0  # how many columns that is after; None: only the device knows
        self._start: Tensor | None = None  # int64 [batch], after the prompt of a generate
        self._last: tuple[int, Tensor] | None = None  # columns, and the states after them
        self._met: Tensor | None = None  # bool [], whether any token that was generated was in an answer

    # --- generate ----------------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A ``generate`` runs in the block."""
        around = self._start, self._last  # of a generate inside of which this one runs
        self.clear()
        try:
            yield
        finally:
            self.clear()
            self._start, self._last = around

    def prepare(self, ids: Tensor, mask: object, prompt: int, tokens: int, moving: bool) -> None:
        """Makes ready for the forward pass that ``generate`` is about to run.

        Args:
            ids: int64 [batch, columns], all texts as they are now. mask: which columns of them are no padding.
            prompt: how many columns are prompt. tokens: how many of the last columns the pass runs.
            moving: whether rows may have changed places since the last pass.
        """
        batch, columns = ids.shape
        inside = torch.zeros(batch, tokens, dtype=torch.bool, device=ids.device)
        if columns > prompt:
            if self._start is None:
                self._start = self._after(self._first(batch), ids[:, :prompt], _columns(mask, 0, prompt))[:, -1]
            if moving or self._last is None or tokens > 1 or self._last[0] != columns - 1:
                states = self._after(self._start, ids[:, prompt:], None)
                # What was run of drafted tokens may be taken back, so the next pass is not to go on from these.
                self._last = (columns, states[:, -1]) if tokens == 1 else None
            else:
                states = self._after(self._last[1], ids[:, -1:], None)
                self._last = (columns, states[:, -1])
            new = self._on[states[:, -tokens:]]
            inside[:, tokens - new.shape[1] :] = new
            self._met = new.any() if self._met is None else self._met | new.any()
        self._keep(inside)

    def prepared(self, batch: int, length: int) -> Tensor:
        """bool [batch, length], which tokens of the pass at hand are in the answer.

        Raises:
            SteeringError: ``generate`` prepared another pass, or none.
        """
        if self._inside is None or self._inside.shape != (batch, length):
            found = "none" if self._inside is None else f"one of {list(self._inside.shape)}"
            raise SteeringError(
                f"scope answer: found a forward pass of {[batch, length]} tokens where generate prepared {found}, and "
                "its texts are not known; expected a generate that calls prepare_inputs_for_generation before each "
                "pass, or scope='generation'"
            )
        return self._inside

    @property
    def missed(self) -> bool:
        """Whether ``generate`` has written tokens in this block, and none of them was in an answer."""
        return self._met is not None and not bool(self._met)

    def _keep(self, inside: Tensor) -> None:
        if self._inside is not None and self._inside.shape == inside.shape:
            self._inside.copy_(inside)  # in place: compiled and captured graphs read it
        else:
            with torch.inference_mode(False):
                self._inside = inside.clone()

    # --- direct calls ------------------------------------------------------------------------------------------------

    def follow(self, ids: Tensor, mask: object, past: int | Tensor, on_device: bool) -> Tensor:
        """bool [batch, tokens], which tokens of a direct call are in the answer; the states move on behind them.

        Args:
            mask: of the whole texts. past: columns in the cache. on_device: whether the call is compiled or captured.

        Raises:
            SteeringError: the cache holds tokens that were not seen.
        """
        batch, length = ids.shape
        known = self._current is not None and self._current.shape[0] == batch
        seen = known and (on_device or not isinstance(past, int) or self._columns in (None, past))
        # A static cache's length is on the device: it is read where nothing is known of its texts, once.
        filled = past if isinstance(past, int) else 0 if on_device or seen else int(past)
        if not seen and filled > 0:
            raise SteeringError(
                f"scope answer: found a cache of {filled} columns for {batch} rows, expected one that was filled "
                "inside this block by the calls before this one: what those tokens were is not known; fill it inside, "
                "use generate, or scope='generation'"
            )
        before = self._first(batch) if not known else self._current
        assert before is not None
        if isinstance(past, Tensor):
            before = torch.where(past == 0, 0, before)
        elif past == 0:
            before = self._first(batch)
        states = self._after(before, ids, _columns(mask, past, length))
        if known:
            self._current.copy_(states[:, -1])  # type: ignore[union-attr]
        else:
            with torch.inference_mode(False):
                self._current = states[:, -1].clone()
        if not on_device:
            self._columns = past + length if isinstance(past, int) else None
        return self._on[states]

    def clear(self) -> None:
        """Forgets all: what runs from now on may run without being seen."""
        self._start = self._last = self._inside = self._current = None
        self._columns = 0

    def attach(self) -> None:
        """A block begins."""
        self.clear()
        self._met = None

    # --- the automaton -----------------------------------------------------------------------------------------------

    def _first(self, batch: int) -> Tensor:
        return torch.zeros(batch, dtype=torch.int64, device=self._states.device)

    def _after(self, state: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        """int64 [batch, tokens], the state after each token; padding changes none.

        Args:
            state: int64 [batch], before them.
        """
        found = []
        for first in range(0, ids.shape[1], _COLUMNS):
            part = slice(first, first + _COLUMNS)
            steps = self._next[self._classes[ids[:, part]]]  # [batch, tokens, states], where each state goes
            if mask is not None:
                steps = torch.where(mask[:, part, None].to(steps.device) != 0, steps, self._states)
            reach = 1
            while reach < steps.shape[1]:  # each entry becomes the way through twice as many tokens
                later = steps[:, reach:].gather(2, steps[:, :-reach])
                steps = torch.cat([steps[:, :reach], later], 1)
                reach *= 2
            found.append(steps.gather(2, state[:, None, None].expand(-1, steps.shape[1], 1))[..., 0])
            state = found[-1][:, -1]
        return found[0] if len(found) == 1 else torch.cat(found, 1)


def _columns(mask: object, first: int | Tensor, count: int) -> Tensor | None:
    """Those of a mask that are for ``count`` tokens; None where it does not tell."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < count:
        return None
    if isinstance(first, Tensor):
        column = torch.arange(count, device=mask.device) + first.to(mask.device)
        return mask.index_select(1, column.clamp(max=mask.shape[1] - 1))
    return mask[:, first : first + count] if mask.shape[1] >= first + count else None
