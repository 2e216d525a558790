"""The steered model classes, made when vLLM asks for one: :class:`Steered` mixed into an architecture's own class."""

from __future__ import annotations

import importlib
import logging
import os
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..plans.serving import KEY, VARIABLE
from .layers import check_fits, install, structure
from .plugin import ARCHITECTURES
from .sets import load, parse, tables
from .slots import RowBuffer, slots_of
from .support import check_engine

_logger = logging.getLogger("vllm.austeer")


class Steered:
    """Mixed into a vLLM model class; each request is steered by the set that it names.

    Raises:
        ServingError: the engine was started with something that steering does not go with.
        AusteerError: a plan cannot be read, or is not for this model; before weights are loaded.
    """

    steered_by = KEY

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        check_engine(vllm_config)
        slots = slots_of(vllm_config)
        specs = parse(os.environ[VARIABLE])
        plans = load(specs)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        text = vllm_config.model_config.hf_text_config
        decoder = self.model  # type: ignore[attr-defined]
        layers = range(decoder.start_layer, decoder.end_layer)
        for name, parts in plans.items():
            for plan, _ in parts:
                check_fits(name, plan, self, text.model_type, layers, text.num_hidden_layers)  # type: ignore[arg-type]
        found = tables(list(plans.values()))
        # vLLM keeps compiled models by a hash of its configuration, in which this is the plugin's part.
        vllm_config.additional_config[KEY] = {"structure": structure(found)}
        self._steering_slots = slots
        self._steering_rows: RowBuffer | None = None
        self._steering_tables = (text.model_type, found, layers)
        self._steering_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._steering_v1 = not vllm_config.use_v2_model_runner
        _logger.info("austeer: steering sets %s at %d sites", ", ".join(specs), len(found))

    def steering_rows(self, device: torch.device) -> RowBuffer:
        """The row buffer; the first call puts the steering on the layers, once the weights are loaded."""
        if self._steering_rows is None:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

            rows = RowBuffer(self._steering_tokens, device)
            part = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
            model_type, found, layers = self._steering_tables
            install(self, model_type, found, layers, rows.tensor, part)  # type: ignore[arg-type]
            self._steering_rows = rows
            del self._steering_tables  # copied to the device
        return self._steering_rows

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        rows = self.steering_rows(positions.device)
        if self._steering_v1:
            rows.write(self._rows_of_batch(positions))
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    def _rows_of_batch(self, positions: Tensor) -> np.ndarray:
        """The row of each token, of what model runner V1 is about to run; requests are in the order of its slots."""
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        if not metadata:  # a trial run, of no request
            return np.full(positions.shape[-1], -1, dtype=np.int32)
        bounds = next(iter(metadata.values())).query_start_loc.numpy().astype(np.int64)
        first = positions.numpy()[bounds[:-1].clip(max=positions.shape[-1] - 1)]
        return self._steering_slots.rows(np.arange(len(first)), np.diff(bounds), first, positions.shape[-1])

    @staticmethod
    def get_model_state_cls() -> type:
        """Asked for by model runner V2."""
        from .state import SteeringState

        return SteeringState


def __getattr__(name: str) -> type:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"vllm.model_executor.models.{ARCHITECTURES[name]}")
    names = {"__module__": __name__, "__qualname__": name, "__doc__": f"{name} of vLLM with steering."}
    globals()[name] = types.new_class(name, (Steered, getattr(module, name)), exec_body=lambda ns: ns.update(names))
    return globals()[name]
