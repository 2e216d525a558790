"""Steering through PEFT: an unmerged LoRA adapter that says exactly what the plan does, as one serves it per request.

Scaling the outputs I of y = W x + b is W + B A with B the one-hot columns of I and A = gamma * W[I], and a bias gamma *
b[I] beside it; scaling the inputs I has B = gamma * W[:, I] and A the one-hot rows of I. Each planned layer has an
adapter of exactly the rank of its AUs, with alpha equal to the rank, so that PEFT's factor is 1; others have none.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from austeer import Plan
from austeer.sites import Site

from ..plain_ways import strengths
from ..steered import Steered, UnavailableError, Way
from .packages import gradient_flags_kept, needed

PIP = "peft"
ADAPTER = "default"


class Peft(Steered):
    """``peft.PeftModel`` with a LoRA on the projection of each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        peft = needed("peft", PIP)
        planned = {_projection(model, site): (site, i, g) for site, i, g in strengths(model, plan, alpha) if len(i)}
        biased = [
            site.side == "output" and model.get_submodule(path).bias is not None
            for path, (site, _, _) in planned.items()
        ]
        if any(biased) and not all(biased):
            raise UnavailableError("peft: found projections with and without bias, expected all or none")
        ranks = {re.escape(path): len(index) for path, (_, index, _) in planned.items()}
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=list(planned),
            r=1,
            rank_pattern=ranks,
            lora_alpha=1,
            alpha_pattern=ranks,
            lora_bias=any(biased),
            inference_mode=True,
        )
        with gradient_flags_kept(model):
            # In another dtype than the model's the adapter would cast at every call.
            super().__init__(peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval())
        for path, (site, index, gamma) in planned.items():
            _write(self.model.get_base_model().get_submodule(path), site, index, gamma)  # type: ignore[operator]


def _projection(model: nn.Module, site: Site) -> str:
    """The path of the linear layer that makes or reads the tensor."""
    module = model.get_submodule(site.projection or site.path)
    if site.projection is None or type(module) is not nn.Linear:
        raise UnavailableError(
            f"peft: found {type(module).__name__} at {site.name} of layer {site.layer}, expected a torch.nn.Linear "
            "that alone makes or reads the tensor; a LoRA says nothing else exactly"
        )
    return site.projection


@torch.no_grad()
def _write(lora: Any, site: Site, index: Tensor, gamma: Tensor) -> None:
    """Fills the adapter of one layer; gamma * W is rounded once."""
    base, down, up = lora.get_base_layer(), lora.lora_A[ADAPTER], lora.lora_B[ADAPTER]
    index, rank = index.to(base.weight.device), torch.arange(len(index), device=base.weight.device)
    gamma = gamma.double().to(base.weight.device)
    down.weight.zero_()  # [rank, inputs]
    up.weight.zero_()  # [outputs, rank]
    if site.side == "output":
        down.weight.copy_(gamma[:, None] * base.weight[index])
        up.weight[index, rank] = 1
    else:
        down.weight[rank, index] = 1
        up.weight.copy_(gamma * base.weight[:, index])
    if up.bias is not None:
        up.bias.zero_()
        up.bias[index] = (gamma * base.bias[index]).to(up.bias.dtype)


WAY = Way("lora", Peft, peer=True)
