"""What model runner V2 asks of a steered model between requests and forward passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .requests import row_of


class SteeringState(DefaultModelState):
    """Writes the rows of each batch before its forward pass, which may be the replay of a CUDA graph."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self._slots = model._steering_slots
        self._running = model.steering(device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._slots.put(req_index, row_of(new_req_data.sampling_params), new_req_data.prefill_token_ids or ())

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        count = input_batch.num_reqs
        self._running.prepare(
            input_batch.idx_mapping_np[:count],
            np.diff(input_batch.query_start_loc_np[: count + 1]).astype(np.int64),
            input_batch.num_computed_tokens_np[:count],
            input_batch.num_tokens_after_padding,
            input_batch.input_ids,
        )
        return super().prepare_inputs(input_batch, req_states)
