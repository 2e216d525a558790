"""Which set a request asks for, and the refusal of unknown ones where vLLM takes requests in."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from ..plans.serving import KEY, VARIABLE
from .plugin import ARCHITECTURES
from .sets import ServingError, parse, set_of
from .slots import slots_of


class Requests(ProcessorV1, ProcessorV2):
    """A custom logits processor that leaves logits alone: named with --logits-processors, for both model runners.

    In the process that takes requests it refuses unknown sets; in the engine it refuses to start on a model that is not
    steered, and model runner V1 tells it which request is in which slot.
    """

    def __init__(self, vllm_config: Any, *_: Any):
        from vllm.model_executor.model_loader import get_model_architecture

        self._slots = slots_of(vllm_config)
        model, name = get_model_architecture(vllm_config.model_config)
        if getattr(model, "steered_by", None) != KEY:
            raise ServingError(
                f"{VARIABLE}: found the architecture {name}, run by {model.__module__}.{model.__qualname__}, which is "
                f"not steered; expected one of {', '.join(ARCHITECTURES)}, in an environment that has austeer's "
                "entry point (and where VLLM_PLUGINS is set, austeer in it)"
            )

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which becomes an HTTP 400, where a request asks for a set that is not there."""
        name = set_of(sampling_params)
        if name is None:
            return
        value = os.environ.get(VARIABLE)
        names = list(parse(value)) if value is not None else []
        if not isinstance(name, str) or name not in names:
            expected = f"one of {', '.join(map(repr, names))}" if names else f"none, as {VARIABLE} is not set"
            raise ValueError(f"{KEY}: found the steering set {name!r}, expected {expected}")

    def update_state(self, batch_update: Any) -> None:
        """Model runner V1, before each forward pass: what has changed in its slots."""
        from vllm.v1.sample.logits_processor import MoveDirectionality

        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._slots.clear(slot)
        for slot, params, prompt, _ in batch_update.added:
            self._slots.put(slot, set_of(params), len(prompt))
        for source, target, direction in batch_update.moved:
            self._slots.move(source, target, direction == MoveDirectionality.SWAP)

    def is_argmax_invariant(self) -> bool:
        return True

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Model runner V2: no request's logits are changed."""
        return False

    def apply(self, logits: Any, *_: Any) -> Any:
        return logits
