"""What counts as a linear layer here, and which dimension of its weight is which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

#: Subclasses of ``nn.Linear`` whose forward was read: the same product, written another way.
_PLAIN_SUBCLASSES = {"transformers.models.falcon.modeling_falcon.FalconLinear"}

#: GPT-2's linear layer keeps its weight as [in, out].
_TRANSPOSED = {"transformers.pytorch_utils.Conv1D"}

#: Quantised linear layers whose forward was read: the bias is added to the product, in the activations' dtype.
_QUANTISED = {"bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"}

#: Experts modules whose forward was read and which do not say their orientation: weights [experts, in, out], no bias.
_TRANSPOSED_EXPERTS = {"transformers.models.llama4.modeling_llama4.Llama4TextExperts"}

#: Ways in which transformers runs an experts module; all of them multiply by ``down_proj`` as it is stored.
_EXPERTS_IMPLEMENTATIONS = (None, "eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")


@dataclass(frozen=True)
class WeightNames:
    """Where a module keeps its weight and bias.

    Attributes:
        weight, bias: names of its parameters; a bias counts the outputs in its last dimension.
        output, input: the dimensions of the weight that count the outputs and the inputs.
    """

    weight: str
    bias: str | None
    output: int
    input: int


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, also of a quantised or wrapped one; None of anything else."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the second is GPT-2's
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def weights_of(module: nn.Module) -> WeightNames | str:
    """The weights of a linear layer, or of the down projections of a set of experts; or why they are not known."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind.__name__} is compiled by TorchScript"
    if kind is nn.Linear or name in _PLAIN_SUBCLASSES:
        return WeightNames("weight", "bias", 0, 1)
    if name in _TRANSPOSED:
        return WeightNames("weight", "bias", 1, 0)
    down = module._parameters.get("down_proj")
    if not isinstance(down, torch.Tensor) or down.dim() != 3:
        return f"{kind.__name__} is not a plain linear layer"
    if name in _TRANSPOSED_EXPERTS:
        return WeightNames("down_proj", None, 2, 1)
    # Set by transformers' @use_experts_implementation. The shape would not tell where width and inner width are equal.
    transposed, biased = getattr(module, "is_transposed", None), getattr(module, "has_bias", None)
    if not kind.__module__.startswith("transformers.models.") or transposed is None or biased is None:
        return f"{kind.__name__}'s computation is not known"
    if getattr(module, "has_post_expert_norm", False) or hasattr(module, "post_expert_norm"):
        return f"{kind.__name__} normalises what its experts make"
    if getattr(module, "_is_expert_parallel", False):
        return "the experts are spread over processes"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in _EXPERTS_IMPLEMENTATIONS:
        return f"the experts run as {implementation!r}, which is not known"
    return WeightNames("down_proj", "down_proj_bias" if biased else None, *((2, 1) if transposed else (1, 2)))


def bias_owner(module: nn.Module, side: str) -> nn.Module | str:
    """The module that adds ``bias``, where it has one, to the product of a linear layer; or why none is known to.

    Args:
        side: "output": what is added to the layer's output, which an adapter and a quantised weight leave as it is.
            "input": what its weight makes of an addition to its input, so it has to be a plain one.
    """
    if side == "output" and type(module).__module__.startswith("peft.tuners.lora"):
        module = getattr(module, "base_layer", module)
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if side == "output" and kind in _QUANTISED:
        return module
    if not isinstance(found := weights_of(module), WeightNames):
        return found
    weight: object = module._parameters.get("weight")
    if found.weight != "weight":
        return f"{type(module).__name__} is no linear layer"
    quantised = side == "output" and type(weight).__module__.startswith("torchao.")
    if weight is not None and type(weight) is not nn.Parameter and not quantised:
        return f"the weight is a {type(weight).__name__}"
    return module


def bias_of_shift(index: Tensor, shift: Tensor, outputs: int, weight: Tensor | None = None, inputs: int = 1) -> Tensor:
    """What a shift of some outputs, or of some inputs, of a linear layer adds to its bias: s, or W s.

    Args:
        index, shift: int and floating-point [count], the AUs, distinct, and what is added to each.
        outputs: of the layer. weight: for a shift of its inputs; None for one of its outputs.
        inputs: the dimension of the weight that counts them.

    Returns:
        [outputs], in the shift's dtype: where the weight is, or the shift.
    """
    if weight is None:
        return shift.new_zeros(outputs).index_copy_(0, index.long().to(shift.device), shift)
    some = shift != 0  # 0 * inf is NaN
    index, shift = index[some.to(index.device)], shift[some]
    columns = weight.index_select(inputs, index.long().to(weight.device)).to(shift.dtype).movedim(inputs, -1)
    with torch.autocast(weight.device.type, enabled=False):  # it would make the product in half precision
        return columns @ shift.to(columns.device)  # [outputs, AUs] @ [AUs]


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
