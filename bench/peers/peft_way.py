"""Steering through PEFT: an unmerged LoRA adapter that says exactly what the plan does, as one serves it per request.

The adapter is that of ``austeer.export_lora``, with the rank of its AUs in each planned layer and none in others.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from austeer import Plan
from austeer.export import export_lora
from austeer.models.sites import Site

from ..plain_ways import strengths
from ..steered import Steered, UnavailableError, Way
from .packages import gradient_flags_kept, needed

PIP = "peft"


class Peft(Steered):
    """``peft.PeftModel`` with a LoRA on the projection of each layer that has AUs."""

    def __init__(self, model: nn.Module, plan: Plan, alpha: float):
        peft = needed("peft", PIP)
        biased = [_scales_bias(model, site) for site, index, _ in strengths(model, plan, alpha) if len(index)]
        with TemporaryDirectory(prefix="austeer-") as folder, gradient_flags_kept(model):
            adapter = export_lora(
                *(plan, model, Path(folder) / "adapter"),
                alpha=alpha,
                rank_pattern=True,
                lora_bias=any(biased),
                progress=False,
            )
            # In another dtype than the model's the adapter would cast at every call.
            super().__init__(peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).eval())


def _scales_bias(model: nn.Module, site: Site) -> bool:
    """Whether a bias is scaled with the tensor that the one linear layer makes or reads."""
    module = model.get_submodule(site.projection or site.path)
    if site.projection is None or type(module) is not nn.Linear:
        raise UnavailableError(
            f"peft: found {type(module).__name__} at {site.name} of layer {site.layer}, expected a torch.nn.Linear "
            "that alone makes or reads the tensor; a LoRA says nothing else exactly"
        )
    return site.side == "output" and module.bias is not None


WAY = Way("lora", Peft, peer=True)
