"""What each strategy takes to measure a model: bytes and seconds, from its shapes, the tokens and the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import SiteError
from ..forward.batch_size import automatic_batch_tokens
from ..measuring.arguments import chosen_layers
from ..measuring.layerwise.one_layer import Anatomy, LayerwiseError
from ..models.families import Layout
from ..models.load import WEIGHTS
from ..models.sites import find_sites
from ..models.skeleton import skeleton
from ..models.structure import text_config
from ..utils.machine import Machine
from .shapes import batch_bytes, buffer_bytes, count_parameters, counter_bytes, layer_works
from .workload import Workload


@dataclass(frozen=True)
class Need:
    """What a strategy takes. Sizes are bytes, at the peak.

    Attributes:
        weights: held at once: the whole model (resident), or a layer and the next (layerwise). None: quantised.
        counters: of all AUs. buffers: last-token activations of a block. activations: of the largest batch.
        texts: tokens and masks that stay in the CPU's memory from layer to layer (layerwise).
        hidden: hidden states of the sample set (layerwise), in ``place``: "device", "memory" or "file".
        read: of weights, from disk, once; None: not known. moved: of hidden states, to and from a file.
        compute: seconds of matrix products. disk: seconds for what is read and moved; None: not known.
        seconds: of both. Layer by layer the one goes on beside the other, otherwise weights are loaded before.
        fits: whether there is room for all of it now; None: not known.
    """

    weights: int | None
    counters: int
    buffers: int
    activations: int
    read: int | None
    compute: float
    disk: float | None
    seconds: float | None
    fits: bool | None
    texts: int = 0
    hidden: int = 0
    place: str = ""
    moved: int = 0

    @property
    def memory(self) -> int | None:
        """Bytes on the device, without texts and hidden states."""
        if self.weights is None:
            return None
        return self.weights + self.counters + self.buffers + self.activations


class Subject:
    """A model to be measured at some sites of some layers.

    Args:
        saved, dtype: of its parameters, in its files and when it runs.
        sites, layers, layout: as in :func:`austeer.measure`.

    Attributes:
        network: its skeleton. sites: of the layers measured. parameters: how many, and where.
        works: what each layer that runs does for a token. experts: how many of how many run; None without a mixture.
        refused: why it cannot be measured layer by layer; None if it can.
        notes: what is not known of it.

    Raises:
        ModelError, SiteError: a config that no model can be built from; a site or layer that it does not have.
    """

    def __init__(
        self,
        config: Any,
        saved: torch.dtype,
        dtype: torch.dtype,
        sites: str | Sequence[str],
        layers: Iterable[int] | None = None,
        layout: Layout | None = None,
    ):
        self.saved, self.dtype = saved, dtype
        self.network: nn.Module = skeleton(config, dtype)
        names = [sites] if isinstance(sites, str) else list(sites)
        if not names:
            raise SiteError("sites: found none, expected at least one name, for example sites=['attention']")
        found = find_sites(self.network, [*names, "layer", "attention"], layout)
        chosen = chosen_layers(layers, len(found["layer"]))
        works = layer_works(self.network, found)
        self.sites = {name: [found[name][number] for number in chosen] for name in dict.fromkeys(names)}
        self.parameters = count_parameters(self.network, found["layer"])
        depth = chosen[-1] + 1
        self.works = works[:depth]
        self.experts = next((layer.experts for layer in self.works if layer.experts), None)
        self.quantised = getattr(config, "quantization_config", None) is not None
        self.refused = "its weights are quantised" if self.quantised else None
        try:
            Anatomy(self.network, layout)
        except LayerwiseError as error:
            self.refused = str(error)
        self.notes = list(self._notes())

    def _notes(self) -> Iterable[str]:
        if self.quantised:
            yield (
                "the checkpoint is quantised: its config does not say how many bytes the weights take, so neither the "
                "memory nor the time to read them is known; the parameters are those of the model before, and its "
                "products may run at another rate"
            )
        if self.saved != self.dtype:
            yield f"weights are read as {_name(self.saved)} and converted to {_name(self.dtype)}"
        if self.experts and self.experts[0] == self.experts[1]:
            yield f"all {self.experts[1]} experts run for every token, or nothing says how many do"
        elif self.experts and self.refused is None:
            yield (
                "layer by layer, experts kept apart in the checkpoint are first converted: read and written once more"
            )
        if any(not layer.attention for layer in self.works):
            yield "the recurrence of linear attention layers is not counted: neither its operations nor its activations"

    def flops(self, work: Workload) -> int:
        return sum(layer.flops(work.tokens_padded, work.squares) for layer in self.works)

    def batch_tokens(self, free: int, device: torch.device) -> int:
        """Tokens in a batch where none are given, in what the weights leave of ``free`` bytes."""
        whole = self.parameters.total * self.dtype.itemsize
        left = free - whole if whole <= WEIGHTS * free else free - self._two_layers()
        return automatic_batch_tokens(self.network, device, left)

    def product(self, work: Workload) -> tuple[int, int, int]:
        """Tokens, inputs and outputs of the largest product in an average batch; a token of a mixture meets few."""
        run, of = self.experts or (1, 1)
        return max(1, work.tokens_padded * run // (of * max(work.batches, 1))), *self.works[-1].largest

    def needs(self, work: Workload, machine: Machine, block_pairs: int, persistent: bool) -> tuple[Need, Need | None]:
        """Of the resident strategy, and of layer by layer if it can be, with hidden states kept in two files or not."""
        itemsize, compute = self.dtype.itemsize, self.flops(work) / machine.matmul
        passes = [batch_bytes(self.network, self.works, r, n, itemsize, tree) for r, n, tree in work.shapes]
        same: dict[str, Any] = {"counters": counter_bytes(self.sites), "activations": max(passes, default=0)}
        same["compute"] = compute
        beside = same["counters"] + same["activations"]

        whole = read = disk = fits = None
        buffers = buffer_bytes(self.sites, block_pairs, itemsize)
        if not self.quantised:
            whole, read = (self.parameters.total * dtype.itemsize for dtype in (self.dtype, self.saved))
            disk = None if machine.read is None else read / machine.read
            fits = whole <= WEIGHTS * machine.free and whole + buffers + beside <= machine.free
        seconds = None if disk is None else compute + disk
        resident = Need(weights=whole, buffers=buffers, read=read, disk=disk, seconds=seconds, fits=fits, **same)
        if self.refused is not None:
            return resident, None

        weights, read = self._two_layers(), sum(self._run) * self.saved.itemsize
        hidden = work.tokens_padded * text_config(self.network).hidden_size * itemsize
        place = "file" if persistent else _place(hidden, weights, machine)
        moved = 2 * len(self.works) * hidden if place == "file" else 0
        hidden *= 2 if persistent else 1  # two files in turn
        disk = None if machine.read is None else (read + moved) / machine.read
        buffers = buffer_bytes({name: found[:1] for name, found in self.sites.items()}, block_pairs, itemsize)
        device = weights + buffers + beside + (hidden if place == "device" else 0)
        host = work.packed + (hidden if place == "memory" else 0)
        if machine.device == "cpu":
            room = device + host <= machine.free
        else:
            room = device <= machine.free and host + weights <= machine.host_free
        layerwise = Need(
            weights=weights,
            buffers=buffers,
            texts=work.packed,
            hidden=hidden,
            place=place,
            read=read,
            moved=moved,
            disk=disk,
            seconds=None if disk is None else max(compute, disk),
            fits=room and (place != "file" or hidden <= machine.disk_free),
            **same,
        )
        return resident, layerwise

    @property
    def _run(self) -> list[int]:
        """Parameters of what runs: the embedding, then the layers."""
        return [self.parameters.embedding, *self.parameters.layers[: len(self.works)]]

    def _two_layers(self) -> int:
        """Bytes of the two largest parts that follow each other."""
        return self.dtype.itemsize * max(a + b for a, b in pairwise(self._run))


def _place(hidden: int, weights: int, machine: Machine) -> str:
    """Where :class:`austeer.measuring.layerwise.hidden_states.HiddenStates` will be."""
    if machine.device != "cpu" and hidden <= machine.free // 2 - weights:
        return "device"
    return "memory" if hidden <= machine.host_free // 2 else "file"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
