"""What plans do to a linear layer as the product of two thin matrices, and a change of its bias.

With gamma at the outputs I and eta at the inputs J of a weight W [outputs, inputs], and e_i the i-th unit vector:

    (1 + gamma) W (1 + eta) - W  =  sum_I e_i (gamma_i W[i, :] (1 + eta))  +  sum_J (eta_j W[:, j]) e_j^T  =  B A

A direction d that is removed alpha times is one more term: with d in the place of both e_i, and -alpha in gamma_i's.

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
    """The inner size of the product: one for each scaled AU and each direction, and at most a matrix's of this size."""
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
    out, out_scales = _vectors(edit.output, outputs)
    into, into_scales = _vectors(edit.input, inputs)
    of_rows = _rows(weight, out)  # [experts, terms, inputs]
    if edit.input is not None:
        of_rows = edit.input.linear(of_rows, -1)
    of_columns = _rows(weight.mT, into).mT * into_scales  # [experts, outputs, terms]
    down = torch.cat([of_rows * out_scales[:, None], into.expand(*experts, -1, -1)], -2)
    up = torch.cat([out.mT.expand(*experts, -1, -1), of_columns], -1)
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


def _vectors(side: Strengths | None, size: int) -> tuple[Tensor, Tensor]:
    """The terms of a side, float64 [terms, size]: unit vectors of the AUs that are scaled, and directions.

    Returns:
        Them, and their factors, float64 [terms].
    """
    if side is None:
        none = torch.zeros(0, size, dtype=torch.float64, device="cpu")
        return none, none[:, 0]
    chosen = side.gamma != 0
    scaled = side.index[chosen]
    vectors = torch.zeros(len(scaled) + len(side.directions), size, dtype=torch.float64, device="cpu")
    vectors[: len(scaled)].scatter_(1, scaled[:, None], 1.0)
    for vector, direction in zip(vectors[len(scaled) :], side.directions):
        vector[direction.index] = direction.values
    alphas = torch.tensor([-direction.alpha for direction in side.directions], dtype=torch.float64, device="cpu")
    return vectors, torch.cat([side.gamma[chosen], alphas])


def _rows(weight: Tensor, vectors: Tensor) -> Tensor:
    """``vectors`` [terms, rows] times ``weight`` [..., rows, columns], in float64, reading the rows they have alone."""
    used = vectors.any(0).nonzero()[:, 0]
    return vectors[:, used] @ weight.index_select(-2, used).double()
