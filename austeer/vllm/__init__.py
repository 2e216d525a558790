"""A plugin for vLLM: each request is steered by the plans that it names, at its own strength.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). What it adds is made of
vLLM's own extension points, and nothing of vLLM is patched:

- an out-of-tree model class (``ModelRegistry.register_model``), the architecture's own with steering at its layers;
- that class's ``ModelState`` (model runner V2), or its forward pass (V1, on CPUs): which request has which tokens;
- a scheduler (``--scheduler-cls``), vLLM's own, which gives requests their rows and their place in the prefix cache;
- a custom logits processor (``--logits-processors``), which leaves logits alone, but whose ``validate_params`` is where
  vLLM lets a plugin refuse a request; and a middleware (``--middleware``) that refuses over HTTP.

The steering sets are named in the environment variable AUSTEER_SETS (:mod:`austeer.vllm.sets`).
"""

from typing import Any

from ..plans.serving import ALPHA, KEY, KL, MIDDLEWARE, PROCESSOR, SCHEDULER, VARIABLE
from .plugin import ARCHITECTURES, register

#: What ``vllm.LLM`` is given for it; a server has ``--middleware`` as well (``austeer serve``).
OPTIONS: dict[str, Any] = {"logits_processors": [PROCESSOR], "scheduler_cls": SCHEDULER}

__all__ = [
    "ALPHA",
    "ARCHITECTURES",
    "KEY",
    "KL",
    "MIDDLEWARE",
    "OPTIONS",
    "PROCESSOR",
    "SCHEDULER",
    "VARIABLE",
    "register",
]
