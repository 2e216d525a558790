"""A vLLM plugin for steering that no LoRA adapter can carry: ``push`` and ``shift``, the site ``layer``, token scopes.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). What it adds is made of
vLLM's own extension points, and nothing of vLLM is patched:

- an out-of-tree model class (``ModelRegistry.register_model``), the architecture's own with steering at its layers;
- that class's ``ModelState`` (model runner V2), or its forward pass (V1, on CPUs): which request has which tokens;
- a custom logits processor (``--logits-processors``), which leaves logits alone, but whose ``validate_params`` is where
  vLLM lets a plugin refuse a request.

The steering sets are named in the environment variable AUSTEER_SETS (:mod:`austeer.vllm.sets`).
"""

from __future__ import annotations

import os

#: Names the steering sets: JSON, or the path of a JSON file.
VARIABLE = "AUSTEER_SETS"
#: The key of a request's ``extra_args`` (over HTTP: ``vllm_xargs``), with a set's name as its value.
KEY = "austeer"
#: What ``--logits-processors`` is given.
PROCESSOR = "austeer.vllm.requests:Requests"
#: Architectures that can be steered, and the module of vLLM that has each. Their decoder layers return a pair
#: (hidden states, residual) that is not added up yet.
ARCHITECTURES = {
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
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

    from .sets import parse

    parse(value)
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"austeer.vllm.models:{architecture}")
