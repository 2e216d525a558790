"""Model families as data: where each keeps what is steered."""

from __future__ import annotations

from dataclasses import dataclass, replace

Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Attribute paths of a model family. A tuple lists alternatives: the first that a layer has is taken.

    A layer that has none of ``down`` and one of ``experts`` is a mixture of experts.

    Attributes:
        layers: the list of decoder layers, from the language model without its head.
        attention: the attention output projection, from a layer; a layer without one has no such site.
        ffn: the module whose output the feed-forward block adds to the residual stream, from a layer: the MLP module,
            or its down projection where the module adds the residual itself.
        down: the MLP's down projection, from a layer; its output is the output of ``ffn``.
        experts: in a mixture of experts, every module whose output enters the output of ``ffn``, which is their sum
            with any weights: the routed experts' module and the shared experts' down projections. All are taken that
            a layer has.
        shared: the down projection of the shared experts whose output is added as it is, without a gate, from a layer.
        residual: how a layer adds the output of ``ffn`` to what becomes its own output: "as it is", or the name of the
            config's number that it is multiplied by; empty where more is done to it (a norm), or that is not known.
    """

    layers: str
    attention: Paths
    ffn: Paths
    down: Paths = ()
    experts: Paths = ()
    shared: str = ""
    residual: str = ""


def alternatives(paths: Paths) -> tuple[str, ...]:
    """The entry of a layout as a tuple."""
    return (paths,) if isinstance(paths, str) else tuple(paths)


#: A ``residual``: a layer's output is the residual stream plus the output of its feed-forward block.
AS_IT_IS = "as it is"
_LLAMA = Layout(layers="layers", attention="self_attn.o_proj", ffn="mlp", down="mlp.down_proj", residual=AS_IT_IS)
_NORMED = replace(_LLAMA, residual="")
_MOE = replace(
    _LLAMA, experts=("mlp.experts", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj")
)  # dense layers among them have mlp.down_proj
_SHARED = replace(_MOE, shared="mlp.shared_experts.down_proj")

#: Family (``model_type`` of the text config) -> attribute paths.
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            *("cohere", "cohere2", "gemma", "llama", "mistral", "nemotron", "olmo", "phi3", "qwen2"),
            *("qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text", "smollm3", "stablelm"),
        ),
        _LLAMA,
    ),
    # A norm stands between the block and the residual stream.
    **dict.fromkeys(("exaone4", "gemma2", "gemma3_text", "glm4", "olmo2"), _NORMED),
    "granite": replace(_LLAMA, residual="residual_multiplier"),
    **dict.fromkeys(("gpt_oss", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"), _MOE),
    **dict.fromkeys(("deepseek_v3", "ernie4_5_moe", "glm4_moe"), _SHARED),
    # Linear attention in some layers, full attention in others.
    "qwen3_next": replace(_MOE, attention=("self_attn.o_proj", "linear_attn.out_proj")),
    "granitemoe": replace(
        _LLAMA, residual="residual_multiplier", ffn="block_sparse_moe", down=(), experts="block_sparse_moe.experts"
    ),
    "llama4_text": replace(
        _LLAMA,
        ffn="feed_forward",
        down="feed_forward.down_proj",
        experts=("feed_forward.experts", "feed_forward.shared_expert.down_proj"),
        shared="feed_forward.shared_expert.down_proj",
    ),
    "starcoder2": replace(_LLAMA, down="mlp.c_proj"),
    "phi": replace(_LLAMA, attention="self_attn.dense", down="mlp.fc2"),
    "gpt_neox": Layout(
        layers="layers", attention="attention.dense", ffn="mlp", down="mlp.dense_4h_to_h", residual=AS_IT_IS
    ),
    "gpt2": Layout(layers="h", attention="attn.c_proj", ffn="mlp", down="mlp.c_proj", residual=AS_IT_IS),
    "gptj": Layout(layers="h", attention="attn.out_proj", ffn="mlp", down="mlp.fc_out", residual=AS_IT_IS),
    "falcon": Layout(
        layers="h", attention="self_attention.dense", ffn="mlp", down="mlp.dense_4h_to_h", residual=AS_IT_IS
    ),
    # No MLP module: the layer itself runs fc1 and fc2.
    "opt": Layout(layers="layers", attention="self_attn.out_proj", ffn="fc2", down="fc2", residual=AS_IT_IS),
    # The MLP module adds the residual.
    "bloom": Layout(
        layers="h",
        attention="self_attention.dense",
        ffn="mlp.dense_4h_to_h",
        down="mlp.dense_4h_to_h",
        residual=AS_IT_IS,
    ),
    "mpt": Layout(
        layers="blocks", attention="attn.out_proj", ffn="ffn.down_proj", down="ffn.down_proj", residual=AS_IT_IS
    ),
}
