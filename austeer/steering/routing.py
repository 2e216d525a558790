"""Which tokens of the forward pass at hand are steered, and with whose strengths.

A patch of the decoder works it out once a forward pass, for all sites: everything, nothing, or for each token the row
of the strength tables (-1: none).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SteeringError
from ..models.patches import Patch
from ..models.structure import text_config
from .answering import Answering
from .cached_tokens import CachedTokens
from .deciding import Deciding
from .prompt import PACKED, Prompt, expect_unpadded, padding
from .recomputation import is_recomputed
from .row_plans import Rows
from .scope import END, Scope
from .switch import Switch

#: No token of this forward pass is steered. (As a state, None stands for every token.)
NOBODY = object()
#: Every token is, by the first plan.
WHOLE = object()

#: What only continuous batching passes to a decoder: its tokens are those of many requests in one row.
_PACKED = ("cu_seq_lens_q", "block_table")


class Routing:
    """The tokens to steer, for a scope and for rows with plans of their own.

    Args:
        scope: the positions.
        rows: each row's plan; None where there is one plan for every row.
        prompt: how long the prompt is.
        decoder: the model without its head.
        model: with it.
        answering: what follows each row's answer, under the scope of that name.
        deciding: what decides whether a row is steered at all; None: all are.

    Attributes:
        switch: the biases that hold a shift in forward passes of which every token is steered.
        key: NOBODY; WHOLE; what is equal in two forward passes if their tokens' rows are; or None if that is not known.
    """

    def __init__(
        self,
        scope: Scope,
        rows: Rows | None,
        prompt: Prompt,
        decoder: nn.Module,
        model: nn.Module,
        answering: Answering | None = None,
        deciding: Deciding | None = None,
    ):
        self.scope, self.rows, self.prompt, self._decoder = scope, rows, prompt, decoder
        self._answering, self.deciding = answering, deciding
        self.switch = Switch(model)
        self._patch = Patch(decoder)
        self._names = list(inspect.signature(decoder.forward).parameters)
        self._state: Any = NOBODY
        self.key: Any = None
        self._tokens = 0
        self._counted: Tensor | None = None
        self._running = False
        self._cached = CachedTokens()
        self._attached = False
        self._ours = False  # whether the forward pass at hand has to give its turn back: it is outside generate

    def attach(self) -> None:
        self._state, self.key, self._tokens, self._counted = NOBODY, None, 0, None
        self._cached.clear()
        if self._answering is not None:
            self._answering.attach()
        if self.deciding is not None:
            self.deciding.attach()
        self._attached = True
        # With the decoder's own signature, which generation code may ask for.
        forward = functools.update_wrapper(functools.partial(self.forward), self._decoder.forward)
        self._patch.attach(forward)
        self.prompt.attach()

    def detach(self) -> list[str]:
        """Undoes all; what could not be is returned, each with the reason."""
        self._attached = False  # what wraps our forward calls it still
        self.prompt.detach()
        failed = []
        for detach in (self._patch.detach, *([] if self.deciding is None else [self.deciding.detach])):
            try:
                detach()
            except SteeringError as error:  # one module must not keep the others patched
                failed.append(str(error))
        return failed

    @property
    def tokens(self) -> int:
        """How many tokens of forward passes outside compiled graphs were steered so far, padding included."""
        return self._tokens + (0 if self._counted is None else int(self._counted))

    @property
    def missed(self) -> bool:
        """Whether text was generated, and no token of it was in the scope, also by compiled graphs."""
        return self._answering is not None and self._answering.missed

    # --- a forward pass ----------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        """The decoder's forward, once it is known which tokens of it are steered."""
        if not self._attached:
            return self._patch.inner(*args, **kwargs)
        given = {**dict(zip(self._names, args)), **kwargs}
        if torch.compiler.is_compiling():
            self._begin(given)
            return self._patch.inner(*args, **kwargs)
        self._ours = self.prompt.turn.take_for_forward()
        inside, around = self._running, (self._state, self.key, self.switch.on)  # of a pass inside of which this runs
        self._running = True
        try:
            end = self._begin(given)
            # Where gradients are wanted, or dropout may follow a bias, the sites steer the tensors themselves.
            whole = self.key is WHOLE and not torch.is_grad_enabled() and not self._decoder.training
            self.switch.turn(whole, None if self._ours else self.prompt.turn.taken)
            output = self._patch.inner(*args, **kwargs)
            if self.deciding is not None:
                self.deciding.expect_read()
            if isinstance(end, int):
                self._cached.after(given, output, end)
            return output
        finally:
            self._running = inside
            self.switch.turn(inside and around[2])
            if self.deciding is not None:
                self.deciding.ends()
            if inside:  # what is left of that pass; otherwise a layer called by itself uses the last pass's
                self._state, self.key = around[:2]
            if self._ours:
                self._ours = False
                self.prompt.turn.give_back()

    def _begin(self, given: Mapping[str, Any]) -> int | Tensor | None:
        """Sets the state for a pass with these arguments; where a scope counts them, the tokens cached afterwards."""
        x = given.get("input_ids")
        if x is None:
            x = given.get("inputs_embeds")
        if x is None:
            raise SteeringError("found neither input_ids nor inputs_embeds; expected one of them")
        if any(given.get(name) is not None for name in _PACKED):
            raise SteeringError(PACKED)
        if is_recomputed(self._decoder):
            raise SteeringError(
                "found activation checkpointing together with a scope or rows: what is computed anew in the backward "
                "pass cannot tell which forward pass it belongs to; expected one plan with scope='all', or "
                "model.gradient_checkpointing_disable()"
            )
        batch, length = x.shape[0], x.shape[1]
        on_device = torch.compiler.is_compiling() or capturing(x.device)
        # A static cache's is a tensor, of which nothing can be told here; without a scope nothing depends on it.
        scoped = self.scope.name != "all"
        past = self._cached.before(given, capturing(x.device)) if scoped else 0
        first, last = self._interval(given, past, batch, length, on_device)
        rows = None if self.rows is None else self.rows.of(batch, self.prompt.batch, on_device)
        some = self._chosen(given, past, batch, length, on_device)
        self.key = None
        known = not any(isinstance(n, Tensor) for n in (past, first, last))
        inside = known and max(first, past) < min(last, past + length)
        if on_device or not known or (inside and some is not None):
            self._state = _tensor_state(rows, past, first, last, some, batch, length, x.device)
            if self._state is None and capturing(x.device):  # kernels were loaded as passes with rows take them
                self._state = torch.zeros(batch * length, dtype=torch.int32, device=x.device)
            if not on_device and isinstance(self._state, Tensor):
                count = (self._state >= 0).sum()
                self._counted = count if self._counted is None else self._counted.to(count.device) + count
        else:
            begin, end = max(first - past, 0), min(last - past, length)
            self._state = self._host_state(rows, begin, end, batch, length, x.device)
            if not isinstance(self._state, Tensor):
                self.key = WHOLE if self._state is None else NOBODY
        return past + length if scoped else None

    def _chosen(self, given: Mapping[str, Any], past, batch: int, length: int, on_device: bool) -> Tensor | None:
        """Which tokens of the pass are steered, as far as markers and a probe tell: bool, spread to [batch, length]."""
        some = None
        if self._answering is not None:
            if self.prompt.batch is not None:  # inside generate
                some = self._answering.prepared(batch, length)
            elif given.get("input_ids") is None:
                raise SteeringError("scope answer: found inputs_embeds, expected input_ids: markers are tokens")
            else:
                ids, mask = given["input_ids"], given.get("attention_mask")
                some = self._answering.follow(ids, mask, past, on_device)
        if self.deciding is not None:
            end = self._prompt_end(past, length, on_device)
            stop, after = end, 0
            if end is not None and (isinstance(past, Tensor) or isinstance(end, Tensor) or past < end):
                after = self._padding(given, past, batch, length, on_device)[1]
                if self.prompt.padding is None:
                    stop = _least(end, past + length)
            self.deciding.begin(batch, length, past, end, stop, after, on_device)
            fires = self.deciding.fires
            some = fires if some is None or fires is None else some & fires.to(some.device)
        return some

    def _prompt_end(self, past, length: int, on_device: bool) -> int | Tensor | None:
        """The prompt's columns; None where a call outside of generate goes on from one."""
        if self.prompt.known:
            return self.prompt.end(on_device)
        # Outside generate a call of several tokens is prompt, and a call of one on a filled cache is not.
        fresh = length > 1 or (not isinstance(past, Tensor) and past == 0)
        return past + length if fresh else None

    def _interval(self, given: Mapping[str, Any], past, batch: int, length: int, on_device: bool):
        scope = self.scope
        if scope.name == "all":
            return 0, END
        end = self._prompt_end(past, length, on_device)
        if end is None:
            if scope.name == "last_prompt_token":
                return 0, 0
            if scope.name == "from_last_prompt_token":
                return 0, END
            end = past
        before, after = 0, 0
        if scope.name == "from_last_prompt_token" and isinstance(past, int) and isinstance(end, int) and past >= end:
            return 0, END  # the prompt was run before
        if scope.name in ("range", "last_prompt_token", "from_last_prompt_token"):
            before, after = self._padding(given, past, batch, length, on_device)
        return scope.interval(end, before, after)

    def _padding(self, given: Mapping[str, Any], past, batch: int, length: int, on_device: bool):
        """Columns of padding before and after each row's prompt, [batch] each, or zeros if nothing tells."""
        if self.prompt.padding is not None:
            times = batch // self.prompt.padding[0].shape[0]  # beams, return sequences
            return tuple(p if times == 1 else p.repeat_interleave(times) for p in self.prompt.padding)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            end = past + length  # the mask may be longer, for what a static cache will hold
            if self.prompt.known:
                end = _least(self.prompt.end(on_device), end)
            return padding(mask, _on(end, mask.device))
        if mask is None and length > 1 and not on_device:
            expect_unpadded(given.get("input_ids"), text_config(self._decoder))
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[0] == batch:
            before = (past + length - 1 - positions[:, -1]).clamp(min=0)
            if length > 1 and not on_device:
                _expect_one_sequence(positions, before, past)
            return before, 0
        if mask is not None:
            raise SteeringError(
                f"scope {self.scope}: found an attention mask of {type(mask).__name__} that does not show the padding, "
                "expected one of [batch, tokens], or position_ids"
            )
        return 0, 0

    def _host_state(self, rows: Tensor | None, begin: int, end: int, batch: int, length: int, device: torch.device):
        """The state where the scope is the columns ``begin`` to ``end`` of this forward pass, in every row."""
        steered = batch if self.rows is None else self.rows.steered(batch)
        if begin >= end or steered == 0:
            return NOBODY
        self._tokens += steered * (end - begin)
        whole = begin == 0 and end == length
        if rows is None or (self.rows is not None and self.rows.everywhere is not None and len(self.rows.plans) == 1):
            if whole:
                return None
            rows = torch.zeros(batch, dtype=torch.int32, device=device)
        if whole:
            if self.rows is not None and length == 1:  # a prompt's would be large, and is not run twice
                self.key = (self.rows.version, batch)
            return _each_token(rows.to(device), length)
        inside = rows.to(device)[:, None].expand(batch, end - begin)
        return torch.nn.functional.pad(inside, (begin, length - end), value=-1).reshape(-1)

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


