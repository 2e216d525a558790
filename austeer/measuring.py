"""measure(): pairs -> Momentum."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .blocks import Blocks
from .capture import vocabulary_size
from .checkpoint import Checkpoint
from .choices import chosen_layers, chosen_strategy, is_offloaded, length_limit, tokenizer_signature
from .errors import CaptureError, FileFormatError, PairsError, SiteError, SteeringError, check_count
from .families import LAYOUTS
from .layerwise import Layerwise
from .measured import MeasureReport
from .memory import automatic_batch_tokens
from .momentum import Momentum, counters_from, tensors_of
from .pairs import Pair, Pairs
from .processes import Processes
from .recording import ActivationWriter
from .sharing import tree_form
from .sites import Layout, decoder_of, find_sites, fingerprint, floating_dtype, input_device, layers_path
from .steering import has_virtual_tokens, is_steered
from .strategies import run_layerwise, run_resident
from .stream import PairStream
from .tally import Tally
from .trees import forms, longest_short_text
from .truncation import first_layers
from .weights import signature

STRATEGIES = ("auto", "resident", "layerwise")

#: Pairs in a block: the unit of counting, of checkpoints and of splitting over processes. Large enough that texts of
#: like length meet, small enough that few pairs still keep several processes busy.
BLOCK_PAIRS = 128


def measure(
    model: nn.Module,
    tokenizer,
    pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]],
    sites: str | Sequence[str] = ("attention", "ffn"),
    *,
    layers: Iterable[int] | None = None,
    strategy: str = "auto",
    share_prompts: bool = True,
    batch_tokens: int | None = None,
    block_pairs: int = BLOCK_PAIRS,
    max_length: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 8 * BLOCK_PAIRS,
    resume: bool = False,
    distributed: bool = False,
    save_activations: str | Path | None = None,
    scratch: str | Path | None = None,
    device: str | torch.device | None = None,
    layout: Layout | None = None,
    progress: bool | None = None,
) -> Momentum:
    """Counts activation momentum over contrastive pairs (paper, section on activation momentum).

    Every text runs through the model without its head; the activations of its last token at each site are kept for
    ``block_pairs`` pairs at a time and counted by one kernel call a site, and by one more for the pairs of one half
    (:mod:`austeer.halves`). Values are compared as the model made them.
    What texts have in common (the prompt of a pair; a prompt that pairs share) runs once. Texts of like length share
    a batch. ``momentum.report`` says how it went.

    Args:
        model: a Transformers decoder, in evaluation mode for the time of the call.
        tokenizer: the model's own. One without a pad token is fine.
        pairs: from :func:`load_pairs`, :func:`stream_pairs` (any number), or (prompt, positive, negative) tuples.
        sites: names of sites, see :mod:`austeer.sites`.
        layers: measure these layers only, for example ``range(12)``; those above the highest are not run.
        strategy: "resident" runs each batch through the whole model; "layerwise" loads each layer once and runs all
            pairs through it, which is what a model wants whose weights are offloaded; "auto" takes layerwise for
            such a model where it can.
        share_prompts: False runs every text whole. Models that cannot share do so anyway (the report says which).
        batch_tokens: tokens in a batch, padding included; by default what suits the device and its free memory.
        block_pairs: pairs whose activations are held at a time.
        max_length: longer texts are cut on the left to so many tokens; the model's context by default.
        checkpoint: a file in which the counters are kept while measuring; remove it when the result is saved.
        checkpoint_every: pairs between two checkpoints, rounded up to whole blocks.
        resume: go on from the checkpoint, if it is there.
        distributed: split the pairs over the processes of ``accelerate launch``; each returns the whole result.
        save_activations: a folder in which the last-token activations are kept, to be counted again without the model
            (:func:`austeer.momentum_from_activations`); resident only.
        scratch: a folder for hidden states that do not fit into memory (layerwise); by default the system's temporary
            one. With a checkpoint they are always kept in a folder, by default beside it.
        device: layerwise, where to compute: for example a GPU that has no room for a model in the CPU's memory.
        layout: attribute paths of a model whose family is not known.
        progress: a progress bar on standard error; by default if that is a terminal.

    Raises:
        PairsError, SiteError: unusable pairs; a site, layer or family that is not known.
        CaptureError: an activation is NaN or infinite (site, layer and pair are named), or a site was not reached.
        FileFormatError: the checkpoint is damaged or of another run, or one is there and ``resume`` was not asked for.
        SteeringError: the model is steered now.
        MeasurementInterrupted: Ctrl-C or SIGTERM, with a checkpoint.
    """
    options: dict[str, Any] = {
        "layers": layers,
        "strategy": strategy,
        "share_prompts": share_prompts,
        "batch_tokens": batch_tokens,
        "block_pairs": block_pairs,
        "max_length": max_length,
        "checkpoint": checkpoint,
        "checkpoint_every": checkpoint_every,
        "resume": resume,
        "distributed": distributed,
        "save_activations": save_activations,
        "scratch": scratch,
        "device": device,
        "layout": layout,
        "progress": progress,
    }
    return Measurement(model, tokenizer, pairs, sites, **options).run()


class Measurement:
    """One call of :func:`measure`: its arguments checked, and what both strategies work on.

    Attributes:
        sites: what is read, of the layers asked for. depth: how many layers have to run.
        root: path of the list of layers. device: where tokens go in.
        tally: what is counted so far. report: how it goes. every: blocks between two checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]],
        sites: str | Sequence[str],
        *,
        layers: Iterable[int] | None,
        strategy: str,
        share_prompts: bool,
        batch_tokens: int | None,
        block_pairs: int,
        max_length: int | None,
        checkpoint: str | Path | None,
        checkpoint_every: int,
        resume: bool,
        distributed: bool,
        save_activations: str | Path | None,
        scratch: str | Path | None,
        device: str | torch.device | None,
        layout: Layout | None,
        progress: bool | None,
    ):
        if has_virtual_tokens(model):
            raise CaptureError(
                "found a PEFT model with virtual tokens (prompt or prefix tuning), which the decoder alone does not "
                "run; measure on the base model, or with an adapter of another kind"
            )
        if is_steered(model):
            raise SteeringError(
                "the model is steered: its activations are not its own. Leave the steering context first"
            )
        if not isinstance(pairs, (Pairs, PairStream)):
            pairs = Pairs.of(pairs)
        if isinstance(pairs, Pairs) and not pairs:
            raise PairsError(f"{pairs.source}: found no pairs, expected at least one")
        if strategy not in STRATEGIES:
            raise CaptureError(f"strategy: found {strategy!r}, expected one of {', '.join(STRATEGIES)}")
        self.block_pairs = check_count("block_pairs", block_pairs, 2**20, "pairs held at a time", PairsError)
        self.every = -(-check_count("checkpoint_every", checkpoint_every, 2**62, "pairs", PairsError) // block_pairs)
        if batch_tokens is not None:
            check_count("batch_tokens", batch_tokens, 2**40, "tokens in a batch", PairsError)
        found = find_sites(model, sites, layout)
        if not found:
            raise SiteError("sites: found none, expected at least one name, for example sites=['attention']")
        self.model, self.pairs, self.progress = model, pairs, progress
        self.fingerprint = fingerprint(model, found)
        self.layers = chosen_layers(layers, self.fingerprint.layers)
        self.sites = {name: [site for site in all_ if site.layer in self.layers] for name, all_ in found.items()}
        self.depth, self.root = max(self.layers) + 1, layers_path(model, layout)
        self.max_length = length_limit(model, max_length)
        self.processes = Processes.launched() if distributed else Processes()
        part = (self.processes.index, self.processes.count)
        strategy = chosen_strategy(model, strategy, device, layout)
        if strategy == "layerwise" and save_activations is not None:
            raise CaptureError(
                "save_activations: found the layerwise strategy, which has the activations of one layer at a time; "
                "expected strategy='resident'"
            )
        self.report = MeasureReport(strategy=strategy, processes=self.processes.count)
        self.checkpoint = None
        if checkpoint is not None:
            settings: dict[str, Any] = {
                "sites": list(self.sites),
                "model": self.fingerprint.to_json(),
                "dtype": str(floating_dtype(model)),
                "layers": list(self.layers),
                "pairs": pairs.source,
                "chat_template": pairs.chat_template,
                "block_pairs": block_pairs,
                "max_length": self.max_length,
                "share_prompts": share_prompts,
                "strategy": strategy,
                "tokenizer": tokenizer_signature(tokenizer),
                "weights": signature(model),
                "save_activations": str(save_activations),
            }
            self.checkpoint = Checkpoint(checkpoint, settings, part)
        self.layerwise = None
        if strategy == "layerwise":
            if self.checkpoint is not None:
                scratch = Path(scratch or self.checkpoint.path.parent, f"{self.checkpoint.path.name}.hidden")
            self.layerwise = Layerwise(
                model, self.sites, device=device, scratch=scratch, persistent=checkpoint is not None, layout=layout
            )
        self.device = self.layerwise.device if self.layerwise else input_device(model)
        self._warned = False
        self.tally, self.first_layer = Tally(self.sites, self.device), 0
        self.writer = None
        if save_activations is not None:
            self.writer = ActivationWriter(
                save_activations,
                self.fingerprint,
                layers=self.layers,
                chat_template=pairs.chat_template,
                source=pairs.source,
                resume=resume or self.processes.count > 1,
            )
        resumed = self._resumed(resume)
        self.resumed_digest = resumed.get("all_pairs")
        self.batch_tokens = self._batch_tokens(batch_tokens, resumed.get("batch_tokens"))
        self.tree = self._tree() if share_prompts else None
        if resumed and resumed["tree"] != self.tree:
            raise FileFormatError(
                f"{checkpoint}: found shared prompts run as {resumed['tree']!r}, and this model on this device takes "
                f"{self.tree!r}; go on where it was begun, or start anew"
            )
        if self.layerwise is not None and self.tree is not None:
            self.layerwise.tree = self.tree
        self.report.shared_prompts, self.report.batch_tokens = self.tree is not None, self.batch_tokens
        self.blocks = Blocks(
            tokenizer,
            pairs,
            source=pairs.source,
            chat_template=pairs.chat_template,
            vocabulary=vocabulary_size(model),
            max_length=self.max_length,
            block_pairs=block_pairs,
            batch_tokens=self.batch_tokens,
            share=self.tree is not None,
            apart=longest_short_text(model),
            first=self.tally.block,
            known=self.tally.digest,
            part=part,
            pin=self.device.type == "cuda",
            seconds=self.report.seconds,
        )

    def _batch_tokens(self, asked: int | None, earlier: int | None) -> int:
        """What is asked for, else what this run had before it was interrupted, else what suits; alike everywhere."""
        if asked is not None and earlier is not None and asked != earlier:
            raise FileFormatError(
                f"batch_tokens: found {asked}, and the checkpoint is of a run with {earlier}; give that, or none"
            )
        own = asked or earlier or automatic_batch_tokens(self.model, self.device)
        everywhere = self.processes.gather((own, earlier))
        return min([found for _, found in everywhere if found] or [found for found, _ in everywhere])

    def _tree(self) -> str | None:
        """How shared prompts are handed to the model; asked of it, if that is cheap."""
        decoder = decoder_of(self.model)
        if self.layerwise is not None or (self.fingerprint.model_type in LAYOUTS and is_offloaded(decoder)):
            return next(iter(forms(self.model, decoder)), None)
        with first_layers(self.model, self.root, self.depth):
            form, self.report.shared_error = tree_form(self.model, self.sites, self.device)
        return form

    def _resumed(self, resume: bool) -> Mapping[str, Any]:
        """Takes up the checkpoint, if there is one; returns what it found out at run time."""
        if self.checkpoint is None:
            if resume:
                raise FileFormatError("resume: found no checkpoint to go on from; name its file with checkpoint=...")
            return {}
        others = self.checkpoint.others()
        if others:
            raise FileFormatError(
                f"{others[0]}: found the checkpoint of a run with another number of processes; go on with as many, or "
                "remove it to start anew"
            )
        if not self.checkpoint.path.exists():
            return {}
        if not resume:
            raise FileFormatError(
                f"{self.checkpoint.path}: found the checkpoint of an earlier run; go on from it with resume, or remove "
                "it to start anew"
            )
        state = self.checkpoint.load()
        self.tally.restore(state)
        self.report.resumed, self.first_layer = state.pairs, state.extra["layer"]
        return state.extra

    def save(self) -> None:
        """Writes the checkpoint, if one was asked for, after a look for NaN and infinities."""
        self.tally.check(self.blocks)
        if self.checkpoint is None:
            return
        try:
            self.checkpoint.save(
                self.tally.state(
                    batch_tokens=self.batch_tokens,
                    tree=self.tree,
                    layer=self.first_layer,
                    all_pairs=self.blocks.digest if self.layerwise else None,
                )
            )
        except FileFormatError as error:  # a full disk: what is in memory is worth more than stopping
            if self.layerwise is not None:  # hidden states go on; a checkpoint that is far behind is of no use to them
                raise
            stands = "; an earlier checkpoint there still stands" if self.checkpoint.path.exists() else ""
            if not self._warned:
                warnings.warn(f"{error}. Measuring goes on{stands}", stacklevel=2)
            self._warned = True

    def total(self) -> int | None:
        """How many pairs there are for this process, as far as that is known now."""
        count: float | None = len(self.pairs) if isinstance(self.pairs, Pairs) else None
        if isinstance(self.pairs, PairStream) and self.pairs.fraction:
            count = self.blocks.read / self.pairs.fraction
        return None if count is None else round(count / self.processes.count)

    def run(self) -> Momentum:
        """Measures, and adds up over all processes."""
        start = time.perf_counter()
        (run_layerwise if self.layerwise else run_resident)(self)
        momentum = self._momentum()
        self.report.seconds.total = time.perf_counter() - start
        return momentum

    def _momentum(self) -> Momentum:
        self.tally.check(self.blocks)
        start = time.perf_counter()
        tally = self.tally
        numbers = (tally.pairs, tally.cut, tally.identical, tally.half_pairs)
        everyone = self.processes.gather((*numbers, self.report, self.blocks.digest))
        other = next((i for i, one in enumerate(everyone) if one[5] != everyone[0][5]), None)
        if other is not None:
            raise PairsError(
                f"{self.pairs.source}: process {other} read other pairs than process 0, or in another order; give all "
                "processes the same (a set, or a shuffle without a seed, has an order of its own in each)"
            )
        pairs, cut, identical, half_pairs = (sum(one[i] for one in everyone) for i in range(4))
        self.report.add(one[4] for i, one in enumerate(everyone) if i != self.processes.index)
        state = tally.state()
        sums = self.processes.add(tensors_of(state.sites, state.half))
        self.report.seconds.reduce = time.perf_counter() - start
        if identical == pairs:
            raise PairsError(
                f"{self.pairs.source}: in all {pairs} pairs both texts have the same tokens"
                + (f" after {cut} texts were cut to {self.max_length}; give a larger max_length" if cut else "")
            )
        if self.writer is not None and self.processes.main:
            self.writer.finish(pairs)
        return Momentum(
            sites=counters_from(sums, self.sites),
            pairs=pairs,
            model=self.fingerprint,
            chat_template=self.pairs.chat_template,
            cut=cut,
            identical=identical,
            sources=(self.pairs.source,),
            layers=self.layers,
            half=counters_from(sums, self.sites, half=True),
            half_pairs=half_pairs,
            report=self.report,
        )
