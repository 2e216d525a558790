"""The files of a LoRA adapter as PEFT has them: names, shapes and config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.linear import WeightNames, weights_of
from ..models.sites import find_sites
from . import factors
from .edits import Edit
from .model_weights import ModelWeights

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: Where PEFT has the model that it wraps.
PREFIX = "base_model.model."
#: In models with mixtures, PEFT takes modules of these names for experts of a checkpoint in an older format.
_TAKEN_FOR_EXPERTS = ("down_proj", "w2")


@dataclass(frozen=True)
class AdapterLayer:
    """A layer of the adapter.

    Attributes:
        path: the module's. names: of its parameters. edit: what is done to it; None: nothing.
        rank: that the adapter has there.
        parameter: whether PEFT is told the parameter's name, as it has to be for experts, and not the module's.
    """

    path: str
    names: WeightNames
    edit: Edit | None
    rank: int
    parameter: bool

    @property
    def experts(self) -> bool:
        return self.edit is not None and self.edit.experts

    @property
    def key(self) -> str:
        """What it is called in PEFT's config."""
        return f"{self.path}.{self.names.weight}" if self.parameter else self.path


def target_of(network: nn.Module, path: str, edit: Edit | None, rank: int) -> AdapterLayer:
    """The layer at ``path``, which is known to be a linear one, or a set of experts."""
    names = weights_of(network.get_submodule(path))
    assert isinstance(names, WeightNames)
    experts = edit is not None and edit.experts
    return AdapterLayer(path, names, edit, rank, experts or taken_for_experts(network, path))


def taken_for_experts(network: nn.Module, path: str) -> bool:
    """Whether PEFT would look for the module among experts if it were told its name."""
    return path.rpartition(".")[2] in _TAKEN_FOR_EXPERTS and any(
        site.projection is None for site in find_sites(network, "ffn")["ffn"]
    )


def tensors_of(weights: ModelWeights, target: AdapterLayer, lora_bias: bool) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors by their names in PEFT, in float64, padded with zeros to the rank."""
    inputs, outputs = factors.sizes(weights.network, target.path, target.names)
    if target.edit is None:
        down = torch.zeros(target.rank, inputs, dtype=torch.float64, device="cpu")
        up = torch.zeros(outputs, target.rank, dtype=torch.float64, device="cpu")
    else:
        down, up = factors.product(weights, target.edit, target.rank)
    if target.experts:
        down, up = _as_parameter(weights.network.get_submodule(target.path), target.names, down, up)
    yield "lora_A.weight", down
    yield "lora_B.weight", up
    if lora_bias:
        none = torch.zeros(outputs, dtype=torch.float64, device="cpu")
        yield "lora_B.bias", none if target.edit is None else factors.bias_change(weights, target.edit)


def _as_parameter(module: nn.Module, names: WeightNames, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Experts as PEFT has an adapter of a parameter: A [experts * rank, inputs] and B [outputs, rank * experts].

    PEFT takes the parameter for [experts, outputs, inputs] unless the module says ``is_transposed``, and adds the
    transposed product if it does; what matters is that the sum is right as the parameter is stored.
    """
    stored_transposed = names.output > names.input
    if stored_transposed != bool(getattr(module, "is_transposed", False)):
        down, up = up.mT, down.mT
    return down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)


def config_of(weights: ModelWeights, targets: Sequence[AdapterLayer], lora_bias: bool) -> dict[str, Any]:
    """PEFT's ``LoraConfig``; its defaults are written out where engines read them."""
    network = weights.network
    # Engines that know one rank take the largest, of which the factor is 1, too.
    rank = max(target.rank for target in targets)
    patterns = {target.key: target.rank for target in targets if target.rank != rank}
    parameters = [target.key for target in targets if target.parameter]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if _generates(network) else "FEATURE_EXTRACTION",
        "base_model_name_or_path": weights.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # Whole paths: PEFT then touches no layer that only has the same name, a vision tower's, say.
        "target_modules": [target.key for target in targets if not target.parameter],
        "fan_in_fan_out": any(target.names.output > target.names.input for target in targets if not target.parameter),
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if lora_bias:
        config["lora_bias"] = True
    if parameters:
        config["target_parameters"] = parameters
    return config


def _generates(network: nn.Module) -> bool:
    head = getattr(network, "get_output_embeddings", None)
    return head is not None and head() is not None
