"""Biases that hold a shift only while a forward pass runs of which every token is in scope.

Before the decoder's layers run, each module's bias is exchanged for one that holds the shift, and put back after them:
an entry of a dictionary, no copy and no kernel. So nothing outside such a pass sees it: no checkpoint, no optimiser,
no layer that is called by itself, and no graph that was captured or compiled of the whole decoder. A site whose bias is
not exchanged steers the tensor itself, as it does in passes of which only some tokens are in scope.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .bias import Bias, bias_like, why_not_weight
from .editable import is_offloaded, why_not_parameter


class SwitchedBias:
    """The bias of one module, and the one that takes its place.

    Attributes:
        on: whether the module has ours now.
        edits: what each site adds.
        stale: whether ours has to be made anew: it never was, or strengths have changed since.
    """

    def __init__(self, model: nn.Module, module: nn.Module):
        self.module, self._model = module, model
        self.on, self.stale = False, True
        self.edits: list[Bias] = []
        self.own: nn.Parameter | None = None  # the module's, while ours is in its place
        self._ours: nn.Parameter | None = None
        self._total: Tensor | None = None  # [out], what is added, in the dtype that the sum is made in
        # What ours was made from, in versions that can be counted, and for: the weight's address changes with its
        # dtype and device.
        self._versions: tuple[tuple[Tensor, int], ...] = ()
        self._address: int | None = None

    def put_in(self, sure: bool, filled: bool) -> None:
        """Exchanges the bias if it can be; otherwise ``on`` stays False.

        Args:
            sure: whether the model is trusted not to have changed, but by what counts versions.
            filled: whether a bias of the module's own may be read for it. That costs what steering a tensor does.
        """
        parameters = self.module._parameters
        own = parameters.get("bias")
        if own is not None and not (sure or filled):
            return
        stale = self.stale or own is not self.own
        for tensor, version in self._versions:
            stale = stale or tensor._version != version
        if stale or not (sure or _address(parameters) == self._address):
            if not self._make():
                return
        elif not sure and own is not None:
            self._fill(own)  # a change of ``bias.data`` shows in nothing
        self.on = True
        parameters["bias"] = self._ours

    def take_out(self) -> None:
        """Puts the module's own bias back, unless someone has put another one there."""
        if self.on:
            parameters = self.module._parameters
            if parameters.get("bias") is self._ours:
                parameters["bias"] = self.own
            self.on = False

    @torch.no_grad()
    def _make(self) -> bool:
        """The sum, and ours with it; False where the module is not any more what it was when steering was planned."""
        self.stale = False  # first: another thread may change the strengths meanwhile
        module, sides = self.module, {edit.site.side: edit.site for edit in self.edits}
        reason = why_not_switched(module) or why_not_parameter(module, "bias", None)
        if reason or ("input" in sides and why_not_weight(module, sides["input"])):
            self.stale = True
            return False
        like = bias_like(self._model, module, len(self.edits[0].like))
        for edit in self.edits:
            edit.like = like
        self._total = torch.stack([edit.added() for edit in self.edits]).sum(0)
        ours = self._ours
        if ours is None or (ours.shape, ours.dtype, ours.device) != (like.shape, like.dtype, like.device):
            with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
                self._ours = nn.Parameter(torch.empty_like(like), requires_grad=False)
        self.own = module._parameters["bias"]
        self._fill(self.own)
        read = (self.own, module._parameters["weight"] if "input" in sides else None)
        self._versions = tuple((t, t._version) for t in read if t is not None and not t.is_inference())
        self._address = _address(module._parameters)
        return True

    @torch.no_grad()
    def _fill(self, own: Tensor | None) -> None:
        """The module's bias and the sum, rounded once; in place, where a graph may read it."""
        assert self._ours is not None and self._total is not None
        if own is None:
            self._ours.copy_(self._total)
        else:
            torch.add(own, self._total, out=self._ours)


class Switch:
    """The switched biases of a model: all on, but for those that cannot be any more, or all off.

    Attributes:
        on: which of the two.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self._model = model
        self._biases: dict[nn.Module, SwitchedBias] = {}
        self._way: dict[tuple[int, str], tuple[dict, str, nn.Module]] = {}  # each step to a module
        self._during: object = None

    def add(self, edit: Bias) -> SwitchedBias:
        """The bias of the edit's module, which from now on holds the edit, too."""
        module, path = edit.module, str(edit.site.bias)
        if self._model.get_submodule(path) is not module:  # an adapter's wrapper
            path += ".base_layer"
        for step in _way(self._model, path):
            self._way[id(step[0]), step[1]] = step
        bias = self._biases.setdefault(module, SwitchedBias(self._model, module))
        bias.edits.append(edit)
        bias.stale = True
        return bias

    def remove(self, edit: Bias) -> None:
        """The opposite; does nothing where the edit was not added."""
        bias = self._biases.get(edit.module)
        if bias is None or edit not in bias.edits:
            return
        bias.take_out()
        bias.edits.remove(edit)
        bias.stale = True
        if not bias.edits:
            del self._biases[edit.module]
        if not self._biases:
            self._way.clear()

    def turn(self, on: bool, during: object = None) -> None:
        """Exchanges all biases, or puts all back. None is exchanged where modules of the model were replaced.

        Args:
            during: an object for each ``generate``, in which the model is looked at for changes less closely after its
                first pass of this kind; None outside of one.
        """
        if on is self.on:
            return
        if on:
            sure = during is not None and during is self._during
            if not sure and any(modules.get(name) is not child for modules, name, child in self._way.values()):
                return
            self._during = during
            self.on = True  # until all are back, also after an interrupt
            for bias in self._biases.values():
                bias.put_in(sure, during is not None)
        else:
            for bias in self._biases.values():
                bias.take_out()
            self.on = False

    @contextmanager
    def turned_on(self) -> Iterator[None]:
        """Has them on in the block."""
        try:
            self.turn(True, object())
            yield
        finally:
            self.turn(False)


def why_not_switched(module: nn.Module) -> str | None:
    """The reason why the bias of a linear layer cannot be exchanged for another, besides those of a bias."""
    if "bias" in vars(module) or "bias" not in module._parameters:
        return "the bias is no parameter"
    weight = module._parameters.get("weight")
    if is_offloaded(module) or (weight is not None and weight.device.type == "meta"):
        return "the weight is offloaded"  # what loads it would look for our bias, too
    return None


def _address(parameters: dict[str, nn.Parameter | None]) -> int | None:
    """Where a linear layer's weight is; None where that does not tell."""
    weight = parameters.get("weight")
    return weight.data_ptr() if weight.__class__ is nn.Parameter else None


def _way(model: nn.Module, path: str) -> list[tuple[dict, str, nn.Module]]:
    """Each step to a module from the model's root: where it is kept, by which name, and what it leads to."""
    steps, parent = [], model
    for name in path.split("."):
        modules = getattr(parent, "_orig_mod", parent)._modules
        child = modules[name]
        assert child is not None
        steps.append((modules, name, child))
        parent = child
    return steps
