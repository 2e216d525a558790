"""One layer of a model run by the model's own forward pass, on hidden states from elsewhere.

Masks, windows and position embeddings stay the model's business: the layers below pass on what they are given, the
layer itself takes stored hidden states in place of that, and the layers above are not there. The token embedding gives
zeros, so that its weights are not needed.

That is exact where a layer takes nothing from the layers below and the embedding but the hidden states. It is checked:
with noise in place of the zeros every other argument of the layer must stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn

from ...errors import AusteerError
from ...forward.capture import LastTokens
from ...forward.packing import Batch
from ...models.families import LAYOUTS, Layout
from ...models.hooks import hooks_on
from ...models.sites import Site, layers_path
from ...models.structure import decoder_of, first_layers, first_tensor, text_config, unwrap
from ...models.tensor_parallel import is_split
from ...models.weights import exact
from .hidden_states import HiddenStates

INSTEAD = "measure with strategy='resident'"


class LayerwiseError(AusteerError):
    """A model that cannot be measured layer by layer."""


class _Reached(Exception):
    """Ends a forward pass where a layer would begin."""


class Anatomy:
    """A model taken apart.

    Attributes:
        family: names the model in errors. root: path of the list of layers. layers: all of them.
        embedding: of the tokens. paths: of every module.

    Raises:
        LayerwiseError: a family that is not known; a quantised, compiled or split model.
    """

    def __init__(self, model: nn.Module, layout: Layout | None = None):
        self.model = unwrap(model)
        self.decoder = decoder_of(self.model)
        config = text_config(self.model)
        self.family = f"{type(self.model).__name__} ({config.model_type})"
        embedding = self.decoder.get_input_embeddings() if hasattr(self.decoder, "get_input_embeddings") else None  # type: ignore[operator]
        found = None
        if config.model_type not in LAYOUTS:
            found = "a family that was not tried"
        elif getattr(getattr(self.model, "config", None), "quantization_config", None) is not None:
            found = "quantised weights"
        elif any(is_split(p) for p in self.decoder.parameters()):
            found = "weights that are split over processes"
        elif any(getattr(module, "_compiled_call_impl", None) is not None for module in self.decoder.modules()):
            found = "a compiled model"
        elif not isinstance(embedding, nn.Embedding):
            found = f"a {type(embedding).__name__} as the token embedding"
        if found is not None:
            raise LayerwiseError(f"{self.family}: found {found}, which cannot be measured layer by layer; {INSTEAD}")
        assert isinstance(embedding, nn.Embedding)
        self.embedding = embedding
        self.root = layers_path(self.model, layout)
        self.layers = list(self.model.get_submodule(self.root).children())
        self.paths = {module: path for path, module in self.model.named_modules()}

    def device(self) -> torch.device:
        """Where tokens go in: where accelerate runs the embedding, or where it is."""
        for hook in hooks_on(self.embedding):
            if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
                return exact(hook.execution_device)
        return self.embedding.weight.device

    def modules(self, *roots: nn.Module) -> dict[str, nn.Module]:
        """All modules in the given ones, by their paths from the model's root."""
        return {self.paths[module]: module for root in roots for module in root.modules()}

    def around(self) -> dict[str, nn.Module]:
        """The decoder's modules that are neither in a layer nor the token embedding."""
        apart = self.modules(self.embedding, *self.layers)
        return {path: module for path, module in self.modules(self.decoder).items() if path not in apart}


