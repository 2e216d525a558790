"""Whether steering can be written into a module's weight or bias, and stays what the model computes with."""

from __future__ import annotations

import sys
from collections import Counter

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn

from ..models.hooks import hooks_on
from ..models.linear import FLOATING
from ..models.sites import Site

#: Hooks of accelerate that put weights and inputs where they are used, and change no value.
_PLACING = (AlignDevicesHook, SequentialHook)


def shared_storages(model: nn.Module) -> Counter:
    """How many parameters (tied ones counted each time) lie in each storage, and in how many places each module is."""
    found: Counter = Counter(
        p.untyped_storage().data_ptr()
        for _, p in model.named_parameters(remove_duplicate=False)
        if type(p) is nn.Parameter and p.device.type != "meta"  # DTensors and quantised tensors have no storage
    )
    found.update(module for _, module in model.named_modules(remove_duplicate=False))
    return found


def why_in_training(model: nn.Module, site: Site) -> str | None:
    """The reason why a site is steered by what runs while it is trained.

    A step on an edited weight is lost on leaving, its own gradient is that of the edited weight, and what activation
    checkpointing computes anew does not show whether the edit is still there.
    """
    return "it is in training mode" if model.get_submodule(site.path).training else None


def why_frozen() -> str | None:
    """The reason why no edit of any weight or bias may have an effect."""
    inductor = sys.modules.get("torch._inductor.config")  # a second to import, and nothing was compiled without it
    if inductor is not None and inductor.freezing:
        return "Inductor's freezing copies weights into compiled code"
    return None


def why_not_parameter(module: nn.Module, name: str, storages: Counter) -> str | None:
    """The reason why a parameter of a module cannot be edited in place, or None if it can, or if there is none.

    Args:
        storages: how many parameters of the model lie in each storage, from :func:`shared_storages`.
    """
    p = module._parameters.get(name)
    if p is None:
        if getattr(module, name) is not None:
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
    if storages[p.untyped_storage().data_ptr()] > 1:
        return f"the {name} is shared with another module"
    return None


def why_not_between(model: nn.Module, site: Site, path: str) -> str | None:
    """Whether anything was put on or between the module at ``path`` and the site's tensor that may change it."""
    names, parent = path.split("."), model
    for name in names:
        if name not in getattr(parent, "_orig_mod", parent)._modules:
            return f"a {type(parent).__name__} chooses what is its {name}"  # PEFT's modules_to_save, adapters on or off
        parent = parent.get_submodule(name)
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


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights each time they are used."""
    return any(getattr(hook, "offload", False) for hook in hooks_on(module))
