"""Models of random weights in the shapes of published ones, made straight on a device: no download, no checkpoint.

Sizes and settings are those of the published ``config.json`` files; what a decoder layer computes, moves and launches
depends on them alone, and not on the weights' values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from austeer.errors import AusteerError
from austeer.utils.machine import free_memory

GIB = 1 << 30
#: Beside the weights: caches, graphs and adapters of every way to steer, logits in float64, libraries' workspaces.
ROOM = 6 * GIB


class TooLargeError(AusteerError):
    """A model for which a device has not enough free memory; nothing was made."""


@dataclass(frozen=True)
class ModelShape:
    """A published model's architecture.

    Attributes:
        name: the published one's. model_type, values: of its Transformers config.
        parameters: how many, as published. room: bytes to be free beside the weights.
    """

    name: str
    model_type: str
    parameters: int
    values: Mapping[str, Any] = field(hash=False)
    room: int = ROOM

    def config(self) -> Any:
        """A Transformers config, new each time."""
        return AutoConfig.for_model(self.model_type, **self.values)

    def needed(self, dtype: torch.dtype) -> int:
        """Bytes that have to be free before it is made."""
        return self.parameters * dtype.itemsize + self.room


#: What every shape says, in this order, before what its architecture adds.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "rms_norm_eps")


def _shape(name: str, kind: str, parameters: int, sizes: tuple[float, ...], theta: float, **more: Any) -> ModelShape:
    rope = {"rope_theta": theta, "rope_type": "default"} | more.pop("rope", {})
    values = {**dict(zip(SIZES, sizes, strict=True)), "rope_parameters": rope, "tie_word_embeddings": False, **more}
    return ModelShape(name, kind, parameters, values)


_LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_ROPE["original_max_position_embeddings"] = 8192

LLAMA_8B = _shape(
    *("Llama-3.1-8B", "llama", 8_030_261_248),
    (128256, 4096, 14336, 32, 32, 8, 131072, 128000, 128001, 1e-5),
    theta=5e5,
    rope=_LLAMA3_ROPE,
)
QWEN3_8B = _shape(
    *("Qwen3-8B", "qwen3", 8_190_735_360),
    (151936, 4096, 12288, 36, 32, 8, 40960, 151643, 151645, 1e-6),
    theta=1e6,
    head_dim=128,
)
GEMMA2_9B = _shape(
    *("Gemma2-9B", "gemma2", 9_241_705_984),
    (256000, 3584, 14336, 42, 16, 8, 8192, 2, 1, 1e-6),
    theta=1e4,
    **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "pad_token_id": 0},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"},
    tie_word_embeddings=True,
)
QWEN3_30B_A3B = _shape(
    *("Qwen3-30B-A3B", "qwen3_moe", 30_532_122_624),
    (151936, 2048, 6144, 48, 32, 4, 40960, 151643, 151645, 1e-6),
    theta=1e6,
    **{"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    **{"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
)
QWEN25_32B = _shape(
    *("Qwen2.5-32B", "qwen2", 32_763_876_352),
    (152064, 5120, 27648, 64, 40, 8, 131072, 151643, 151643, 1e-5),
    theta=1e6,
    **{"max_window_layers": 64, "use_sliding_window": False},
)
#: In the order in which they are measured: what matters most, and takes least memory, comes first.
SHAPES = {shape.name: shape for shape in (LLAMA_8B, QWEN3_8B, GEMMA2_9B, QWEN3_30B_A3B, QWEN25_32B)}

#: Of every tiny model. Heads are such that the attention site is wider than the others, as Gemma2's is.
_TINY = {
    "vocab_size": 1024,  # of bytes, and of what a tokenizer learns from a few pairs
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TINY_OF = {
    "llama": {"head_dim": 8},
    "qwen2": {"max_window_layers": 2},
    "qwen3_moe": {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
}


def tiny(shape: ModelShape, **sizes: int) -> ModelShape:
    """The same architecture with two narrow layers, for a CPU; or with other ``sizes``."""
    values = {**shape.values, **_TINY, **_TINY_OF.get(shape.model_type, {}), **sizes}
    if shape.model_type == "qwen2":  # has no such setting
        del values["head_dim"]
    small = replace(shape, name=f"tiny {shape.name}", values=values, parameters=0, room=0)
    return replace(small, parameters=count(small))


def count(shape: ModelShape) -> int:
    """The number of parameters, from a model without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape.config()).num_parameters()


def check_memory(shape: ModelShape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Before a model is made.

    Raises:
        TooLargeError: less memory is free than it needs.
    """
    needed, free = shape.needed(dtype), free_memory(device)
    if needed > free:
        raise TooLargeError(
            f"{shape.name}: needs {needed / 1e9:.1f} GB ({shape.parameters / 1e9:.2f}e9 weights in "
            f"{str(dtype).removeprefix('torch.')}, and {shape.room / 1e9:.1f} GB beside them), found {free / 1e9:.1f} "
            f"GB free on {device}; take a device with more memory"
        )


def build(shape: ModelShape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model of random weights, the same ones each time, in evaluation mode.

    Raises:
        TooLargeError: see :func:`check_memory`.
    """
    check_memory(shape, device, dtype)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(), dtype=dtype).eval()
