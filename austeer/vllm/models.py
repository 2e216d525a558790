"""The steered model classes, made when vLLM asks for one: :class:`Steered` mixed into an architecture's own class."""

from __future__ import annotations

import importlib
import logging
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.sites import Fingerprint
from ..plans.serving import KEY, VARIABLE
from .catalog import catalog
from .layers import install
from .plugin import ARCHITECTURES
from .sets import ServingError
from .slots import RowBuffer, slots_of
from .support import check_engine
from .tables import Structure, structure_of

_logger = logging.getLogger("vllm.austeer")


def structure_of_engine(vllm_config: Any) -> Structure:
    """What an engine is made for, by its configuration and AUSTEER_SETS: the same in all of its processes.

    Raises:
        ServingError: AUSTEER_SETS is not set in this process.
        AusteerError: a named plan cannot be read, or is not for this model.
    """
    sets = catalog()
    if sets is None:
        raise ServingError(f"{VARIABLE} is not set in a process of the engine; set it for all of them")
    config = vllm_config.model_config
    text = config.hf_text_config
    widths = {
        "attention": text.num_attention_heads * config.get_head_size(),
        "ffn": text.hidden_size,
        "layer": text.hidden_size,
        "neuron": text.intermediate_size,
    }
    model = Fingerprint(text.model_type, text.num_hidden_layers, widths, str(config.model), None)
    return structure_of(sets, model, vllm_config.scheduler_config.max_num_seqs)


class Steered:
    """Mixed into a vLLM model class; each request is steered by the sets that it names.

    Raises:
        ServingError: the engine was started with something that steering does not go with.
        AusteerError: a plan cannot be read, or is not for this model; before weights are loaded.
    """

    steered_by = KEY

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        check_engine(vllm_config)
        structure = structure_of_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        # vLLM keeps compiled models by a hash of its configuration, in which this is the plugin's part.
        vllm_config.additional_config[KEY] = {"structure": structure.digest()}
        self._steering_slots = slots_of(vllm_config)
        self._steering_rows: RowBuffer | None = None
        self._steering_structure = structure
        self._steering_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._steering_v1 = not vllm_config.use_v2_model_runner
        _logger.info("austeer: %d slots at %d places", structure.slots, len(structure.room))

    def steering_rows(self, device: torch.device) -> RowBuffer:
        """The row buffer; the first call puts the steering on the layers, once the weights are loaded."""
        if self._steering_rows is None:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

            rows = RowBuffer(self._steering_tokens, device)
            part = (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
            decoder = self.model  # type: ignore[attr-defined]
            layers = range(decoder.start_layer, decoder.end_layer)
            tables = install(self, self._steering_structure, layers, rows.tensor, part)  # type: ignore[arg-type]
            self._steering_slots.fill(tables)
            self._steering_rows = rows
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
