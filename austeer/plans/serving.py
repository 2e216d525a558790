"""What vLLM and our plugin in it call things: constants that a plan's card, the export and the plugin share."""

from __future__ import annotations

#: Names the steering sets: JSON, or the path of a JSON file.
VARIABLE = "AUSTEER_SETS"

#: The key of a request's ``extra_args`` (over HTTP: ``vllm_xargs``), with a set's name as its value.
KEY = "austeer"

#: What ``--logits-processors`` is given.
PROCESSOR = "austeer.vllm.requests:Requests"

#: What vLLM's --max-lora-rank takes, and what it is by itself.
VLLM_RANKS, VLLM_DEFAULT_RANK = (8, 16, 32, 64, 128, 256, 320, 512), 16


def vllm_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM that is enough; None if there is none."""
    return next((one for one in VLLM_RANKS if one >= rank), None)
