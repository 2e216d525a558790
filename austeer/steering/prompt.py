"""Where the prompt ends: what a forward pass does not show, and ``generate`` is watched for."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import SteeringError
from .answering import Answering

#: Continuous batching, at its two entrances.
_PACKING = ("generate_batch", "init_continuous_batching")
PACKED = (
    "continuous batching packs many requests in one row, so rows and scopes cannot be told apart; "
    "expected generate(), or one plan at scope='all'"
)


class Prompt:
    """The prompt's length and padding, while ``generate`` runs or as the user gives it.

    Args:
        owner: the model whose ``generate`` is watched, if it has one.
        on_generate: called with the number of rows that ``generate`` is given, before it runs.
        scoped: whether anything depends on where the prompt is.
        answering: what follows the texts that are generated; None where nothing does.
        around: entered while ``generate`` runs.

    Attributes:
        on_device: int64 [], the length once more, for compiled and captured forward passes.
        padding: columns before and after each row's prompt, [batch] each; None where it is not known.
        batch: how many rows ``generate`` was given; None outside it.
    """

    def __init__(
        self,
        owner: nn.Module,
        device: torch.device,
        on_generate: Callable[[int], None] | None = None,
        scoped: bool = True,
        answering: Answering | None = None,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self._owner, self._on_generate, self._scoped, self._answering = owner, on_generate, scoped, answering
        self._around = around
        self._moving = False  # whether rows may change places between passes
        self._length: int | None = None
        self.known = False
        self.padding: tuple[Tensor, Tensor] | None = None
        self.batch: int | None = None
        self._watching: dict[str, tuple[Callable, Callable | None]] = {}  # name -> ours, and what the instance had
        self.turn = Turn()
        with torch.inference_mode(False):
            self.on_device = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def length(self) -> int | None:
        """In columns of the batch, padding included; None: not known."""
        return self._length

    @length.setter
    def length(self, length: int | None) -> None:
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise SteeringError(f"prompt_length: found {length!r}, expected a positive integer or None")
        self._length = length
        self.known = length is not None
        self.on_device.fill_(length or 0)

    def end(self, on_device: bool) -> int | Tensor:
        """The length where it is known; as the device's buffer, for what is compiled or captured."""
        return self.on_device if on_device else cast(int, self._length)

    def attach(self) -> None:
        self.turn.give_back()
        watches = [("generate", _generate), *((name, _refuse) for name in _PACKING)]
        if self._answering is not None:
            watches.append(("prepare_inputs_for_generation", _prepare))
        for name, watch in watches:
            inner = getattr(self._owner, name, None)
            if inner is not None:
                # No closure: a copy of the model made inside the block must call its own method.
                ours = functools.update_wrapper(functools.partial(watch, self, inner), inner)
                self._watching[name] = (ours, vars(self._owner).get(name))
                vars(self._owner)[name] = ours

    def detach(self) -> None:
        for name, (ours, before) in self._watching.items():
            if vars(self._owner).get(name) is not ours:
                continue  # someone has put another one there
            if before is None:
                del vars(self._owner)[name]
            else:
                vars(self._owner)[name] = before
        self._watching.clear()

    @contextmanager
    def generating(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Knows the prompt in the block, from what ``generate`` was given.

        Raises:
            SteeringError: another thread runs the model; or two prompts at once (guidance), under a scope.
        """
        if self._scoped:
            _expect_one_prompt(given)
        if self._answering is not None:
            _expect_whole_texts(given)
        ours = self.turn.take_for_generate()
        before = self._length, self.padding, self.batch, self._moving
        self.padding = self.batch = None
        try:
            tokens = _tokens(given)
            if tokens is not None:
                self.batch, self.length = tokens.shape[0], tokens.shape[1]
                mask = given.get("attention_mask")
                if isinstance(mask, Tensor) and mask.dim() == 2:
                    self.length = mask.shape[1]  # longer than the tokens where those go on from a cache
                    self.padding = padding(mask)
            elif any(isinstance(value, Tensor) for value in given.values()):
                self.length = None  # a generate of another form: each forward pass must tell
            else:
                self.batch = self.length = 1  # generate begins from nothing with one token
            if self.batch is not None and self._on_generate is not None:
                self._on_generate(self.batch)
            self._moving = _option(given, "num_beams", self._owner) not in (None, 1)
            with self._around(), nullcontext() if self._answering is None else self._answering.generating():
                yield
        finally:
            self.length, self.padding, self.batch, self._moving = before
            if ours:
                self.turn.give_back()

    def prepared(self, ids: Tensor, mask: object, inputs: Mapping[str, Any]) -> None:
        """Told of each forward pass that ``generate`` is about to run.

        Args:
            ids: all texts as they are, [batch, columns]; of a prompt in pieces, a piece. mask: which columns count.
            inputs: what the pass is given.
        """
        tokens = inputs.get("input_ids")
        if self._answering is not None and self._length is not None and tokens is not None:
            self._answering.prepare(ids, mask, self._length, tokens.shape[1], self._moving)


def _tokens(given: Mapping[str, Any]) -> Tensor | None:
    """What counts the prompt's columns: where there are embeddings, they are run and not the ids beside them."""
    candidates = (given.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))
    return next((t for t in candidates if isinstance(t, Tensor) and t.dim() >= 2 and t.numel()), None)


