"""The momentum benchmark's models: the demo's, and random ones of any size with a tokenizer from no download."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from austeer import Pairs
from austeer.errors import ModelError
from austeer.models.load import load_model

from . import pair_sets


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256)
TINY = Shape("tiny Llama", 32, 64, 2, 4, 2, 1024)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of random weights, made on the device."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def trained_tokenizer(pairs: Iterable[Pairs], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learnt from the pairs: texts get about as many tokens as from a real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for some in pairs for pair in some for text in (pair.prompt, pair.positive, pair.negative))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def small(quick: bool, device: torch.device) -> tuple[PreTrainedModel, Any] | None:
    """The demo's model in float32, or a tiny random one with ``quick``; None where the demo's is not installed."""
    if quick:
        model = random_model(TINY, device, torch.float32)
        return model, trained_tokenizer([pair_sets.demo_pairs().pairs], TINY.vocabulary)
    try:
        return load_model("demo", "float32", str(device))
    except ModelError:
        return None
