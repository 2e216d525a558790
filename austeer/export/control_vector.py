"""``shift`` as a control vector for llama.cpp, which is added to the outputs of decoder layers.

``direction.N`` is for layer N, counted from 0; llama.cpp has none for layer 0.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.demo_model import DEMO, DEMO_ID
from ..models.families import LAYOUTS
from ..models.sites import find_sites, residual_factor, site_at
from ..models.skeleton import load_config, skeleton
from ..models.structure import base_of, name_of, text_config
from ..plans.fit import check_plan_fits, units_by_layer
from ..plans.plan import Plan
from .edits import ExportError, summed, warn_of_another_model
from .gguf_file import add, writing
from .output_files import check_output, staged


def write_control_vector(
    pairs: list[tuple[Plan, float]], model: nn.Module | str | Path, out: str | Path, force: bool
) -> Path:
    """See :func:`austeer.export.gguf.export_gguf`."""
    if isinstance(model, nn.Module):
        network = base_of(model)
        name = name_of(network)
    else:  # its config is enough
        name = DEMO_ID if str(model) == DEMO else str(model)
        network = skeleton(load_config(str(model)), torch.float32)
    directions = _directions(network, pairs)
    out = check_output(out, force, sum(vector.nbytes for vector in directions.values()), file=True)
    warn_of_another_model(pairs, name)
    with staged(out, file=True) as path, writing(path, "controlvector", name, pairs) as writer:
        writer.add_string("controlvector.model_hint", text_config(network).model_type)
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, vector in sorted(directions.items()):
            add(writer, f"direction.{layer}", vector, torch.float32)
    return out


def _directions(network: nn.Module, pairs: list[tuple[Plan, float]]) -> dict[int, Tensor]:
    """What is added to each layer's output: float64 [width]; nothing for layers without AUs."""
    sites = find_sites(network, list(dict.fromkeys(name for plan, _ in pairs for name in plan.sites)))
    found: dict[int, Tensor] = {}
    for plan, _ in pairs:
        check_plan_fits(plan, network, sites)
    for (name, layer), entries in units_by_layer([plan for plan, _ in pairs], sites).items():
        factor = _factor(name, network)
        strengths = summed(entries, pairs)
        vector = found.setdefault(
            layer, torch.zeros(site_at(sites[name], layer).width, dtype=torch.float64, device="cpu")
        )
        vector[strengths.index] += strengths.shift * factor
    if 0 in found:
        raise ExportError(
            "layer 0: found AUs in the first decoder layer, where llama.cpp has no control vector; leave them out "
            "(plan.take), or measure and select other layers"
        )
    return found


def _factor(name: str, network: nn.Module) -> float:
    """What a shift at a site is multiplied by in the layer's output."""
    if name == "layer":
        return 1.0
    config = text_config(network)
    layout = LAYOUTS.get(config.model_type)
    factor = residual_factor(layout, config) if name == "ffn" and layout is not None else None
    if factor is not None:
        return factor
    reason = (
        f"{config.model_type!r} is not known to add the MLP's output to the layer's as it is, or times a number"
        if name == "ffn"
        else "a control vector is added to a decoder layer's output"
    )
    raise ExportError(
        f"site {name!r}: {reason}, so 'shift' there is no control vector; select at 'layer', use "
        "plan.with_operation('scale') for a LoRA adapter, or write a folded checkpoint where the model's config has "
        "biases (austeer export checkpoint) and convert it with llama.cpp's convert_hf_to_gguf.py"
    )
