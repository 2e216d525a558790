"""GGUF files, as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..plans.plan import Plan
from ..version import __version__
from .edits import describe
from .folding import rounded
from .output_files import replay_json


@contextmanager
def writing(path: Path, architecture: str, name: str, pairs: list[tuple[Plan, float]]) -> Iterator[Any]:
    """A ``GGUFWriter`` that says what it was made of; the file is written when the context ends."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_string("austeer.version", __version__)
    writer.add_string("austeer.model", name)
    writer.add_string("austeer.plans", json.dumps(describe(pairs)))
    replay = replay_json(pairs)
    if replay is not None:
        writer.add_string("austeer.replay", replay)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: Any, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raises ExportError where a value is not finite."""
    writer.add_tensor(name, rounded(value, dtype, name).contiguous().numpy())


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
