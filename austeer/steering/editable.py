"""Whether steering can be written into a module's weight or bias, and stays what the model computes with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ..errors import SteeringWarning
from ..models.hooks import hooks_on
from ..models.linear import FLOATING
from ..models.sites import Site
from ..models.structure import unwrap
from .sharing import Sharing

#: Hooks of accelerate that put weights and inputs where they are used, and change no value.
_PLACING = (AlignDevicesHook, SequentialHook)


def why_in_training(model: nn.Module, site: Site) -> str | None:
    """The reason why a site is steered by what runs while it is trained.

    A step on an edited weight is lost on leaving, its own gradient is that of the edited weight, and what activation
    checkpointing computes anew does not show whether the edit is still there.
    """
    return "it is in training mode" if model.get_submodule(site.path).training else None


def warn_of_gradients(p: nn.Parameter, name: str, wanted: bool, differentiated: bool) -> None:
    """To be called where an edit of a parameter, or one beside it that its gradient lacks, ends.

    Warns if the parameter was given gradients since the edit was made, and, in a backward pass that is still to come,
    that the forward pass was an edited one's: autograd notices that only where what the parameter was multiplied by
    has a gradient, too.

    Args:
        wanted: whether it had gradients when the edit was made. differentiated: whether a backward pass reached it
            since: whoever calls backward in time may keep a graph that nobody will run again.
    """
    if not p.requires_grad or not p.is_leaf or p.is_inference():
        return
    remedy = "call backward() inside the block and before the change, or use mode='columns'"
    if not wanted:
        warnings.warn(
            f"{name}: found requires_grad set inside the block, expected it before; a gradient may lack the steering. "
            "Set it before the block, or use mode='columns'",
            SteeringWarning,
            stacklevel=2,
        )

    def late(gradients: object) -> None:
        warnings.warn(
            f"{name}: found a backward pass, after steering ended or its strength was changed, of a forward pass from "
            f"before; its gradient may not be that of the steered model. {remedy[0].upper()}{remedy[1:]}",
            SteeringWarning,
            stacklevel=2,
        )

    if differentiated:
        return
    # The node lives as long as a graph that it is in: without one from before, nobody calls this.
    with torch.inference_mode(False), torch.enable_grad():
        get_gradient_edge(p).node.register_prehook(late)


def why_frozen() -> str | None:
    """The reason why no edit of any weight or bias may have an effect."""
    # A second to import, and nothing was compiled without the first, nor frozen without the second.
    inductor, froze = (sys.modules.get(f"torch._inductor.{name}") for name in ("config", "freezing"))
    if froze is not None or (inductor is not None and inductor.freezing):
        return "Inductor's freezing copies weights into compiled code"
    return None


def why_not_parameter(module: nn.Module, name: str, sharing: Sharing | None) -> str | None:
    """The reason why a parameter of a module cannot be edited, or None if it can, or if there is none.

    Args:
        sharing: of the model; None where another parameter takes its place, so that its memory stays as it is.
    """
    p = module._parameters.get(name)
    if p is None:
        if getattr(module, name, None) is not None:
            return f"the {name} is made anew at each forward pass (pruning, weight normalisation ...)"
        return None
    if p.device.type == "meta":
        return f"the {name} is offloaded"
    if p.dtype not in FLOATING:
        return f"the {name} is {p.dtype}"
    if type(p) is not nn.Parameter:
        return f"the {name} is a {type(p).__name__}"
    if p.is_inference() and not torch.is_inference_mode_enabled():
        return f"the {name} was made in inference mode and cannot be written outside of it"
    reason = None if sharing is None else sharing.why_not(p)
    return None if reason is None else f"the {name} {reason}"


def why_not_between(model: nn.Module, site: Site, path: str) -> str | None:
    """Whether anything was put on or between the module at ``path`` and the site's tensor that may change it."""
    for parent, name in choosers(model, path):
        return f"a {type(parent).__name__} chooses what is its {name}"
    names = path.split(".")
    inside = len(site.path.split(".")) if path.startswith(f"{site.path}.") else len(names)
    for end in range(inside, len(names) + 1):
        module = model.get_submodule(".".join(names[:end]))
        forward = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate's hooks keep the old one
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            return f"the forward of {'.'.join(names[:end])} was replaced"
        placing = all(type(hook) in _PLACING for hook in hooks_on(module))
        if end > inside and (module._forward_hooks or module._forward_pre_hooks or not placing):
            return f"{'.'.join(names[:end])} has hooks"
    return None


def choosers(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Modules on the way to the one at ``path`` that have no child of its name, and give out one of some.

    PEFT's modules_to_save give out the adapter's copy or, with the adapter off, the model's own.
    """
    parent = model
    for name in path.split("."):
        if name not in unwrap(parent)._modules:
            yield parent, name
        parent = parent.get_submodule(name)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights each time they are used."""
    return any(getattr(hook, "offload", False) for hook in hooks_on(module))
