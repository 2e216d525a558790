"""The fold path: steering written into the weights; it costs nothing at run time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from ..models.hooks import hooks_on
from ..models.linear import FLOATING, WeightNames, weights_of
from ..models.sites import Site
from ..plans.fit import why_no_edit
from .path import Path
from .tables import StrengthTable


class Fold(Path):
    """Scales rows (output side) or columns (input side) of the weights in place; no run-time cost.

    y = W x + b, steered at the output:  W[I] *= 1 + gamma;  b[I] = b[I] * (1 + gamma) + shift
    steered at the input:                b += W[:, I] @ shift;  W[:, I] *= 1 + gamma

    A mixture of experts is y = sum_e r_e (W_e x_e + b_e), r_e the router's or a gate's: scaled at the output if every
    W_e and b_e is. A shift would need the r_e to sum to 1.
    """

    name = "fold"

    def __init__(self, site: Site, table: StrengthTable, parts: Sequence[nn.Module]):
        super().__init__(site, table, parts[0])
        self.calls = None
        self.parts = tuple(parts)
        self._saved: list[tuple[Tensor, Tensor | None]] = []

    @torch.no_grad()
    def attach(self) -> None:
        table = self.table
        for weight, bias, dim in self._weights():
            index = table.index.to(weight.device)
            saved = weight.index_select(dim, index)
            self._saved.append((saved, None if bias is None else bias.clone()))
            wide = reference.compute_dtype(weight.dtype)
            factor, shift = (t[0].to(weight.device, wide) for t in (1 + table.gamma.to(wide), table.shift))
            slice_ = saved.to(wide).movedim(dim, -1)  # [..., AUs]
            weight.index_copy_(dim, index, (slice_ * factor).movedim(-1, dim).to(weight.dtype))
            if bias is None:
                continue
            if self.site.side == "output":
                steered = bias.index_select(-1, index).to(wide) * factor + shift
                bias.index_copy_(-1, index, steered.to(bias.dtype))
            elif table.shifts:
                bias.copy_(bias.to(wide) + slice_ @ shift)

    @torch.no_grad()
    def detach(self) -> None:
        # After an attach that was broken off there are fewer saved values than parts; the rest was not touched.
        for (weight, bias, dim), (saved, saved_bias) in zip(self._weights(), self._saved):
            # The model may have been moved or cast in the meantime; so are the saved values.
            weight.index_copy_(dim, self.table.index.to(weight.device), saved.to(weight))
            if bias is not None and saved_bias is not None:
                bias.copy_(saved_bias)
        self._saved = []

    def _weights(self) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        """Weight, bias and the weight's dimension that counts the AUs, of each part."""
        for part in self.parts:
            weights = weights_of(part)
            assert isinstance(weights, WeightNames)  # why_not_fold refuses all else
            bias = getattr(part, weights.bias) if weights.bias else None
            yield getattr(part, weights.weight), bias, getattr(weights, self.site.side)


def why_not_fold(model: nn.Module, site: Site, operation: str, storages: Counter) -> str | None:
    """The reason why steering cannot be folded into the weights at a site, or None if it is exact and possible.

    Args:
        storages: how many parameters of the model lie in each storage, from :func:`shared_storages`.
    """
    if reason := why_no_edit(model, site, operation):
        return reason
    inductor = sys.modules.get("torch._inductor.config")  # a second to import, and nothing was compiled without it
    if inductor is not None and inductor.freezing:
        return "Inductor's freezing copies weights into compiled code"
    for path in site.parts:
        reason = _why_not_part(model.get_submodule(path), site, storages) or _why_not_between(model, site, path)
        if reason is not None:
            return reason if len(site.parts) == 1 else f"{path}: {reason}"
    return None


def _why_not_part(module: nn.Module, site: Site, storages: Counter) -> str | None:
    weights = weights_of(module)
    assert isinstance(weights, WeightNames)  # why_no_edit refuses all else
    if any(getattr(hook, "offload", False) for hook in hooks_on(module)):
        return "the weight is offloaded"
    for name in (weights.weight, weights.bias):
        if name is None:
            continue
        p = module._parameters.get(name)
        if p is None:
            if getattr(module, name) is not None:
                return f"the {name} is made anew at each forward pass (pruning, weight normalisation ...)"
            continue
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
    weight, dim = module._parameters[weights.weight], getattr(weights, site.side)
    if weight is None or weight.shape[dim] != site.width:  # sharded, say
        return f"the weight is {tuple(weight.shape) if weight is not None else None}, for {site.width} AUs"
    return None


def _why_not_between(model: nn.Module, site: Site, path: str) -> str | None:
    """Whether anything was put on or between the weights and the tensor that need not be linear."""
    names = path.split(".")
    inside = len(site.path.split(".")) if path.startswith(f"{site.path}.") else len(names)
    for end in range(inside, len(names) + 1):
        module = model.get_submodule(".".join(names[:end]))
        forward = vars(module).get("_old_forward", vars(module).get("forward"))  # accelerate's hooks keep the old one
        if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
            return f"the forward of {'.'.join(names[:end])} was replaced"
        if end > inside and (module._forward_hooks or module._forward_pre_hooks):
            return f"{'.'.join(names[:end])} has hooks"
    return None


def shared_storages(model: nn.Module) -> Counter:
    """How many parameters (tied ones counted each time) lie in each storage."""
    return Counter(
        p.untyped_storage().data_ptr()
        for _, p in model.named_parameters(remove_duplicate=False)
        if type(p) is nn.Parameter and p.device.type != "meta"  # DTensors and quantised tensors have no storage
    )
