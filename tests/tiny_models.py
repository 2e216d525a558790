"""Tiny random models of every family: two to four layers, built in milliseconds, no download.

Weights are larger than a fresh model's and biases are not zero, so that a mistake in either shows in the logits.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from austeer.models.families import LAYOUTS

#: For every family that has them under these names.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not hidden_size / heads, so that the attention site is wider than the others where it can be
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
_QWEN_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}

#: What a family calls its sizes, or needs beside them.
CHANGES: dict[str, dict] = {
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "deepseek_v3": {
        **_ROUTED,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "head_dim": 4,  # what its rotary embedding reads
        "v_head_dim": 12,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 24,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "exaone4": {"sliding_window": 8},
    "falcon": {"num_kv_heads": 4, "ffn_hidden_size": 48},
    "glm4_moe": {**_ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_oss": _EXPERTS,
    "granitemoe": _EXPERTS,
    "llama4_text": {
        **_EXPERTS,
        "intermediate_size_mlp": 40,
        "moe_layers": [1],
        "attention_chunk_size": 16,
    },
    "mixtral": _EXPERTS,
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 128},
    "olmoe": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phimoe": _EXPERTS,
    "qwen2_moe": {**_ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]},
    "qwen3_moe": {**_ROUTED, "num_local_experts": 4, "mlp_only_layers": [0]},
    "qwen3_next": {
        **_ROUTED,
        "num_experts": 4,
        "shared_expert_intermediate_size": 20,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "stablelm": {"head_dim": 8},
}

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_SHARED_MLP = {"shared_intermediate_size": 16}

#: Families outside the table in which some layers, or all, are no attention: no or few keys and values to cache.
HYBRIDS: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1], **_MAMBA2},
    "falcon_h1": {"mamba_d_ssm": 64, **_MAMBA2},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], **_MAMBA2, **_EXPERTS, **_SHARED_MLP},
    "jamba": {
        **{"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
        **{"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8},
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], **_EXPERTS},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 4, "mamba_head_dim": 16},
        **{"ssm_state_size": 8, "n_groups": 1},
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "recurrent_gemma": {
        **{"lru_width": 32, "block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 64},
    },
    "rwkv": {"context_length": 64},
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "num_mem_blocks": 1},
        **{"mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_d_state": 8},
    },
}

#: Families whose language model lies beside a vision tower: how the whole is configured around the text sizes.
MULTIMODAL: dict[str, dict] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text"},
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 28, "patch_size": 14},
        "image_token_index": 60,
    },
    "qwen2_5_vl": {
        "text_config": {"head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        **_QWEN_TOKENS,
    },
    "qwen2_vl": {
        "text_config": {"head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
        **_QWEN_TOKENS,
    },
}


#: Families that are only there inside a multimodal model.
INSIDE = {f"{family}_text": family for family in ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")}

#: Every family that can be built: those of the table, and multimodal models around them.
FAMILIES = [*(family for family in LAYOUTS if family not in INSIDE), *MULTIMODAL]


#: Families whose layers take no tree: no attention, or positions counted along the row inside it.
NO_TREE = ("bloom", "mpt", "qwen3_next")

_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}

#: Windows and chunks far shorter than the texts of tests.
NARROW = {
    **dict.fromkeys(("cohere2", "exaone4", "gemma2", "gemma3", "gemma3_text", "gpt_oss"), _MIXED),
    **dict.fromkeys(
        ("qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl", "qwen3", "smollm3"), _MIXED | {"use_sliding_window": True}
    ),
    **{key: {"sliding_window": 6} for key in ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")},
    "qwen3_moe": {"sliding_window": 6, "use_sliding_window": True},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 6,
    },
}


def tiny_model(family: str = "llama", **changes) -> PreTrainedModel:
    """A random model of ``family`` (a ``model_type``) in evaluation mode; the same one each time.

    Args:
        changes: of its (text) config.
    """
    sizes = SIZES | CHANGES.get(family, {}) | HYBRIDS.get(family, {})
    if family == "falcon":  # computes it, and lets nobody set it
        del sizes["head_dim"]
    torch.manual_seed(0)
    family = INSIDE.get(family, family)
    if family in MULTIMODAL:
        parts = dict(MULTIMODAL[family])
        parts["text_config"] = sizes | parts["text_config"] | changes
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts))
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | changes)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:  # fresh models start close to the identity, where steering would change nothing
                p.normal_(std=0.2)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
    return model.eval()


def wide_model(family: str = "llama") -> PreTrainedModel:
    """The same in float64, which the grouped products of experts do not have."""
    model = tiny_model(family).double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def ids_of_rows(rows=2, length=7):
    """Token ids without a special one."""
    ids = torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def left_padded(texts):
    """Rows of unlike length, padded on the left."""
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (length - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}
