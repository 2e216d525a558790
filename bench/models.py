"""The momentum benchmark's small model, and a tokenizer for random models from no download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from austeer import Pairs
from austeer.models import ModelError, load_model

from . import pair_sets, shapes


def trained_tokenizer(pairs: Iterable[Pairs], vocabulary: int) -> PreTrainedTokenizerFast:
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
        model = shapes.build(shapes.tiny(shapes.LLAMA_8B), device, torch.float32)
        return model, trained_tokenizer([pair_sets.demo_pairs().pairs], model.config.vocab_size)
    try:
        return load_model("demo", "float32", str(device))
    except ModelError:
        return None
