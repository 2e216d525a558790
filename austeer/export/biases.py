"""Biases that a model has not but could have: what `shift` is written into.

Many families build their linear layers with biases if a setting of the config says so (Llama's ``attention_bias`` and
``mlp_bias``). Such a setting is found by trying: the model is built without its weights, and what it gains is compared
with what is needed. It adds biases to other layers as well, which are zero then.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models import linear
from ..models.skeleton import named_dtype, skeleton
from ..models.structure import floating_dtype
from .edits import Edit, ExportError, ExportWarning


@dataclass(frozen=True)
class NewBiases:
    """Attributes:
    settings: names in the text model's config, to be set to true.
    shapes: every bias that this adds to the model -> its shape.
    """

    settings: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]


NONE = NewBiases((), {})

#: Families whose code in vLLM 0.32 has every bias that Transformers' has (read there). Elsewhere its loader leaves out
#: a checkpoint's biases that its code has no place for, without a word.
READ_BY_VLLM = ("falcon", "gemma2", "gemma3_text", "granite", "llama", "nemotron", "olmo", "olmo2", "smollm3")


def warn_of_unread(found: NewBiases, family: str) -> None:
    """Warns where an engine would serve the checkpoint without its new biases, that is, unsteered."""
    if found.settings and family not in READ_BY_VLLM:
        warnings.warn(
            f"the new biases ({', '.join(found.settings)} in config.json) are read by Transformers; vLLM's own code of "
            f"{family!r} may leave them out without a word: serve it there with --model-impl transformers, and compare "
            "its text with that of austeer generate",
            ExportWarning,
            stacklevel=3,
        )


def new_biases(network: nn.Module, config: Any, edits: Iterable[Edit]) -> NewBiases:
    """The biases that the shifts of ``edits`` need and the model has not.

    Args:
        network: the model, perhaps on the meta device. config: its config.

    Raises:
        ExportError: no setting of the config adds one.
    """
    missing = {
        edit.path: edit
        for edit in edits
        if edit.shifts and getattr(network.get_submodule(edit.path), str(edit.weights.bias), None) is None
    }
    if not missing:
        return NONE
    settings: list[str] = []
    for name, value in config.get_text_config().to_dict().items():
        if "bias" not in name or value not in (False, None):
            continue
        added = _added(network, config, [name])
        if added is not None and any(f"{path}.bias" in added for path in missing):
            settings.append(name)
    added = _added(network, config, settings) if settings else {}
    for path, edit in missing.items():
        if added is None or f"{path}.bias" not in added:
            # At "layer" no weights can be scaled.
            scale = "" if "layer" in edit.sites else "use plan.with_operation('scale'), or "
            raise ExportError(
                f"{edit.where}: found no bias, and no setting of the config of "
                f"{config.get_text_config().model_type!r} that gives it one, so 'shift' is no edit of its weights; "
                f"{scale}steer at run time (austeer.steer, or austeer's plugin in vLLM)"
            )
    return NewBiases(tuple(settings), dict(added or {}))


def _added(network: nn.Module, config: Any, settings: Iterable[str]) -> dict[str, tuple[int, ...]] | None:
    """The biases that settings add; None if the model cannot be built with them, or more changes than biases."""
    changed = copy.deepcopy(config)
    for name in settings:
        setattr(changed.get_text_config(), name, True)
    try:
        other = skeleton(changed, named_dtype(config) or floating_dtype(network))
    except Exception:  # of a config class that checks its values, in whatever way
        return None
    before, after = (_parts(model) for model in (network, other))
    added = {name: shape for name, shape in after.items() if name not in before}
    if {name: shape for name, shape in after.items() if name not in added} != before or _code(network) != _code(other):
        return None
    for name in added:
        path, _, own = name.rpartition(".")
        if own != "bias" or not isinstance(linear.weights_of(other.get_submodule(path)), linear.WeightNames):
            return None
    return added


def _parts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(t.shape)
        for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    }


def _code(model: nn.Module) -> list[tuple[str, type, str]]:
    """The modules, and what they say of themselves but for their biases."""
    return [(path, type(m), re.sub(r"bias=\w+", "", m.extra_repr())) for path, m in model.named_modules()]
