"""Last-token activations at the sites of a batch of texts: what momentum is counted from.

Only the last token of each text is kept, written straight into a buffer on the device; the head of the model is not
run, no cache is made and no hidden states are collected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..models.sites import Site
from ..models.structure import decoder_of, first_tensor, input_device, unwrap
from ..models.tensor_parallel import held
from .packing import Batch
from .tree_masks import masks


class LastTokens:
    """Buffers of last-token activations: for each site name [texts, sites, width], in the activations' own dtype.

    Args:
        model: a Transformers model, with or without its head, whose parameters may be offloaded.
        sites: what to read, from :func:`austeer.models.sites.find_sites`.
        texts: how many texts the buffers hold.
        device: where tokens go in and the buffers lie; by default where the model takes its tokens.

    Attributes:
        tree: how batches with a tree (shared prompts) are handed to the model, one of
            :data:`austeer.forward.tree_masks.FORMS`.

    Raises:
        CaptureError: the model is split over processes, and a site with it.
    """

    def __init__(
        self, model: nn.Module, sites: Mapping[str, Sequence[Site]], texts: int, device: torch.device | None = None
    ):
        self.model = unwrap(model)
        self.decoder = decoder_of(self.model)
        for site in (site for found in sites.values() for site in found):
            if held(self.model, site) is not None:
                raise CaptureError(
                    f"site {site.name!r} of layer {site.layer} ({site.path}): found a slice of it in this process, "
                    "expected the whole; measure on the model in one piece (its plans steer the split one, too)"
                )
        self.sites = sites
        self.device = device or input_device(self.model)
        self.texts = texts
        self.buffers: dict[str, Tensor] = {}  # made when a site first runs, in the dtype that it turns out to have
        self.tree = "tensor"
        self._texts: Tensor | None = None
        self._ends: dict[torch.device, tuple[Tensor, Tensor]] = {}  # row and column of each text's last token
        self._shape = torch.Size()  # [batch, tokens] of the batch that runs
        self._filled: set[tuple[str, int]] = set()

    @contextmanager
    def attached(self) -> Iterator[LastTokens]:
        """Reads while the context is open; afterwards the model is as it was."""
        with ExitStack() as stack:
            for found in self.sites.values():
                for number, site in enumerate(found):
                    module = self.model.get_submodule(site.path)
                    stack.callback(self._hook(module, site, number).remove)
            yield self

    def _hook(self, module: nn.Module, site: Site, number: int):
        name = site.name

        def keep(x: Tensor) -> None:
            if self._texts is None:
                return
            if x.shape[:-1] not in (self._shape, (self._shape.numel(),)):
                raise CaptureError(
                    f"site {name!r} of layer {site.layer}: found a tensor {tuple(x.shape)}, expected [batch, tokens, "
                    f"width] = [{self._shape[0]}, {self._shape[1]}, width] or [batch * tokens, width]"
                )
            if x.device not in self._ends:  # a model on several devices
                self._ends[x.device] = tuple(t.to(x.device) for t in self._ends[self.device])  # type: ignore[assignment]
            # Some blocks flatten their tokens.
            last = x.view(*self._shape, x.shape[-1])[self._ends[x.device]]  # [texts, width]
            if name not in self.buffers:
                shape = (self.texts, len(self.sites[name]), x.shape[-1])
                self.buffers[name] = torch.empty(shape, dtype=x.dtype, device=self.device)
            buffer = self.buffers[name]
            if x.dtype != buffer.dtype:
                raise CaptureError(
                    f"site {name!r}: found {x.dtype} in layer {site.layer} and {buffer.dtype} in an earlier one, "
                    "expected one dtype; load the model in one"
                )
            buffer[:, number].index_copy_(0, self._texts, last.to(self.device))
            self._filled.add((name, number))

        if site.side == "input":
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: keep(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: keep(first_tensor(output)))

    @torch.no_grad()
    def run(self, batch: Batch) -> None:
        """Runs the decoder once over a batch, and fills the rows ``batch.texts`` of the buffers.

        Nothing here waits for the device.

        Raises:
            CaptureError: a site was not reached by this forward pass.
        """
        ids, ends, texts = (t.to(self.device, non_blocking=True) for t in (batch.ids, batch.ends, batch.texts))
        self._texts, self._shape = texts, ids.shape
        self._ends = {self.device: (ends // ids.shape[1], ends % ids.shape[1])}
        self._filled.clear()
        inputs = {"input_ids": ids, "use_cache": False}
        if batch.sees is not None and batch.positions is not None:
            inputs["position_ids"] = batch.positions.to(self.device, non_blocking=True)
            inputs["attention_mask"] = masks(self.model, batch, self.device, self.tree)
        try:
            self.decoder(**inputs)
        finally:
            self._texts = None
        missing = {(name, i) for name, found in self.sites.items() for i in range(len(found))} - self._filled
        if missing:
            name, number = min(missing)
            raise CaptureError(
                f"site {name!r} of layer {self.sites[name][number].layer} was not reached by a forward pass "
                f"({len(missing)} sites missed); expected every site to run once. If the model is compiled, measure "
                "before compiling it"
            )
