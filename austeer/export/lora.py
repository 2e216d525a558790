"""Plans as a LoRA adapter in PEFT's format, which PEFT, vLLM, SGLang and TGI load; exact, see ``factors.py``.

Every layer has one rank, those without AUs in it, too (zeros): SGLang and TGI know one rank an adapter, and TGI leaves
out a whole kind of layer where one layer of the kind is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import check_count
from ..models.linear import FLOATING, WeightNames, weights_of
from ..models.sites import SITE_NAMES, find_sites
from ..plans.plan import Plan
from ..utils.progress import Progress
from . import factors
from .adapter import CONFIG, PREFIX, TENSORS, AdapterLayer, config_of, taken_for_experts, target_of, tensors_of
from .edits import Alpha, Edit, ExportError, edits_of, warn_of_another_model, with_alphas
from .folding import rounded
from .model_weights import StoredWeights, weights_of_model
from .output_files import RECORD, check_output, staged, write_json, write_replay

_LARGEST_RANK = 1 << 20


def export_lora(
    plans: Plan | Sequence[Plan | tuple[Plan, Alpha]],
    model: nn.Module | str | Path,
    out: str | Path,
    *,
    alpha: Alpha | None = None,
    kl: float | None = None,
    dtype: torch.dtype | str | None = None,
    rank: int | None = None,
    rank_pattern: bool = False,
    lora_bias: bool = False,
    experts: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> Path:
    """Writes plans as one LoRA adapter that does what ``steer`` does, at every position.

    Example:
        >>> out = austeer.export_lora(plan, "models/tiny", "adapters/kind", alpha=8)
        >>> sorted(file.name for file in out.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'austeer.json']

    With that, ``vllm serve models/tiny --enable-lora --lora-modules kind=adapters/kind`` steers requests for "kind".

    Weights are read one layer at a time, in place, so a model of any size takes little more memory than its adapter.
    The adapter is for this model's weights: on another one it does something else.

    The strength can be left to whoever loads the adapter: what it adds grows in proportion to its scaling
    (``lora_alpha / r`` in its config, 1 here; PEFT's ``set_scale`` and the weights of ``add_weighted_adapter``), so one
    exported at ``alpha=1`` and scaled by a is one exported at ``alpha=a``. Not if a plan works on both sides of one
    layer (sites ``ffn`` and ``neuron``): there the effect has a part in proportion to alpha squared.

    Args:
        plans: a plan, or several, whose effects add up; with a strength of its own each as pairs (plan, alpha).
        model: a Transformers model, also offloaded, or with PEFT adapters on other layers; or a folder or Hub id in
            safetensors. Weights have to be floating-point ones.
        out: the folder to make.
        alpha: the strength of plans that have none of their own: one number, or one for each of a plan's sites; 1 by
            default.
        kl: instead of alpha, of one plan with a dose, the KL on neutral text that is predicted, nats a token. What a
            strength does is measured by ``austeer.steer(model, plan, kl=...).alpha``.
        dtype: of the adapter: float32, bfloat16, float16, float64. By default each layer's own.
        rank: of every layer; by default the smallest that is exact: the largest number of AUs in a layer, of ``ablate``
            one for each plan and site.
        rank_pattern: give each layer the rank that it needs, and none to layers without AUs. Smaller and faster in
            PEFT; vLLM reads it, SGLang and TGI do not.
        lora_bias: also write what is added to outputs: a bias's share of scaling, and the whole of ``shift``. PEFT
            alone reads it, and merges it only into layers that have a bias; others refuse it or leave it out.
        experts: also write the experts of mixtures. PEFT alone reads them in this form.
        force: replace what is in ``out``.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Returns:
        ``out``, with ``adapter_config.json``, ``adapter_model.safetensors`` and what was exported in ``austeer.json``;
        and with ``austeer_replay.json``, if the plan has a replay at this strength.

    Raises:
        PlanError: a plan for another architecture, or an alpha that is not finite.
        SiteError: the model lacks a site. ModelError: no such model.
        ExportError: what a LoRA adapter cannot say, quantised weights, an existing ``out``, too small a rank, a number
            that ``dtype`` has not, no space. Nothing is left of it.
    """
    wanted = _dtype(dtype)
    weighted = with_alphas(plans, alpha, kl)
    weights = weights_of_model(model)
    network = weights.network
    edits = edits_of(network, weighted)
    _check(network, edits, lora_bias, experts)
    targets = _targets(network, edits, rank, rank_pattern)
    dtypes = [wanted or getattr(network.get_submodule(t.path), t.names.weight).dtype for t in targets]
    numbers = (factors.numbers(network, t.path, t.names, t.rank) for t in targets)
    size = sum(dtype.itemsize * number for dtype, number in zip(dtypes, numbers))
    # In the Hub's cache the files of a folder are links to another.
    read = (weights.folder, *weights.keys.values()) if isinstance(weights, StoredWeights) else (Path(weights.name),)
    out = check_output(out, force, size, (path for path in read if path.exists()))
    warn_of_another_model(weighted, weights.name)
    tensors: dict[str, Tensor] = {}
    with weights.opened(), Progress("reading weights", len(targets), "layers", progress) as bar:
        for dtype, target in zip(dtypes, targets):
            for name, value in tensors_of(weights, target, lora_bias):
                tensors[f"{PREFIX}{target.path}.{name}"] = rounded(value, dtype, target.path).contiguous()
            bar.advance()
    config = config_of(weights, targets, lora_bias)
    with staged(out) as folder:
        write_json(folder / CONFIG, config)
        layers = sorted({target.edit.layer for target in targets if target.edit is not None})
        write_json(folder / RECORD, weights.record("lora", weighted) | {"rank": config["r"], "layers": layers})
        write_replay(folder, weighted)
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / TENSORS).chmod((folder / CONFIG).stat().st_mode)  # safetensors' files are their owner's only
    return out


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in FLOATING:
        known = ", ".join(str(one).removeprefix("torch.") for one in FLOATING)
        raise ExportError(f"dtype: found {dtype!r}, expected one of {known}, or None for the weights' own")
    return found


def _check(network: nn.Module, edits: Sequence[Edit], lora_bias: bool, experts: bool) -> None:
    """Refuses what an adapter cannot say, or nobody would read."""
    for edit in edits:
        where = edit.where
        changes_bias = factors.changes_bias(network, edit)
        if edit.experts and not experts:
            raise ExportError(
                f"{where}: found the experts of a mixture, which vLLM, SGLang and TGI do not read as an adapter of "
                "their down projections alone; write a folded checkpoint (austeer export checkpoint), select at "
                "'attention', or give experts=True (--experts) for PEFT alone"
            )
        if (edit.experts or taken_for_experts(network, edit.path)) and (changes_bias or lora_bias):
            raise ExportError(
                f"{where}: found a bias to write in a model with mixtures of experts, which PEFT has no place for; "
                "write a folded checkpoint (austeer export checkpoint)"
            )
        if changes_bias and not lora_bias:
            what = (
                "operation 'shift', which adds to the output what no product of matrices does"
                if edit.shifts
                else "a bias, whose entries would have to be scaled with the rows"
            )
            raise ExportError(
                f"{where}: found {what}; write a folded checkpoint (austeer export checkpoint) where the model's "
                "config has a bias here, steer by austeer's plugin in vLLM, or give lora_bias=True (--lora-bias) for "
                "PEFT alone"
            )


def _targets(network: nn.Module, edits: Sequence[Edit], rank: int | None, exact: bool) -> list[AdapterLayer]:
    """The layers of the adapter, in the model's order."""
    ranks = {edit.path: max(1, factors.rank_of(network, edit)) for edit in edits}
    needed = max(ranks.values())
    if exact:
        if rank is not None:
            raise ExportError("rank: found a number beside rank_pattern, expected one of the two")
        return [target_of(network, edit.path, edit, ranks[edit.path]) for edit in edits]
    if rank is not None and check_count("rank", rank, _LARGEST_RANK, "LoRA ranks", ExportError) < needed:
        raise ExportError(
            f"rank: found {rank}, expected {needed} or more: one for each AU that is scaled, and each direction "
            "that is ablated, in one layer"
        )
    by_path = {edit.path: edit for edit in edits}
    paths = dict.fromkeys(by_path) if any(edit.experts for edit in edits) else _all_of_their_kinds(network, edits)
    return [target_of(network, path, by_path.get(path), rank or needed) for path in paths]


def _all_of_their_kinds(network: nn.Module, edits: Sequence[Edit]) -> list[str]:
    """The edited layers and those in their place in other decoder layers."""
    kinds = {_kind(edit.path) for edit in edits}
    found: dict[int, dict[str, None]] = {}
    names = {name for edit in edits for name in edit.sites}
    for sites in find_sites(network, [name for name in SITE_NAMES if name in names]).values():
        for site in sites:
            for path in dict.fromkeys((*site.parts, *filter(None, (site.bias,)))):
                if _kind(path) in kinds and isinstance(weights_of(network.get_submodule(path)), WeightNames):
                    found.setdefault(site.layer, {})[path] = None
    return [path for layer in sorted(found) for path in found[layer]]


def _kind(path: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", path)
