"""GGUF files, as llama.cpp reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..plans.plan import Plan
from .edits import ExportError, describe


def writer_of(path: Path, architecture: str, name: str, pairs: list[tuple[Plan, float]]) -> Any:
    """A ``GGUFWriter`` that says what it was made of."""
    from gguf import GGUFWriter

    from ..version import __version__

    writer = GGUFWriter(path, architecture)
    writer.add_string("austeer.version", __version__)
    writer.add_string("austeer.model", name)
    writer.add_string("austeer.plans", json.dumps(describe(pairs)))
    return writer


def add(writer: Any, name: str, value: Tensor) -> None:
    """Raises ExportError where a value is not finite."""
    if not value.isfinite().all():
        raise ExportError(f"{name}: found a value that is no finite {value.dtype} number; take a smaller alpha")
    writer.add_tensor(name, value.contiguous().numpy())


def finish(writer: Any) -> None:
    """Writes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


#: ``model_type`` of the text config -> ``general.architecture``; conversion leaves their projections' weights as they
#: are, or turns them from [in, out] to [out, in].
_SAME = (
    *("bloom", "cohere2", "exaone4", "falcon", "gemma", "gemma2", "glm4", "gpt2", "granite"),
    *("granitemoe", "llama", "mpt", "nemotron", "olmo", "olmo2", "olmoe", "phi3", "phimoe", "qwen2"),
    *("qwen3", "smollm3", "stablelm", "starcoder2"),
)
ARCHITECTURES = {name: name for name in _SAME} | {
    "cohere": "command-r",
    "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe",
    "gemma3_text": "gemma3",
    "glm4_moe": "glm4moe",
    "gpt_neox": "gptneox",
    "gpt_oss": "gpt-oss",
    "llama4_text": "llama4",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen2_moe": "qwen2moe",
    "qwen2_vl_text": "qwen2vl",
    "qwen3_moe": "qwen3moe",
    "qwen3_vl_text": "qwen3vl",
}
