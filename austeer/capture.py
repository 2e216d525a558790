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

from .errors import CaptureError, PairsError
from .sharding import held
from .sites import Site, decoder_of, input_device, unwrap


def first_tensor(output: Tensor | tuple | list) -> Tensor:
    """A module's output without what comes beside it (attention weights, a router's logits)."""
    return output[0] if isinstance(output, (tuple, list)) else output


def vocabulary_size(model: nn.Module) -> int:
    """How many tokens have an embedding."""
    return unwrap(model).get_input_embeddings().num_embeddings  # type: ignore[operator]


def check_vocabulary(model: nn.Module, token_ids: Sequence[Sequence[int]]) -> None:
    """Raises PairsError if a token has no embedding: the tokenizer is another model's."""
    size = vocabulary_size(model)
    largest = max((max(ids, default=0) for ids in token_ids), default=0)
    if largest >= size:
        raise PairsError(
            f"found token {largest}, and the model's vocabulary has {size}; expected the model's own tokenizer"
        )


class LastTokens:
    """Buffers of last-token activations: for each site name [texts, layers, width], in the activations' own dtype.

    Args:
        model: a Transformers model, with or without its head, whose parameters may be offloaded.
        sites: what to read, from :func:`austeer.sites.find_sites`.
        texts: how many texts the buffers hold.

    Raises:
        CaptureError: the model is split over processes, and a site with it.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Sequence[Site]], texts: int):
        self.model = unwrap(model)
        self.decoder = decoder_of(self.model)
        for site in (site for found in sites.values() for site in found):
            if held(self.model, site) is not None:
                raise CaptureError(
                    f"site {site.name!r} of layer {site.layer} ({site.path}): found a slice of it in this process, "
                    "expected the whole; measure on the model in one piece (its plans steer the split one, too)"
                )
        self.sites = sites
        self.device = input_device(self.model)
        self.texts = texts
        self.buffers: dict[str, Tensor] = {}  # made when a site first runs, in the dtype that it turns out to have
        self._rows: Tensor | None = None
        self._shape = torch.Size()  # [batch, tokens] of the batch that runs
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
        def keep(x: Tensor) -> None:
            if self._rows is None:
                return
            if x.shape[:-1] not in (self._shape, (self._shape.numel(),)):
                raise CaptureError(
                    f"site {name!r} of layer {number}: found a tensor {tuple(x.shape)}, expected [batch, tokens, width]"
                    f" = [{self._shape[0]}, {self._shape[1]}, width] or [batch * tokens, width]"
                )
            last = x.view(*self._shape, x.shape[-1])[:, -1] if x.dim() == 2 else x[:, -1]  # some blocks flatten
            if name not in self.buffers:
                shape = (self.texts, len(self.sites[name]), x.shape[-1])
                self.buffers[name] = torch.empty(shape, dtype=x.dtype, device=self.device)
            buffer = self.buffers[name]
            if x.dtype != buffer.dtype:
                raise CaptureError(
                    f"site {name!r}: found {x.dtype} in layer {number} and {buffer.dtype} in an earlier one, "
                    "expected one dtype; load the model in one"
                )
            buffer[self._rows, number] = last.to(self.device)
            self._filled.add((name, number))

        if side == "input":
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: keep(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: keep(first_tensor(output)))

    @torch.no_grad()
    def run(self, token_ids: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        """Runs one batch of texts, padded on the left, and fills ``rows`` of the buffers.

        Raises:
            CaptureError: a site was not reached by this forward pass.
            PairsError: a token that the model does not have.
        """
        length = max(map(len, token_ids))
        ids, mask = torch.zeros(2, len(token_ids), length, dtype=torch.int64)  # padding is masked: any id will do
        for i, tokens in enumerate(token_ids):
            ids[i, length - len(tokens) :] = torch.as_tensor(tokens)
            mask[i, length - len(tokens) :] = 1
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device), "use_cache": False}
        if "position_ids" in self._accepts:  # padding must not move a text to other positions
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(self.device)
        check_vocabulary(self.model, token_ids)
        self._rows, self._shape = torch.as_tensor(rows, device=self.device), ids.shape
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the context: dropout would change what is read."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
