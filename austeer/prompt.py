"""Where the prompt ends: what a forward pass does not show, and ``generate`` is watched for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SteeringError


class Prompt:
    """The prompt's length and padding, while ``generate`` runs or as the user gives it.

    Args:
        owner: the model whose ``generate`` is watched, if it has one.
        on_generate: called with the number of rows that ``generate`` is given, before it runs.

    Attributes:
        on_device: int64 [], the length once more, for compiled and captured forward passes.
        padding: columns before and after each row's prompt, [batch] each; None where it is not known.
        batch: how many rows ``generate`` was given; None outside it.
    """

    def __init__(self, owner: nn.Module, device: torch.device, on_generate: Callable[[int], None] = lambda batch: None):
        self._owner, self._on_generate = owner, on_generate
        self._length: int | None = None
        self.known = False
        self.padding: tuple[Tensor, Tensor] | None = None
        self.batch: int | None = None
        self._watching: Callable | None = None
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

    def attach(self) -> None:
        inner = getattr(self._owner, "generate", None)
        if inner is not None:
            self._before = vars(self._owner).get("generate")
            self._watching = vars(self._owner)["generate"] = self._watched(inner)

    def detach(self) -> None:
        if self._watching is None or vars(self._owner).get("generate") is not self._watching:
            return
        if self._before is None:
            del vars(self._owner)["generate"]
        else:
            vars(self._owner)["generate"] = self._before

    def _watched(self, inner: Callable) -> Callable:
        signature = inspect.signature(inner)

        @functools.wraps(inner)
        def generate(*args, **kwargs):
            given = signature.bind_partial(*args, **kwargs).arguments
            with self._generating({**given.pop("kwargs", {}), **given}):
                return inner(*args, **kwargs)

        return generate

    @contextmanager
    def _generating(self, given: Mapping[str, Any]) -> Iterator[None]:
        before = self._length, self.padding, self.batch
        candidates = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        tokens = next((t for t in candidates if isinstance(t, Tensor) and t.numel()), None)
        mask = given.get("attention_mask")
        try:
            if tokens is None:
                self.length = 1  # generate begins from nothing with one token
            else:
                self.batch, self.length = tokens.shape[0], tokens.shape[1]
                self._on_generate(self.batch)
                if isinstance(mask, Tensor) and mask.dim() == 2:
                    self.length = mask.shape[1]  # longer than the tokens where those go on from a cache
                    self.padding = padding(mask)
            yield
        finally:
            self.length, self.padding, self.batch = before


def padding(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns of a mask [batch, columns] are zero before its first and after its last one; [batch] each."""
    real = mask != 0
    before = (real.cumsum(1) == 0).sum(1)
    after = (real.flip(1).cumsum(1) == 0).sum(1)
    return before, after