def _expect_one_sequence(positions: Tensor, before: Tensor, past) -> None:
    column = torch.arange(positions.shape[1], device=positions.device) + past
    before = before[:, None]
    right = torch.where(column < before, positions == positions[:, :1], positions == column - before)
    if not bool(right.all()):
        raise SteeringError(
            "position_ids: found some that do not rise by one (several sequences packed in a row?), expected one "
            "sequence a row; or use scope='all'"
        )


def _tensor_state(
    rows: Tensor | None, past, first, last, some: Tensor | None, batch: int, length: int, device: torch.device
):
    """The state where something is only known on the device, or must be read there at each replay.

    Args:
        some: bool [batch, length], the tokens of the interval that are steered; None: all.
    """
    if isinstance(first, int) and isinstance(last, int) and (first, last) == (0, END):
        return None if rows is None else _each_token(rows.to(device), length)
    column = torch.arange(length, device=device) + _on(past, device)
    first, last = (n[:, None] if isinstance(n, Tensor) and n.dim() else n for n in (first, last))
    first, last = _on(first, device), _on(last, device)
    inside = ((column >= first) & (column < last)).expand(batch, length)
    inside = inside if some is None else inside & some.to(device)
    chosen = torch.zeros((), dtype=torch.int32, device=device) if rows is None else rows.to(device)[:, None]
    return torch.where(inside, chosen, -1).to(torch.int32).reshape(-1)


def _least(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, int):
        return min(a, b) if isinstance(b, int) else b.clamp(max=a)
    return a.clamp(max=_on(b, a.device))


def _each_token(rows: Tensor, length: int) -> Tensor:
    """[batch] -> [batch * length], contiguous also where ``rows`` only repeats one entry."""
    return rows[:, None].expand(-1, length).reshape(-1).contiguous()


def _on(n: int | Tensor, device: torch.device) -> int | Tensor:
    return n.to(device) if isinstance(n, Tensor) else n


def capturable(device: torch.device) -> bool:
    """Whether what is called now may be captured in a CUDA graph later."""
    return device.type == "cuda"


def capturing(device: torch.device) -> bool:
    """Whether what is called now becomes part of a CUDA graph."""
    # Dynamo cannot trace the question, and what it compiles asks otherwise.
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
