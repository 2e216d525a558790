"""Requests at vLLM's edges: refused in the front end, and put into their slots in the engine."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from ..plans.serving import KEY, VARIABLE
from .admission import ROW, checked
from .plugin import ARCHITECTURES
from .sets import ServingError
from .slots import RowOf, slots_of


def row_of(params: Any) -> RowOf | None:
    """The row that the scheduler gave a request, by its parameters."""
    return None if params is None else (params.extra_args or {}).get(ROW)


class Requests(ProcessorV1, ProcessorV2):
    """A custom logits processor that leaves logits alone: named with --logits-processors, for both model runners.

    In the process that takes requests it refuses what they cannot have; in the engine it refuses to start on a model
    that is not steered, and model runner V1 tells it which request is in which slot.
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
        """Raises ValueError, which becomes an HTTP 400, where a request asks for what it cannot have."""
        checked(sampling_params.extra_args)

    def update_state(self, batch_update: Any) -> None:
        """Model runner V1, before each forward pass: what has changed in its slots."""
        from vllm.v1.sample.logits_processor import MoveDirectionality

        if batch_update is None:
            return
        for slot in batch_update.removed:
            self._slots.clear(slot)
        for slot, params, prompt, generated in batch_update.added:
            self._slots.put(slot, row_of(params), [*(prompt or ()), *generated])
        for source, target, direction in batch_update.moved:
            self._slots.move(source, target, direction == MoveDirectionality.SWAP)

    def is_argmax_invariant(self) -> bool:
        return True

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Model runner V2: no request's logits are changed."""
        return False

    def apply(self, logits: Any, *_: Any) -> Any:
        return logits
