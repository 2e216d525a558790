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
from .plugin import ARCHITECTURES
from .running import Running
from .sets import ServingError
from .slots import judgements, slots_of
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
        vllm_config.additional_config[KEY] = {"structure": structure.digest}
        self._steering_slots = slots_of(vllm_config)
        self._steering_running: Running | None = None
        self._steering_structure = structure
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._steering_sizes = tokens, vllm_config.model_config.get_vocab_size(), judgements(vllm_config)
        self._steering_v1 = not vllm_config.use_v2_model_runner
        _logger.info("austeer: %d slots at %d places", structure.slots, len(structure.room))

    def steering(self, device: torch.device) -> Running:
        """Its steering; the first call puts it on the layers, once the weights are loaded."""
        if self._steering_running is None:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

            decoder = self.model  # type: ignore[attr-defined]
            self._steering_running = Running(
                self,  # type: ignore[arg-type]
                self._steering_structure,
                self._steering_slots,
                range(decoder.start_layer, decoder.end_layer),
                (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()),
                *self._steering_sizes,
                device,
            )
        return self._steering_running

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        running = self.steering(positions.device)
        if self._steering_v1:
            running.prepare(*self._batch(positions), input_ids)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    def _batch(self, positions: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """What model runner V1 is about to run, as :meth:`Slots.batch` takes it; requests are in its slots' order."""
        from vllm.forward_context import get_forward_context

        count, metadata = positions.shape[-1], get_forward_context().attn_metadata
        if not metadata:  # a trial run, of no request
            none = np.zeros(0, dtype=np.int64)
            return none, none, none, count
        bounds = next(iter(metadata.values())).query_start_loc.numpy().astype(np.int64)
        first = positions.numpy()[bounds[:-1].clip(max=count - 1)]
        return np.arange(len(first)), np.diff(bounds), first, count

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
