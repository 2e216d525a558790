"""Gradients with respect to shifts of AUs: what adding to an activation, at every position, does to what is read.

    d L / d s[i] = sum over positions of d L / d x[position, i],  x the tensor of a site, x + s the steered one

The weights are not differentiated. The graph begins at the first site, so that nothing before it is kept.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..errors import GradientError, SteeringError, one_line
from ..models.sites import Site
from ..models.structure import decoder_of, evaluating, first_tensor, input_device, is_steered, unwrap
from ..models.tensor_parallel import held

#: The remedy where no gradient comes.
INSTEAD = "the KL of given plans needs no gradients: austeer.estimate_kl(model, tokenizer, plans)"

#: A product without a derivative, as 4-bit weights have it on some CPUs: gradients go around it, with this warning.
NO_KERNEL = ".*autograd kernel was not registered"


class ShiftGradients:
    """Gradients of something that is read from each row of a batch, by shifts of the AUs at some sites.

    Args:
        model: an unsteered Transformers model. sites: from :func:`austeer.models.sites.find_sites`.
        recomputed: the decoder layers, where memory is short: only their inputs are kept, and each runs once more in
            every backward pass (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        GradientError: the model is split over processes, and a site with it. SteeringError: it is steered.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]], recomputed: Sequence[nn.Module] = ()):
        self.model = unwrap(model)
        self.decoder = decoder_of(self.model)
        self.sites, self.recomputed = sites, recomputed
        if is_steered(self.model):
            raise SteeringError("found a steered model, expected it as it is; leave the steering context first")
        for site in (site for found in sites.values() for site in found):
            if held(self.model, site) is not None:
                raise GradientError(
                    f"site {site.name!r} of layer {site.layer} ({site.path}): found a slice of it in this process, "
                    f"expected the whole; use the model in one piece, or {INSTEAD}"
                )
        if any(p.is_inference() for p in self.model.parameters()):
            raise GradientError(
                "found weights that were made in inference mode, expected ones that autograd can follow; load the "
                f"model outside of it, or {INSTEAD}"
            )
        self.device = input_device(self.model)
        self._accepts = inspect.signature(self.decoder.forward).parameters
        self._gradients: dict[str, Tensor] = {}
        self._reached: set[tuple[str, int]] = set()  # by the forward pass
        self._arrived: set[tuple[str, int]] = set()  # by a gradient
        self._shape = torch.Size()

    @contextmanager
    def attached(self) -> Iterator[ShiftGradients]:
        """Reads while the context is open; afterwards the model is as it was."""
        wanting = {name for name, p in self.model.named_parameters() if p.requires_grad}
        with ExitStack() as stack, evaluating(self.model):
            stack.callback(_set_requires_grad, self.model, wanting, True)
            _set_requires_grad(self.model, wanting, False)
            for layer in self.recomputed:
                stack.enter_context(_recomputed(layer))
            for found in self.sites.values():
                for number, site in enumerate(found):
                    stack.callback(self._hook(site, number).remove)
            yield self

    def hidden_states(
        self, ids: Tensor, mask: Tensor | Mapping[str, Tensor] | None, positions: Tensor | None = None
    ) -> Tensor:
        """Last hidden states [rows, tokens, width] with their graph.

        Args:
            ids: int64 [rows, tokens], padded on the right. mask: the same shape; or of trees, with their positions, see
                :func:`austeer.forward.tree_masks.masks`; None: every row is seen whole.

        Raises:
            GradientError: a site was not reached.
        """
        self._shape, self._gradients = ids.shape, {}
        self._reached.clear()
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if mask is not None:
            inputs["attention_mask"] = mask.to(self.device) if isinstance(mask, Tensor) else mask
        if positions is not None:
            inputs["position_ids"] = positions.to(self.device)
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        with torch.inference_mode(False), torch.enable_grad():
            hidden = self.decoder(**inputs).last_hidden_state
        missing = {(name, i) for name, found in self.sites.items() for i in range(len(found))} - self._reached
        if missing:
            name, number = min(missing)
            raise GradientError(
                f"site {name!r} of layer {self.sites[name][number].layer} was not reached by a forward pass "
                f"({len(missing)} sites missed); expected every site to run once, and a model that is not compiled; or "
                f"{INSTEAD}"
            )
        return hidden

    def backward(self, hidden: Tensor, gradient: Tensor, again: bool = False) -> dict[str, Tensor]:
        """For each site float32 [rows, layers, width] on the CPU, the gradients of what is read from each row.

        Args:
            gradient: of that, with respect to ``hidden``. again: whether the same graph is used once more.

        Raises:
            GradientError: a gradient is not finite, or none arrives.
        """
        rows = self._shape[0]
        self._gradients = {
            name: torch.zeros(rows, len(found), found[0].width, device="cpu") for name, found in self.sites.items()
        }
        self._arrived.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=NO_KERNEL)
            try:
                torch.autograd.backward([hidden], [gradient], retain_graph=again)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, UserWarning) as error:
                raise GradientError(f"found no backward pass in this model ({one_line(error)}); {INSTEAD}") from error
        for name, found in self.sites.items():
            for number, site in enumerate(found):
                if (name, number) not in self._arrived:
                    raise GradientError(
                        f"site {name!r} of layer {site.layer} ({site.path}): found no gradient, expected one; {INSTEAD}"
                    )
            if not self._gradients[name].isfinite().all():
                row = int((~self._gradients[name].isfinite()).nonzero()[0, 1])
                raise GradientError(
                    f"site {name!r}, layer {found[row].layer}: found a gradient that is NaN or infinite, expected a "
                    "finite one; load the model in bfloat16 or float32"
                )
        return self._gradients

    def _hook(self, site: Site, number: int):
        module, name = self.model.get_submodule(site.path), site.name

        def follow(x: Tensor) -> Tensor:
            """``x``, of which the gradient will be kept; it is a leaf where nothing before it is differentiated."""
            if not torch.is_grad_enabled():
                return x
            if x.shape[:-1] not in (self._shape, (self._shape.numel(),)):
                raise GradientError(
                    f"site {name!r} of layer {site.layer}: found a tensor {tuple(x.shape)}, expected [batch, tokens, "
                    f"width] = [{self._shape[0]}, {self._shape[1]}, width] or [batch * tokens, width]"
                )
            if not x.requires_grad:
                x = x.detach().requires_grad_().clone()  # a leaf cannot be written in place, as Falcon does
            shape = self._shape
            x.register_hook(lambda gradient: self._keep(name, number, gradient, shape))
            self._reached.add((name, number))
            return x

        if site.side == "input":

            def before(module, args, kwargs):
                if args:
                    return (follow(args[0]), *args[1:]), kwargs
                first = next(iter(kwargs))
                return args, {**kwargs, first: follow(kwargs[first])}

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module, args, output):
            if isinstance(output, (tuple, list)):
                return type(output)([follow(first_tensor(output)), *output[1:]])
            return follow(output)

        return module.register_forward_hook(after)

    def _keep(self, name: str, number: int, gradient: Tensor | None, shape: torch.Size) -> None:
        if gradient is None:  # what follows has no derivative
            return
        # A tensor may be handed on as it is, as Gemma 3n's streams are: each use has a part of the gradient.
        self._gradients[name][:, number] += gradient.view(*shape, -1).sum(1, dtype=torch.float32).cpu()
        self._arrived.add((name, number))


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    """``layer`` with activation checkpointing, in evaluation mode as well, where Transformers' own does nothing."""
    forward, own = layer.forward, "forward" in vars(layer)  # accelerate puts its own there

    def checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with set_checkpoint_early_stop(False):  # to the end, where accelerate takes weights away again
            return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

    layer.forward = checkpointed
    try:
        yield
    finally:
        del layer.forward
        if own:
            layer.forward = forward


def _set_requires_grad(model: nn.Module, names: Set[str], value: bool) -> None:
    for name, parameter in model.named_parameters():  # accelerate makes those it loads anew
        if name in names:
            parameter.requires_grad_(value)
