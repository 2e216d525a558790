"""One measurement: its options checked, and what both strategies work on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..counters import Counters, counters_from, effect_of, tensors_of
from ..errors import AusteerWarning, CaptureError, FileFormatError, PairsError, SiteError, SteeringError, check_count
from ..forward.batch_size import automatic_batch_tokens
from ..forward.causality import is_causal
from ..forward.gradients import ShiftGradients
from ..forward.logits import expect_head
from ..forward.shared_prompts import tree_form
from ..forward.tokens import length_limit
from ..forward.tree_masks import forms, longest_short_text
from ..models.families import LAYOUTS, Layout
from ..models.sites import find_sites, fingerprint, layers_path
from ..models.structure import (
    decoder_of,
    first_layers,
    floating_dtype,
    has_virtual_tokens,
    input_device,
    is_offloaded,
    is_steered,
    vocabulary_size,
)
from ..models.weights import signature
from ..momentum.momentum import Momentum
from ..momentum.report import MeasureReport
from ..pairs.pair import Pair
from ..pairs.pairs import Pairs
from ..pairs.stream import PairStream
from .arguments import chosen_strategy, measured_layers, tokenizer_signature
from .blocks import Blocks
from .checkpoint import Checkpoint
from .counting import Tally
from .layerwise.layerwise import Layerwise
from .processes import Processes
from .stored.writer import ActivationWriter

STRATEGIES = ("auto", "resident", "layerwise")

#: Tokens in a batch of pairs for effects, at most: the activations of all layers are kept for the way back.
EFFECT_TOKENS = 1024

#: Pairs in a block: the unit of counting, of checkpoints and of splitting over processes. Large enough that texts of
#: like length meet, small enough that few pairs still keep several processes busy.
BLOCK_PAIRS = 128


@dataclass(frozen=True)
class MeasureOptions:
    """How to measure; each is an argument of :func:`austeer.measure`.

    Raises:
        CaptureError, PairsError: an unknown strategy, a count out of range.
    """

    layers: Iterable[int] | None = None
    effects: bool = False
    strategy: str = "auto"
    share_prompts: bool = True
    batch_tokens: int | None = None
    block_pairs: int = BLOCK_PAIRS
    max_length: int | None = None
    checkpoint: str | Path | None = None
    checkpoint_every: int = 8 * BLOCK_PAIRS
    resume: bool = False
    distributed: bool = False
    save_activations: str | Path | None = None
    scratch: str | Path | None = None
    device: str | torch.device | None = None
    layout: Layout | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise CaptureError(f"strategy: found {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        counts = {"block_pairs": (2**20, "pairs held at a time"), "checkpoint_every": (2**62, "pairs")}
        if self.batch_tokens is not None:
            counts["batch_tokens"] = (2**40, "tokens in a batch")
        for name, (largest, of) in counts.items():  # NumPy's integers become Python's: a checkpoint is JSON
            object.__setattr__(self, name, check_count(name, getattr(self, name), largest, of, PairsError))


class Measurement:
    """One call of :func:`austeer.measure`: its arguments checked, and what both strategies work on.

    Attributes:
        sites: what is read, of the layers asked for. depth: how many layers have to run.
        root: path of the list of layers. device: where tokens go in.
        causal: whether no token sees a later one, so that texts may be padded and share prompts.
        tally: what is counted so far. report: how it goes. every: blocks between two checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]],
        sites: str | Sequence[str],
        options: MeasureOptions,
    ):
        _check_model(model)
        self.model, self.options, self.progress = model, options, options.progress
        self.pairs = _as_pairs(pairs)
        self.block_pairs, self.every = options.block_pairs, -(-options.checkpoint_every // options.block_pairs)
        found = find_sites(model, sites, options.layout)
        if not found:
            raise SiteError("sites: found none, expected at least one name, for example sites=['attention']")
        self.fingerprint = fingerprint(model, found)
        self.layers = measured_layers(options.layers, found, self.fingerprint.layers)
        self.sites = {name: [site for site in all_ if site.layer in self.layers] for name, all_ in found.items()}
        self.depth, self.root = max(self.layers) + 1, layers_path(model, options.layout)
        self.max_length = length_limit(model, options.max_length)
        self.processes = Processes.launched() if options.distributed else Processes()
        asked = "resident" if options.effects and options.strategy == "auto" else options.strategy
        strategy = chosen_strategy(model, asked, options.device, options.layout)
        if strategy == "layerwise" and options.save_activations is not None:
            raise CaptureError(
                "save_activations: found the layerwise strategy, which has the activations of one layer at a time; "
                "expected strategy='resident'"
            )
        if strategy == "layerwise" and options.effects:
            raise CaptureError(
                "effects: found the layerwise strategy, in which no gradient goes through the whole model; expected "
                "strategy='resident'"
            )
        self.report = MeasureReport(strategy=strategy, processes=self.processes.count)
        self.checkpoint = self._checkpoint(tokenizer, strategy)
        self.layerwise = self._layerwise() if strategy == "layerwise" else None
        self.device = self.layerwise.device if self.layerwise else input_device(model)
        self._warned = False
        self.tally, self.first_layer = Tally(self.sites, self.device, options.effects), 0
        self.writer = self._writer()
        resumed = self._resumed(options.resume)
        self.resumed_digest = resumed.get("all_pairs")
        self.batch_tokens = self._batch_tokens(options.batch_tokens, resumed.get("batch_tokens"))
        self.causal = is_causal(model, options.layout)
        self.gradients = self._gradients() if options.effects else None
        self.tree = self._tree() if options.share_prompts and self.causal else None
        if resumed and resumed["tree"] != self.tree:
            raise FileFormatError(
                f"{options.checkpoint}: found shared prompts run as {resumed['tree']!r}, and this model on this device "
                f"takes {self.tree!r}; go on where it was begun, or start anew"
            )
        if self.layerwise is not None and self.tree is not None:
            self.layerwise.tree = self.tree
        self.report.shared_prompts, self.report.batch_tokens = self.tree is not None, self.batch_tokens
        self.blocks = self._blocks(tokenizer)

    def _checkpoint(self, tokenizer, strategy: str) -> Checkpoint | None:
        """Where the counters are kept, with what must agree for a run to go on; None if nobody asked for it."""
        options = self.options
        if options.checkpoint is None:
            return None
        settings: dict[str, Any] = {
            "sites": list(self.sites),
            "model": self.fingerprint.to_json(),
            "dtype": str(floating_dtype(self.model)),
            "layers": list(self.layers),
            "pairs": self.pairs.source,
            "chat_template": self.pairs.chat_template,
            "block_pairs": options.block_pairs,
            "max_length": self.max_length,
            "share_prompts": options.share_prompts,
            "strategy": strategy,
            "tokenizer": tokenizer_signature(tokenizer),
            "weights": signature(self.model),
            "save_activations": str(options.save_activations),
            "effects": options.effects,
        }
        return Checkpoint(options.checkpoint, settings, (self.processes.index, self.processes.count))

    def _layerwise(self) -> Layerwise:
        scratch = self.options.scratch
        if self.checkpoint is not None:
            scratch = Path(scratch or self.checkpoint.path.parent, f"{self.checkpoint.path.name}.hidden")
        return Layerwise(
            self.model,
            self.sites,
            device=self.options.device,
            scratch=scratch,
            persistent=self.checkpoint is not None,
            layout=self.options.layout,
        )

    def _writer(self) -> ActivationWriter | None:
        if self.options.save_activations is None:
            return None
        return ActivationWriter(
            self.options.save_activations,
            self.fingerprint,
            layers=self.layers,
            chat_template=self.pairs.chat_template,
            source=self.pairs.source,
            resume=self.options.resume or self.processes.count > 1,
        )

    def _blocks(self, tokenizer) -> Blocks:
        return Blocks(
            tokenizer,
            self.pairs,
            source=self.pairs.source,
            chat_template=self.pairs.chat_template,
            vocabulary=vocabulary_size(self.model),
            max_length=self.max_length,
            block_pairs=self.block_pairs,
            batch_tokens=self.batch_tokens,
            share=self.tree is not None,
            apart=longest_short_text(self.model),
            even=not self.causal,
            first=self.tally.block,
            known=self.tally.digest,
            part=(self.processes.index, self.processes.count),
            pin=self.device.type == "cuda",
            effect_tokens=min(self.batch_tokens, EFFECT_TOKENS) if self.options.effects else None,
            seconds=self.report.seconds,
        )

    def _gradients(self) -> ShiftGradients:
        """What finds effects.

        Raises:
            CaptureError: a model without a head, with bidirectional attention, or one that cannot be differentiated.
        """
        if not self.causal:
            raise CaptureError(
                f"effects: found bidirectional attention in {type(self.model).__name__}, expected a causal model: the "
                "probability of a text means nothing where each token sees those after it"
            )
        expect_head(self.model)
        return ShiftGradients(self.model, self.sites)

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
                "remove it (--force) to start anew"
            )
        state = self.checkpoint.earlier(resume)
        if state is None:
            return {}
        self.tally.restore(state)
        self.report.resumed, self.first_layer = state.pairs, state.extra["layer"]
        return state.extra

    def save(self) -> None:
        """Writes the checkpoint, if one was asked for, after a look for NaN and infinities."""
        self.tally.check(self.blocks)
        if self.checkpoint is None:
            return
        try:
            digest = self.blocks.digest if self.layerwise else None
            found_out = {"batch_tokens": self.batch_tokens, "tree": self.tree, "layer": self.first_layer}
            self.checkpoint.save(self.tally.state(**found_out, all_pairs=digest))
        except FileFormatError as error:  # a full disk: what is in memory is worth more than stopping
            if self.layerwise is not None:  # hidden states go on; a checkpoint that is far behind is of no use to them
                raise
            stands = "; an earlier checkpoint there still stands" if self.checkpoint.path.exists() else ""
            if not self._warned:
                warnings.warn(f"{error}. Measuring goes on{stands}", AusteerWarning, stacklevel=2)
            self._warned = True

    def total(self) -> int | None:
        """How many pairs there are for this process, as far as that is known now."""
        count: float | None = len(self.pairs) if isinstance(self.pairs, Pairs) else None
        if isinstance(self.pairs, PairStream) and self.pairs.fraction:
            count = self.blocks.read / self.pairs.fraction
        return None if count is None else round(count / self.processes.count)

    def momentum(self) -> Momentum:
        """What was counted, added up over all processes."""
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
        found = Momentum(
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
        return found.with_effects(*(self._effects(sums, half) for half in (False, True))) if self.gradients else found

    def _effects(self, sums: Mapping[str, Tensor], half: bool) -> dict[str, Counters]:
        counters = counters_from(sums, [effect_of(name) for name in self.sites], half=half)
        return {name: counters[effect_of(name)] for name in self.sites}


def _check_model(model: nn.Module) -> None:
    if has_virtual_tokens(model):
        raise CaptureError(
            "found a PEFT model with virtual tokens (prompt or prefix tuning), which the decoder alone does not "
            "run; measure on the base model, or with an adapter of another kind"
        )
    if is_steered(model):
        raise SteeringError("the model is steered: its activations are not its own. Leave the steering context first")


def _as_pairs(pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]]) -> Pairs | PairStream:
    if not isinstance(pairs, (Pairs, PairStream)):
        pairs = Pairs.of(pairs)
    if isinstance(pairs, Pairs) and not pairs:
        raise PairsError(f"{pairs.source}: found no pairs, expected at least one")
    return pairs
