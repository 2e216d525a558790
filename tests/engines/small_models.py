"""Small random models that vLLM runs."""

from __future__ import annotations

import torch


def small_model(family: str, tokenizer, folder):
    """A random model that reads the demo's token ids, saved. vLLM's attention on CPUs needs heads of 32 at least."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that are all alike would let steering vanish in them
            torch.nn.init.normal_(parameter, 0.3, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder
