"""What every way to steer a model has to offer, so that all are checked and timed alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from austeer import Plan

Model = TypeVar("Model", bound=nn.Module)


class UnavailableError(Exception):
    """A way to steer that cannot be used here; the message says why (a missing package, a layer of another kind)."""


def twin(model: Model) -> Model:
    """A model of its own around the same weights and buffers: hooks and wrappers put on it are not on the other.

    It generates without end tokens and penalties: greedy tokens are those of the largest logits, as many as asked for.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    if hasattr(other, "generation_config"):
        other.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[assignment]
    return other


class Steered:
    """A model steered in one way: a twin (:func:`twin`), to be changed at will, but for its weights.

    This base steers nothing: the model as it is.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """The library's own generation, steered from the first position of the prompt on: [batch, prompt + new].

        Args:
            ids: [batch, prompt]. options: for Transformers' ``generate``, passed on as they are.
        """
        mask = torch.ones_like(ids)
        return self.model.generate(input_ids=ids, attention_mask=mask, **options)  # type: ignore[operator]

    def logits(self, ids: Tensor) -> Tensor:
        """[batch, tokens, vocabulary], every position steered."""
        return self.model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around each run, outside of what is timed: for what may not stay on while others run (edited weights)."""
        yield

    def close(self) -> None:
        """Takes everything off again. The object is not used after it."""


@dataclass(frozen=True)
class Way:
    """A way to steer: how it is called in tables, and how it is put on a model.

    Attributes:
        name: short, lower case.
        make: of a twin, a plan (operation "scale") and alpha, the steered model. Raises UnavailableError.
        ours: whether it is one of this library's paths. peer: whether it is another library's.
        module: whether ``Steered.model`` can be called as the model itself, also compiled or captured in a CUDA graph.
    """

    name: str
    make: Callable[[nn.Module, Plan, float], Steered]
    ours: bool = False
    peer: bool = False
    module: bool = True
