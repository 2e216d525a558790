"""vLLM's way in: the entry point that it calls in each of its processes, and the architectures that it can steer."""

from __future__ import annotations

import os

from ..plans.serving import VARIABLE
from .sets import parse
from .shared import shared_folder

#: Architectures that can be steered, and the module of vLLM that has each. Their decoder layers return a pair
#: (hidden states, residual) that is not added up yet.
ARCHITECTURES = {
    f"{name}ForCausalLM": name.lower()
    for name in ("Gemma", "Gemma2", "Gemma3", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3")
}


def register() -> None:
    """Puts the steered model classes into vLLM's registry, by name: nothing is imported until one is used.

    Does nothing where AUSTEER_SETS is not set.

    Raises:
        ServingError: AUSTEER_SETS cannot be read.
    """
    value = os.environ.get(VARIABLE)
    if value is None:
        return
    from vllm import ModelRegistry

    parse(value)
    shared_folder()  # before other processes are started
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"austeer.vllm.models:{architecture}")