class OneLayer:
    """Passes through a model in which one layer only is run.

    Args:
        number: of the layer. sites: what to read in it. texts: how many texts the buffers hold.
        device: where to compute. tree: see :class:`austeer.forward.capture.LastTokens`.
        states: the stored hidden states, and how each layer below returns its output.

    Attributes:
        buffers: of the sites, [texts, 1, width].
    """

    def __init__(
        self,
        anatomy: Anatomy,
        number: int,
        sites: Mapping[str, Sequence[Site]],
        texts: int,
        device: torch.device,
        tree: str,
        states: HiddenStates,
    ):
        self._anatomy, self._number, self._device, self._states = anatomy, number, device, states
        self._capture = LastTokens(anatomy.model, sites, texts, device)
        self._capture.tree = tree
        self.buffers = self._capture.buffers
        self._layer = anatomy.layers[number]
        self._batch = 0  # the number of the one that runs, and its rows; None: it is not to run
        self._rows: slice | None = None
        self._form: int | None = None
        self._arguments: dict[str, Any] = {}
        self._hidden: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[OneLayer]:
        """Passes can be run while the context is open; afterwards the model is as it was."""
        with first_layers(self._anatomy.model, self._anatomy.root, self._number + 1), self._capture.attached():
            before = self._layer.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
            after = self._layer.register_forward_hook(self._after)
            try:
                yield self
            finally:
                before.remove()
                after.remove()

    def embed(self, number: int, batch: Batch) -> None:
        """Stores what layer 0 would be given; it is not run."""
        hidden, _ = self._inputs(batch)
        self._states.write(number, hidden)

    def run(self, number: int, batch: Batch) -> None:
        """Raises LayerwiseError where the layer takes more than the hidden states, or has no room for the batch."""
        with self._below(noise=False):
            first = self._run(number, batch, 0)
        if self._form is None:
            self._form = self._states.forms[self._number]
            self._check(first, self._arguments)

    def _run(self, number: int, batch: Batch, row: int) -> Batch:
        """A batch, or where it does not fit into a GPU's memory its halves; ``row``: where it begins. The last one."""
        self._batch, self._rows = number, slice(row, row + batch.ids.shape[0])
        try:
            self._capture.run(batch)
        except torch.OutOfMemoryError as error:
            # A row is stored as it is: its texts cannot be run apart here.
            halves = batch.halves() if batch.ids.shape[0] > 1 else None
            if halves is None:
                raise LayerwiseError(
                    f"a row of {batch.ids.shape[1]} tokens does not fit into the memory of {self._device} beside two "
                    "layers; cut texts with max_length"
                ) from error
        else:
            if self._rows is not None:
                raise LayerwiseError(f"{self._anatomy.family}: its forward pass left out layer {self._number}")
            return batch
        finally:
            self._rows = None
        torch.cuda.empty_cache()
        self._run(number, halves[0], row)
        return self._run(number, halves[1], row + halves[0].ids.shape[0])

    def _inputs(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """What the layer would be given: the hidden states, and all else by name."""
        with suppress(_Reached):
            self._capture.run(batch)
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return hidden, self._arguments

    def _check(self, batch: Batch, found: Mapping[str, Any]) -> None:
        with self._below(noise=True):
            _, other = self._inputs(batch)
        for name in sorted({*found, *other}):
            if not _equal(found.get(name), other.get(name)):
                raise LayerwiseError(
                    f"{self._anatomy.family}: layer {self._number} is given {name}, which is state or depends on the "
                    f"token embedding or on other layers; expected only hidden states to do so. {INSTEAD}"
                )

    def _before(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        name = "argument 0" if args else "hidden_states"
        hidden, self._arguments = named.pop(name), named
        if self._rows is None:
            self._hidden = hidden
            raise _Reached
        stored = self._states.read(self._batch, self._rows, self._device)
        return ((stored, *args[1:]), kwargs) if args else (args, kwargs | {name: stored})

    def _after(self, layer: nn.Module, args: tuple, output: Any) -> None:
        assert self._rows is not None
        self._states.forms[self._number :] = [len(output) if isinstance(output, tuple) else 0]
        self._states.write(self._batch, first_tensor(output), self._rows)
        self._rows = None

    @contextmanager
    def _below(self, noise: bool) -> Iterator[None]:
        """The embedding gives zeros or noise, and the layers below pass on what they are given."""
        width, dtype = self._anatomy.embedding.embedding_dim, self._anatomy.embedding.weight.dtype

        def embedding(ids: Tensor, *args, **kwargs) -> Tensor:
            # Llama 4 sends the ids to where its embedding is: to the meta device.
            if not noise:
                return torch.zeros(*ids.shape, width, dtype=dtype, device=self._device)
            count = torch.arange(ids.numel() * width, device=self._device, dtype=torch.float32)
            return (count * 0.6180339887 % 1 - 0.5).to(dtype).view(*ids.shape, width)

        def passing(form: int) -> Callable:
            def forward(*args, **kwargs):
                hidden = args[0] if args else kwargs["hidden_states"]
                beside = torch.full((), float(noise), dtype=dtype, device=hidden.device)
                return (hidden, *[beside] * (form - 1)) if form else hidden

            return forward

        stubs = {layer: passing(self._states.forms[i]) for i, layer in enumerate(self._anatomy.layers[: self._number])}
        with _forwards({self._anatomy.embedding: embedding, **stubs}):
            yield


@contextmanager
def _forwards(new: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Modules run other functions for a while, in place of their forward and of accelerate's wrapper around it."""
    before: dict[nn.Module, Callable | None] = {module: vars(module).get("forward") for module in new}
    try:
        for module, forward in new.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, old in before.items():
            if old is not None:
                vars(module)["forward"] = old
            else:
                vars(module).pop("forward", None)


def _equal(one: object, other: object) -> bool:
    """Whether two arguments are the same plain values; what may hold state is never the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return (one is None and other is None) or (isinstance(one, (bool, int, float, str)) and one == other)
