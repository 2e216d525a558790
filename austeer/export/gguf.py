"""Plan -> GGUF for llama.cpp: a LoRA adapter (``--lora``) of what scales, a control vector of what shifts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.sites import find_sites
from ..models.structure import text_config
from ..plans.plan import Plan
from ..utils.progress import Progress
from . import factors
from .control_vector import write_control_vector
from .edits import Alpha, Edit, ExportError, edits_of, warn_of_another_model, with_alphas
from .gguf_file import ARCHITECTURES, add, writing
from .model_weights import weights_of_model
from .output_files import check_output, staged

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def export_gguf(
    plans: Plan | Sequence[Plan | tuple[Plan, Alpha]],
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    alpha: Alpha | None = None,
    kl: float | None = None,
    dtype: str = "float32",
    architecture: str | None = None,
    force: bool = False,
    progress: bool | None = None,
) -> Path:
    """Writes plans as a GGUF file for llama.cpp, which serves it beside any quantisation of the model.

    Plans whose operation is ``scale`` or ``ablate`` become a LoRA adapter: ``llama-server -m MODEL.gguf --lora FILE``.
    ``shift`` at the site ``layer``, or at ``ffn`` where the layer adds the MLP's output as it is or times a number,
    becomes a control vector: ``llama-server -m MODEL.gguf --control-vector FILE``. Both take a scale at run time that
    multiplies alpha (``--lora-scaled FILE:2``, ``--control-vector-scaled FILE:2``).

    Example:
        >>> file = austeer.export_gguf(plan, "models/tiny", "kind.gguf", alpha=8)
        >>> file.open("rb").read(4)
        b'GGUF'

    Args:
        plans: a plan, or several whose effects are summed, each perhaps with its own alpha: ``[(a, 8.0), (b, 0.5)]``;
            ``scale`` and ``ablate``, or ``shift`` alone.
        model: the model that the GGUF was converted from: a folder or Hub id, or a model in memory.
        out: the file to make.
        alpha: of plans that come without one; a number, or one for each of a plan's sites; 1 by default.
        kl: instead of alpha, of one plan with a dose, the KL on neutral text that is predicted, nats a token. What a
            strength does is measured by ``austeer.steer(model, plan, kl=...).alpha``.
        dtype: of the adapter, "float32" or "float16"; control vectors are float32.
        architecture: what the model's GGUF calls its architecture, if it is not the one of the model's family.
        force: replaces ``out``.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Returns:
        The file; its metadata have the plan's replay, if it has one at this strength.

    Raises:
        PlanError: plans that are not for this model, or an alpha that is not finite.
        ExportError: a plan that neither form can say, a family that is not known, quantised weights, an existing
            ``out``, no space, or the package gguf is missing. Nothing is left at ``out`` then.
    """
    pairs = with_alphas(plans, alpha, kl)
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("GGUF files need the package gguf: pip install 'austeer[gguf]'")
    if dtype not in _DTYPES:
        raise ExportError(f"dtype: found {dtype!r}, expected float32 or float16")
    operations = sorted({plan.operation for plan, _ in pairs})
    if {*operations} <= {"scale", "ablate"}:
        return _lora(pairs, model, out, _DTYPES[dtype], architecture, force, progress)
    if operations == ["shift"]:
        return write_control_vector(pairs, model, out, force)
    raise ExportError(
        f"operation: found {' and '.join(map(repr, operations))}; expected plans with 'scale' and 'ablate' (a LoRA "
        "adapter) or with 'shift' (a control vector), each into a file of its own: llama.cpp takes both at once"
    )


def _lora(
    pairs: list[tuple[Plan, float]],
    model: nn.Module | str | Path,
    out: str | Path,
    dtype: torch.dtype,
    architecture: str | None,
    force: bool,
    progress: bool | None,
) -> Path:
    from gguf import GGUFType, Keys

    weights = weights_of_model(model)
    network = weights.network
    edits = edits_of(network, pairs)
    architecture = architecture or _architecture(network)
    names = _names(edits, architecture, find_sites(network, ["layer"])["layer"])
    for edit in edits:
        if factors.changes_bias(network, edit):
            raise ExportError(
                f"{edit.where}: found a bias, whose "
                "entries would have to be scaled with the rows; write a folded checkpoint (austeer export checkpoint) "
                "and convert it with llama.cpp's convert_hf_to_gguf.py"
            )
    rank = max(1, *(factors.rank_of(network, edit) for edit in edits))
    needed = sum(dtype.itemsize * factors.numbers(network, edit.path, edit.weights, rank) for edit in edits)
    out = check_output(out, force, needed, file=True)
    warn_of_another_model(pairs, weights.name)
    with staged(out, file=True) as path, writing(path, architecture, weights.name, pairs) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp scales by alpha / rank
        with weights.opened(), Progress("reading weights", len(edits), "layers", progress) as bar:
            for edit in edits:
                down, up = factors.product(weights, edit, rank)
                for suffix, value in (("lora_a", down), ("lora_b", up)):
                    add(writer, f"{names[edit.path]}.{suffix}", value, dtype)
                bar.advance()
    return out


def _architecture(network: nn.Module) -> str:
    family = text_config(network).model_type
    if family not in ARCHITECTURES:
        raise ExportError(
            f"model: found {family!r}, expected a family whose conversion to GGUF is known: "
            f"{', '.join(ARCHITECTURES)}; if its attention and MLP output projections are converted as they are, give "
            "architecture=... (--architecture), which is general.architecture in the model's GGUF file"
        )
    return ARCHITECTURES[family]


def _names(edits: Sequence[Edit], architecture: str, layers: Sequence[Any]) -> dict[str, str]:
    """What llama.cpp calls the weight of each edited module."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ExportError(
            f"architecture: found {architecture!r}, which the installed gguf does not know; expected one of "
            f"{', '.join(sorted(known))}"
        )
    table = get_tensor_name_map(known[architecture], len(layers))
    names = {}
    for edit in edits:
        plain = edit.path.replace("language_model.", "")  # where a vision tower is beside it
        if edit.experts:
            plain = f"{plain}.{edit.weights.weight}"
        found = [table.get_name(f"{prefix}{plain}") for prefix in ("", "model.", "transformer.")]  # that a head adds
        name = next(filter(None, found), None)
        if name is None:
            raise ExportError(
                f"{edit.path}: llama.cpp's {architecture!r} has no weight for it that gguf knows; write a folded "
                "checkpoint (austeer export checkpoint) and convert it with llama.cpp's convert_hf_to_gguf.py"
            )
        names[edit.path] = f"{name}.weight"
    return names
