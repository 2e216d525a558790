"""A plugin for vLLM: steering that no LoRA adapter can carry.

That is ``push`` and ``shift``, the site ``layer``, and token scopes.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). What it adds is made of
vLLM's own extension points, and nothing of vLLM is patched:

- an out-of-tree model class (``ModelRegistry.register_model``), the architecture's own with steering at its layers;
- that class's ``ModelState`` (model runner V2), or its forward pass (V1, on CPUs): which request has which tokens;
- a custom logits processor (``--logits-processors``), which leaves logits alone, but whose ``validate_params`` is where
  vLLM lets a plugin refuse a request.

The steering sets are named in the environment variable AUSTEER_SETS (:mod:`austeer.vllm.sets`).
"""

from ..plans.serving import KEY, PROCESSOR, VARIABLE
from .plugin import ARCHITECTURES, register

__all__ = ["ARCHITECTURES", "KEY", "PROCESSOR", "VARIABLE", "register"]
