"""measure(): pairs -> Momentum."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..models.sites import Layout
from ..momentum.momentum import Momentum
from ..pairs.pairs import Pair, Pairs
from ..pairs.stream import PairStream
from .measurement import BLOCK_PAIRS, Measurement, MeasureOptions
from .strategies import run_layerwise, run_resident


def measure(
    model: nn.Module,
    tokenizer,
    pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]],
    sites: str | Sequence[str] = ("attention", "ffn"),
    *,
    layers: Iterable[int] | None = None,
    effects: bool = False,
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
    (:mod:`austeer.pairs.halves`). Values are compared as the model made them.
    What texts have in common (the prompt of a pair; a prompt that pairs share) runs once. Texts of like length share
    a batch; with bidirectional attention whole texts of one length do. ``momentum.report`` says how it went.

    Example:
        >>> momentum = austeer.measure(model, tokenizer, pairs, sites=["attention", "ffn"])
        >>> momentum.pairs, list(momentum.sites)
        (24, ['attention', 'ffn'])
        >>> momentum.counters("ffn").positive.shape  # layers, AUs of each
        torch.Size([3, 32])
        >>> momentum.save("kind.momentum").name
        'kind.momentum'

    Args:
        model: a Transformers decoder, in evaluation mode for the time of the call.
        tokenizer: the model's own. One without a pad token is fine.
        pairs: from :func:`load_pairs`, :func:`stream_pairs` (any number), or (prompt, positive, negative) tuples.
        sites: names of sites, see :mod:`austeer.models.sites`.
        layers: measure these layers only, for example ``range(12)``; those above the highest are not run. By default
            all that have the sites: in a model with attention in some layers only, ``attention`` is in those.
        effects: also find what shifting each AU does to the log-odds of the positive text, by one pass there and back
            a pair (:meth:`Momentum.effect`); resident only, and the model needs its head.
        strategy: "resident" runs each batch through the whole model; "layerwise" loads each layer once and runs all
            pairs through it, which is what a model wants whose weights are offloaded; "auto" takes layerwise for
            such a model where it can.
        share_prompts: False runs every text whole. Models that cannot share do so anyway (the report says which).
        batch_tokens: tokens in a batch, padding included; by default what suits the device and its free memory.
        block_pairs: pairs whose activations are held at a time.
        max_length: longer texts are cut on the left to so many tokens; the model's context by default, and at most
            (with a warning).
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
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        PairsError, SiteError: unusable pairs; a site, layer or family that is not known; sites of unlike layers.
        CaptureError: an activation is NaN or infinite (site, layer and pair are named), or a site was not reached.
        FileFormatError: the checkpoint is damaged or of another run, or one is there and ``resume`` was not asked for.
        SteeringError: the model is steered now.
        MeasurementInterrupted: Ctrl-C or SIGTERM, with a checkpoint.
    """
    options = MeasureOptions(
        layers=layers,
        effects=effects,
        strategy=strategy,
        share_prompts=share_prompts,
        batch_tokens=batch_tokens,
        block_pairs=block_pairs,
        max_length=max_length,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        distributed=distributed,
        save_activations=save_activations,
        scratch=scratch,
        device=device,
        layout=layout,
        progress=progress,
    )
    measurement = Measurement(model, tokenizer, pairs, sites, options)
    start = time.perf_counter()
    (run_layerwise if measurement.layerwise else run_resident)(measurement)
    momentum = measurement.momentum()
    measurement.report.seconds.total = time.perf_counter() - start
    return momentum
