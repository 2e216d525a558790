"""Measuring a model that does not fit: one layer at a time, and every text through it before the next one comes.

Each layer's weights are loaded once for the whole sample set, those of the next while it computes. Between two layers
lie the hidden states of all texts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...forward.packing import Batch
from ...models.families import Layout
from ...models.sites import Site
from ...models.structure import text_config
from ...models.weights import LayerWeights, Traffic, WeightsError, exact, in_turn
from ...utils.machine import free_memory, wait_for
from ..blocks import Block
from ..counting import Counting
from .hidden_states import HiddenStates
from .one_layer import Anatomy, LayerwiseError, OneLayer


def why_not(model: nn.Module, layout: Layout | None = None) -> str | None:
    """Why a model cannot be measured layer by layer, as far as can be told without running it; None if it can."""
    try:
        Layerwise(model, {}, layout=layout)
    except (LayerwiseError, WeightsError) as error:
        return str(error)
    return None


class Layerwise:
    """Runs blocks of texts through a model layer by layer.

    Args:
        model: a Transformers model of a known family: offloaded to disk or the CPU by accelerate, or resident, there
            or on another device than ``device``.
        sites: what to read; the layers above the highest are neither loaded nor run.
        device: where to compute; by default where accelerate would, or where the model is.
        scratch: a folder for hidden states that do not fit into memory; by default a temporary one.
        memory: bytes of the CPU's memory that hidden states may take, half of what is free by default.
        persistent: whether the hidden states stay in ``scratch`` if the run is killed, so that another can go on.
        tree: how batches with shared prompts are handed over, one of :data:`austeer.forward.tree_masks.FORMS`.
        layout: attribute paths, where they are not those of the model's family.

    Attributes:
        tree: as given; what a run goes by. layers: numbers of the layers that are run.
        traffic: bytes of weights read and held, seconds waited for them.
        computed: seconds of forward passes and counting.

    Raises:
        LayerwiseError, WeightsError: a family that is not known; a quantised, compiled or split model.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Sequence[Site]],
        *,
        device: torch.device | str | None = None,
        scratch: str | Path | None = None,
        memory: int | None = None,
        persistent: bool = False,
        tree: str = "tensor",
        layout: Layout | None = None,
    ):
        if persistent and scratch is None:
            raise LayerwiseError("persistent: found no scratch folder, expected one that the next run is given, too")
        self._anatomy = Anatomy(model, layout)
        self.sites, self.tree = sites, tree
        self._scratch = None if scratch is None else Path(scratch)
        self._memory, self._persistent = memory, persistent
        top = max((site.layer for found in sites.values() for site in found), default=len(self._anatomy.layers) - 1)
        self.layers = range(top + 1)
        self._asked = None if device is None else exact(device)
        self.device = self._asked or self._anatomy.device()
        self.traffic = Traffic()
        self.computed = 0.0
        self._parts()  # what cannot be loaded is refused now

    def _parts(self) -> tuple[LayerWeights, LayerWeights, list[LayerWeights]]:
        """What is there all the time, the token embedding, and the layers."""
        anatomy = self._anatomy
        groups = [anatomy.around(), anatomy.modules(anatomy.embedding)]
        groups += [anatomy.modules(anatomy.layers[number]) for number in self.layers]
        around, embedding, *layers = (LayerWeights(modules, self._asked, self.traffic) for modules in groups)
        return around, embedding, layers

    def run(
        self,
        blocks: Iterable[Block],
        counting: Mapping[str, Counting],
        *,
        on_batch: Callable[[Batch], None] | None = None,
        on_layer: Callable[[int], None] | None = None,
        first_layer: int = 0,
    ) -> None:
        """Counts all blocks at all sites. Afterwards the model is as it was, also after an error.

        Args:
            blocks: all are held; that is a small part of what the hidden states take.
            counting: by the name of the site, with a row for each of its layers; on ``device``.
            on_batch: called when a layer was run over a batch.
            on_layer: called with a layer's number when it was run over all blocks and is counted. What is saved here
                is enough to go on from, if the hidden states are persistent.
            first_layer: the first layer that is not counted yet. Above 0 it goes on with the same blocks from what an
                earlier run left in ``scratch``.

        Raises:
            LayerwiseError, ScratchError, WeightsError: a layer, hidden states or weights that cannot be had.
        """
        if first_layer and not self._persistent:
            raise LayerwiseError(f"first_layer: found {first_layer} without persistent hidden states, expected 0")
        blocks = list(blocks)
        batches = [batch for block in blocks for batch in block.batches]
        if not batches:
            return
        around, embedding, parts = self._parts()
        states = HiddenStates(
            [(batch.ids.shape[0], batch.ids.shape[1]) for batch in batches],
            text_config(self._anatomy.model).hidden_size,
            self._anatomy.embedding.weight.dtype,
            device=self.device,
            room=free_memory(self.device) // 2 - 2 * max(part.size for part in (embedding, *parts)),
            memory=self._memory,
            folder=self._scratch,
            persistent=self._persistent,
            digest=self._digest(batches),
            resume=first_layer > 0,
        )
        layers = self.layers[first_layer:]
        order = [*([] if first_layer else [embedding]), *(parts[number] for number in layers)]
        try:
            with around.here(), closing(in_turn(order)) as turn:
                if not first_layer:
                    next(turn)
                    states.begin(-1)
                    self._timed(self._embed, batches, states)
                    states.complete(-1)
                for number in layers:
                    next(turn)
                    states.begin(number)
                    self._timed(self._run_layer, number, blocks, states, counting, on_batch)
                    states.complete(number)
                    if on_layer is not None:
                        on_layer(number)
            states.delete()
        finally:
            states.close()

    def _timed(self, work: Callable[..., None], *args: Any) -> None:
        start = time.perf_counter()
        try:
            work(*args)
            wait_for(self.device)
        finally:
            self.computed += time.perf_counter() - start

    def _embed(self, batches: Sequence[Batch], states: HiddenStates) -> None:
        with OneLayer(self._anatomy, 0, {}, 1, self.device, self.tree, states).attached() as layer:
            for number, batch in enumerate(batches):
                layer.embed(number, batch)

    def _run_layer(
        self,
        number: int,
        blocks: Sequence[Block],
        states: HiddenStates,
        counting: Mapping[str, Counting],
        on_batch: Callable[[Batch], None] | None,
    ) -> None:
        rows = {name: i for name, found in self.sites.items() for i, site in enumerate(found) if site.layer == number}
        sites = {name: [self.sites[name][i]] for name, i in rows.items()}
        texts = max(2 * block.pairs for block in blocks)
        index = 0
        with OneLayer(self._anatomy, number, sites, texts, self.device, self.tree, states).attached() as layer:
            for block in blocks:
                for batch in block.batches:
                    layer.run(index, batch)
                    index += 1
                    if on_batch is not None:
                        on_batch(batch)
                if block.pairs:
                    for name, row in rows.items():
                        counting[name].add(layer.buffers[name], block.pairs, block.offset, row=row, half=block.half)

    def _digest(self, batches: Sequence[Batch]) -> str:
        """Of what the hidden states depend on, but the weights."""
        anatomy, width = self._anatomy, text_config(self._anatomy.model).hidden_size
        known = (anatomy.family, len(anatomy.layers), width, anatomy.embedding.weight.dtype, self.tree)
        digest = hashlib.sha256(repr(known).encode())
        for batch in batches:
            for t in (batch.ids, batch.ends, batch.texts, batch.positions, batch.sees):
                digest.update(b"-" if t is None else repr(tuple(t.shape)).encode() + t.contiguous().numpy().tobytes())
        return digest.hexdigest()
