"""Last-token activations at the sites of a batch of texts: what momentum is counted from.

Only the last token of each text is kept, written straight into a buffer; the head of the model is not run, no cache is
made and no hidden states are collected.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .errors import CaptureError
from .sites import Site, decoder_of, input_device, unwrap


def first_tensor(output: Tensor | tuple) -> Tensor:
    """A module's output without what comes beside it (attention weights, a router's logits)."""
    return output[0] if isinstance(output, tuple) else output


class LastTokens:
    """Buffers of last-token activations: for each site name [texts, layers, width], in the model's own dtype.

    Args:
        model: a Transformers model, with or without its head, whose parameters may be offloaded.
        sites: what to read, from :func:`austeer.sites.find_sites`.
        texts: how many texts the buffers hold.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]], texts: int):
        self.model = unwrap(model)
        self.decoder = decoder_of(self.model)
        self.sites = sites
        self.device = input_device(self.model)
        self.dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        self.buffers = {
            name: torch.empty(texts, len(found), found[0].width, dtype=self.dtype, device=self.device)
            for name, found in sites.items()
        }
        self._rows: Tensor | None = None
        self._filled: set[tuple[str, int]] = set()
        self._accepts = inspect.signature(self.decoder.forward).parameters

    @contextmanager
    def attached(self) -> Iterator[LastTokens]:
        """Reads while the context is open; afterwards the model is as it was."""
        with ExitStack() as stack:
            for name, found in self.sites.items():
                for number, site in enumerate(found):
                    module = self.model.get_submodule(site.path)
                    stack.callback(self._hook(module, name, number, site.side).remove)
            yield self

    def _hook(self, module: nn.Module, name: str, number: int, side: str):
        buffer = self.buffers[name][:, number]

        def keep(x: Tensor) -> None:
            if self._rows is not None:
                buffer[self._rows] = x[:, -1].to(buffer.device, buffer.dtype)
                self._filled.add((name, number))

        if side == "input":
            return module.register_forward_pre_hook(lambda module, args: keep(args[0]))
        return module.register_forward_hook(lambda module, args, output: keep(first_tensor(output)))

    @torch.no_grad()
    def run(self, token_ids: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Runs one batch of texts, padded on the left, and fills ``rows`` of the buffers.

        Raises:
            CaptureError: a site was not reached by this forward pass.
        """
        length = max(map(len, token_ids))
        ids, mask = torch.zeros(2, len(token_ids), length, dtype=torch.int64)  # padding is masked: any id will do
        for i, tokens in enumerate(token_ids):
            ids[i, length - len(tokens) :] = torch.as_tensor(tokens)
            mask[i, length - len(tokens) :] = 1
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        if "position_ids" in self._accepts:  # padding must not move a text to other positions
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(self.device)
        self._rows = torch.as_tensor(rows, device=self.device)
        self._filled.clear()
        try:
            self.decoder(**inputs)
        finally:
            self._rows = None
        missing = {(name, i) for name, found in self.sites.items() for i in range(len(found))} - self._filled
        if missing:
            name, layer = min(missing)
            raise CaptureError(
                f"site {name!r} of layer {layer} was not reached by a forward pass ({len(missing)} sites missed); "
                "expected every site to run once. If the model is compiled, measure before compiling it"
            )


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of texts in batches of like length, each of at most ``tokens`` tokens with its padding (or one text)."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
