"""What plans do to a linear layer as the product of two thin matrices, and a change of its bias.

With gamma at the outputs I and eta at the inputs J of a weight W [outputs, inputs], and e_i the i-th unit vector:

    (1 + gamma) W (1 + eta) - W  =  sum_I e_i (gamma_i W[i, :] (1 + eta))  +  sum_J (eta_j W[:, j]) e_j^T  =  B A

Everything is computed in float64; what is written is rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..models.linear import WeightNames
from .edits import Edit, Strengths
from .folding import steered_bias
from .model_weights import ModelWeights


def sizes(network: nn.Module, path: str, names: WeightNames) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, or of each of a set of experts."""
    shape = getattr(network.get_submodule(path), names.weight).shape
    return shape[names.input], shape[names.output]


def numbers(network: nn.Module, path: str, names: WeightNames, rank: int) -> int:
    """How many the two matrices of a layer have, those of all experts together."""
    *experts, outputs, inputs = getattr(network.get_submodule(path), names.weight).shape
    return math.prod(experts) * rank * (outputs + inputs)


def rank_of(network: nn.Module, edit: Edit) -> int:
    """The inner size of the product: one for each scaled AU, and no more than a matrix of its size can have."""
    return min(edit.rank, *sizes(network, edit.path, edit.weights))


def changes_bias(network: nn.Module, edit: Edit) -> bool:
    """Whether something is added to the layer's output besides the product."""
    bias = edit.weights.bias and getattr(network.get_submodule(edit.path), edit.weights.bias, None)
    return edit.shifts or (edit.output is not None and bias is not None)


def product(weights: ModelWeights, edit: Edit, rank: int) -> tuple[Tensor, Tensor]:
    """The change of a weight, its dimensions as ``nn.Linear`` has them.

    Args:
        rank: of the result, at least :func:`rank_of` the edit; zeros fill it up.

    Returns:
        A float64 [rank, inputs] and B float64 [outputs, rank]; of experts [experts, rank, inputs] and
        [experts, outputs, rank].
    """
    names = edit.weights
    weight = weights.get(f"{edit.path}.{names.weight}")
    if names.output > names.input:
        weight = weight.mT
    *experts, outputs, inputs = weight.shape
    rows, row_scales = _scaled(edit.output)
    columns, column_scales = _scaled(edit.input)
    of_rows = weight.index_select(-2, rows).double()
    of_rows[..., columns] *= 1 + column_scales
    of_columns = weight.index_select(-1, columns).double() * column_scales
    down = torch.cat([of_rows * row_scales[:, None], _unit(columns, inputs).expand(*experts, -1, -1)], -2)
    up = torch.cat([_unit(rows, outputs).mT.expand(*experts, -1, -1), of_columns], -1)
    if down.shape[-2] > min(outputs, inputs):
        change = up @ down
        unit = torch.eye(min(outputs, inputs), dtype=torch.float64, device="cpu").expand(*experts, -1, -1)
        down, up = (unit, change) if inputs <= outputs else (change, unit)
    missing = rank - down.shape[-2]
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


def bias_change(weights: ModelWeights, edit: Edit) -> Tensor:
    """What is added to the output of a layer that is no set of experts, besides the product: float64 [outputs].

    The steered bias less the bias that there was.
    """
    weight = weights.get(f"{edit.path}.{edit.weights.weight}")
    bias = weights.optional(f"{edit.path}.{edit.weights.bias}" if edit.weights.bias else None)
    steered = steered_bias(edit, weight, bias)
    return steered if bias is None else steered - bias.double()


def _scaled(side: Strengths | None) -> tuple[Tensor, Tensor]:
    """The AUs that are scaled, and by how much."""
    if side is None:
        return torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, dtype=torch.float64, device="cpu")
    chosen = side.gamma != 0
    return side.index[chosen], side.gamma[chosen]


def _unit(index: Tensor, size: int) -> Tensor:
    """Unit vectors: float64 [count, size]."""
    return torch.zeros(len(index), size, dtype=torch.float64, device="cpu").scatter_(1, index[:, None], 1.0)
