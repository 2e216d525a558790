"""What vLLM and our plugin in it call things: constants that a plan's card, the export and the plugin share."""

from __future__ import annotations

#: Names the steering sets: a folder that is watched, a JSON file, or JSON.
VARIABLE = "AUSTEER_SETS"

#: Keys of a request's ``extra_args`` (over HTTP: ``vllm_xargs``): the names of sets, and how strongly.
KEY = "austeer"
ALPHA, KL = f"{KEY}_alpha", f"{KEY}_kl"

#: What ``--logits-processors``, ``--scheduler-cls`` and ``--middleware`` are given.
PROCESSOR = "austeer.vllm.requests:Requests"
SCHEDULER = "austeer.vllm.scheduler.steering_scheduler"
MIDDLEWARE = "austeer.vllm.http.Refusals"

#: What vLLM's --max-lora-rank takes, and what it is by itself.
VLLM_RANKS, VLLM_DEFAULT_RANK = (8, 16, 32, 64, 128, 256, 320, 512), 16


def vllm_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM that is enough; None if there is none."""
    return next((one for one in VLLM_RANKS if one >= rank), None)