def _expect_one_prompt(given: Mapping[str, Any]) -> None:
    scale = _option(given, "guidance_scale")
    if scale is not None and scale != 1:
        raise SteeringError(
            f"guidance_scale: found {scale} with a scope, expected none: guidance runs a second prompt of another "
            "length; use scope='all'"
        )


def _expect_whole_texts(given: Mapping[str, Any]) -> None:
    """Raises SteeringError where markers could not be found in what ``generate`` is given."""
    if isinstance(given.get("inputs_embeds"), Tensor):
        raise SteeringError("scope answer: found inputs_embeds, expected input_ids: markers are tokens")
    tokens, mask = _tokens(given), given.get("attention_mask")
    if tokens is not None and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > tokens.shape[1]:
        raise SteeringError(
            f"scope answer: found {tokens.shape[1]} columns of tokens and a mask of {mask.shape[1]}, expected the "
            "tokens that are in the cache, too: markers may be among them"
        )


def _option(given: Mapping[str, Any], name: str, owner: nn.Module | None = None) -> Any:
    """An option of ``generate``: as it is given, as the configuration given has it, or the model's own."""
    config = given.get("generation_config") or getattr(owner, "generation_config", None)
    return given.get(name, getattr(config, name, None))


def _prepare(prompt: Prompt, inner: Callable, ids: Tensor, *args, **kwargs):
    """``inner``, watched."""
    inputs = inner(ids, *args, **kwargs)
    prompt.prepared(ids, kwargs.get("attention_mask"), inputs)
    return inputs


def _generate(prompt: Prompt, inner: Callable, *args, **kwargs):
    """``inner``, watched."""
    given = inspect.signature(inner).bind_partial(*args, **kwargs).arguments
    with prompt.generating({**given.pop("kwargs", {}), **given}):
        return inner(*args, **kwargs)


def _refuse(prompt: Prompt, inner: Callable, *args, **kwargs):
    raise SteeringError(PACKED)


def padding(mask: Tensor, end: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many columns of a mask [batch, columns] are zero before its first one and after its last; [batch] each.

    Args:
        end: columns from here on do not count (they are not filled yet); None: all do.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    end = mask.shape[1] if end is None else end
    real = (mask != 0) & (column < end)
    before = (real.cumsum(1) == 0).sum(1)
    last = torch.where(real, column, -1).amax(1)
    return before.clamp(max=end), end - 1 - last


def expect_unpadded(ids: Tensor | None, config: Any) -> None:
    """Raises SteeringError where rows begin or end with the padding token, and no mask says whether it pads them.

    An end-of-text token pads too, where there is no other; it is taken as text if every row ends with it.

    Args:
        ids: int64 [batch, tokens]; None: not given as ids. config: of the language model.
    """
    if ids is None or ids.dim() != 2:
        return
    ends = getattr(config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
    pad = getattr(config, "pad_token_id", None)
    pads = ends if pad is None else {pad}
    first, last = (_among(ids[:, column], pads) for column in (0, -1))
    found = bool(last.any()) and not (pads <= ends and bool(last.all()))
    if not found and pad not in (None, getattr(config, "bos_token_id", None)):
        found = bool(first.any()) and not (pad in ends and bool(first.all()))
    if found:
        raise SteeringError(
            f"attention_mask: found none, and rows that begin or end with the padding token ({sorted(pads)[0]}); "
            "expected attention_mask=tokenizer(..., padding=True)['attention_mask'], which tells padding from text"
        )


def _among(ids: Tensor, tokens: set[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(tokens), dtype=ids.dtype, device=ids.device))


#: In place of a frame: held until it is given back, whatever happens inside.
_SURE = 0


class Turn:
    """One thread at a time; held by a whole ``generate``, or by one forward pass.

    A forward pass that fails cannot give its turn back, so another thread may take it once that pass's frame is gone.
    """

    def __init__(self) -> None:
        # A dictionary, because its setdefault is atomic and, unlike a lock, it can be copied with a model.
        self._holder: dict[str, tuple[int, int]] = {}

    def take_for_generate(self) -> bool:
        """Whether it has to be given back: not if this thread has it for another ``generate`` around this one.

        Raises:
            SteeringError: another thread is running the model.
        """
        return self._take(_SURE)

    def take_for_forward(self) -> bool:
        """The same for one forward pass; to be called from inside accelerate's ``new_forward``."""
        frame = sys._getframe()
        while frame.f_back is not None and frame.f_code.co_name != "new_forward":
            frame = frame.f_back
        return self._take(id(frame))

    @property
    def taken(self) -> object:
        """An object, another one each time that the turn is taken; None while nobody has it."""
        return self._holder.get("turn")

    def give_back(self) -> None:
        self._holder.clear()

    def _take(self, frame: int) -> bool:
        mine = (threading.get_ident(), frame)
        found = self._holder.setdefault("turn", mine)
        if found is mine:
            return True
        thread, held_by = found
        if thread == mine[0] and held_by == _SURE:
            return False
        if thread != mine[0] and (held_by == _SURE or _is_running(thread, held_by)):
            raise SteeringError(
                "two threads run the model at once, expected one: a scope, or rows with plans of their own, belong to "
                "the forward pass at hand; use one plan with scope='all', or a lock"
            )
        self._holder["turn"] = mine  # what was there is left of a pass that failed
        return True


def _is_running(thread: int, frame: int) -> bool:
    found = sys._current_frames().get(thread)
    while found is not None:
        if id(found) == frame:
            return True
        found = found.f_back
    return False
