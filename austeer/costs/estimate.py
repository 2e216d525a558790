"""What a measurement will take: time, memory and bytes, from a model's config and the pairs, without the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CaptureError, PairsError, check_count
from ..forward.tokens import length_limit
from ..forward.tree_masks import forms
from ..measuring.measurement import BLOCK_PAIRS, STRATEGIES
from ..models.families import Layout
from ..models.skeleton import checkpoint_files, dtypes, load_config, load_tokenizer, named_dtype
from ..models.structure import decoder_of, vocabulary_size
from ..pairs.pairs import Pair, Pairs
from ..pairs.stream import PairStream
from ..utils.machine import Machine, free_on, this_machine
from .needs import Need, Subject
from .shapes import Parameters
from .workload import CHARACTERS, Workload, workload


@dataclass(frozen=True)
class Estimate:
    """What a measurement will take by either strategy; made by :func:`estimate`.

    Attributes:
        model: its name. dtype: in which it runs. itemsize: bytes of a value. depth: how many layers are run.
        parameters, work, machine: what sizes and seconds are made from.
        active: entries of the matrices that a token is multiplied with.
        experts: how many of how many routed experts run for a token; None without a mixture.
        flops: of the matrix products of the whole run. batch_tokens: the limit on a batch.
        resident, layerwise: layerwise is None for a model that cannot be measured so.
        strategy: the one asked for, or the better one. why: the reason.
        notes: what is not known, or assumed.
    """

    model: str
    dtype: str
    itemsize: int
    depth: int
    parameters: Parameters
    active: int
    experts: tuple[int, int] | None
    work: Workload
    flops: int
    batch_tokens: int
    machine: Machine
    resident: Need
    layerwise: Need | None
    strategy: str
    why: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        needs = {
            name: None if need is None else asdict(need) | {"memory": need.memory}
            for name, need in (("resident", self.resident), ("layerwise", self.layerwise))
        }
        return asdict(self) | needs | {"work": self.work.to_json()}

    def lines(self) -> list[str]:
        """For people."""
        p, w, m, size = self.parameters, self.work, self.machine, self.itemsize
        weights = "" if self.resident.weights is None else f", {_bytes(self.resident.weights)} in {self.dtype}"
        lines = [
            f"model      {self.model}: {_number(p.total)} parameters{weights} ({len(p.layers)} layers of up to "
            f"{_bytes(max(p.layers) * size)}, embedding {_bytes(p.embedding * size)}, "
            f"not run {_bytes(p.unused * size)})",
            f"pairs      {w.pairs} ({w.sampled} tokenised): {_number(w.tokens_texts)} tokens, of which "
            f"{_number(w.tokens_run)} are run, {_number(w.tokens_padded)} with padding, in {w.batches} batches of at "
            f"most {self.batch_tokens}",
            f"work       {_number(self.flops, 'FLOP')}: {_number(self.active)} parameters a token in {self.depth} "
            f"layers" + (f", {self.experts[0]} of {self.experts[1]} experts" if self.experts else ""),
        ]
        for name, need in (("resident", self.resident), ("layerwise", self.layerwise)):
            if need is not None:
                lines += _needs(name, need)
        tried = ""
        if m.product is not None:
            tokens, inputs, outputs = m.product
            tried = f" in a product of [{tokens}, {inputs}] and [{inputs}, {outputs}]"
        disk = "is not here: its rate is not known" if m.read is None else f"{_bytes(m.read)}/s"
        lines += [
            f"machine    {m.device}: {_bytes(m.free)} free, {_number(m.matmul, 'FLOP/s')}{tried}; checkpoint {disk}; "
            f"{_bytes(m.disk_free)} of scratch disk free",
            f"strategy   {self.strategy}: {self.why}",
        ]
        lines += [f"note       {note}" for note in self.notes]
        return [*lines, "Estimates: most of all the time, which is that of matrix products and the disk alone."]


def _needs(name: str, need: Need) -> list[str]:
    parts = [(need.counters, "counters"), (need.buffers, "a block's activations"), (need.activations, "a batch's")]
    if need.weights is not None:
        parts.insert(0, (need.weights, "weights"))
    total = "not known: weights" if need.memory is None else _bytes(need.memory)
    memory = f"{name:<10} memory {total} = " + " + ".join(f"{_bytes(size)} {what}" for size, what in parts)
    if need.memory is None:
        memory = memory.replace(" = ", " + ")
    if need.hidden:
        where = {"device": "on the device", "memory": "in memory", "file": "in a scratch file"}[need.place]
        memory += f"; hidden states {_bytes(need.hidden)} {where}, texts {_bytes(need.texts)} in memory"
    time = f"{'':<10} time {'at least ' if need.seconds is None else ''}"
    time += f"{_time(need.compute if need.seconds is None else need.seconds)}: products {_time(need.compute)}"
    if need.read is not None:
        time += f", disk {'not known' if need.disk is None else _time(need.disk)} for {_bytes(need.read)} of weights"
    if need.moved:
        time += f" and {_bytes(need.moved)} of hidden states"
    return [memory, time]


def estimate(
    model: Any,
    pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str] | Sequence[str]],
    sites: str | Sequence[str] = ("attention", "ffn"),
    *,
    tokenizer=None,
    layers: Iterable[int] | None = None,
    strategy: str = "auto",
    dtype: str = "auto",
    device: str | None = None,
    batch_tokens: int | None = None,
    block_pairs: int = BLOCK_PAIRS,
    share_prompts: bool = True,
    max_length: int | None = None,
    checkpoint: str | Path | None = None,
    scratch: str | Path | None = None,
    layout: Layout | None = None,
    sample: int = 2000,
    machine: Machine | None = None,
) -> Estimate:
    """Estimates what :func:`austeer.measure` with these arguments will take. No weights are downloaded or made.

    Memory is the sum of weights, counters, one block's buffers and the activations of the largest batch, for which
    :mod:`austeer.costs.shapes` has the formulas. Time is that of matrix products and of the disk::

        layerwise   max(flops / matmul rate, (weights read + hidden states moved) / read rate)
        resident    flops / matmul rate + weights read / read rate

    The matmul rate is that of one product of the model's own size. All else is left out: SmolLM2-135M on a CPU took 1.3
    to 1.8 times as long.

    Example:
        >>> needed = austeer.estimate("models/tiny", pairs, sites=["attention", "ffn"])
        >>> needed.strategy, needed.work.pairs
        ('resident', 24)
        >>> [line.split()[0] for line in needed.lines()][:3]  # for people
        ['model', 'pairs', 'work']

    Args:
        model: a folder, a Hub id or "demo", of which config and tokenizer are read; or a config.
        pairs: from :func:`load_pairs`, :func:`stream_pairs`, or (prompt, positive, negative) tuples.
        sites: names of sites, see :mod:`austeer.models.sites`. layers: these layers only, as in ``measure``.
        tokenizer: by default that of ``model``. Without one, a token is taken to have four characters.
        strategy: "auto" takes the resident one if it fits into free memory.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda:0" ..., or a device map, which is taken for all GPUs; by default CUDA if there is one.
        batch_tokens, block_pairs, share_prompts, max_length, layout: as of :func:`austeer.measure`.
        checkpoint, scratch: where hidden states would be kept, for the space that is free there.
        sample: pairs to tokenise, in whole blocks drawn from all pairs. The others are only counted.
        machine: where it will run, in place of ``device``; by default here, tried for about a second.

    Raises:
        ModelError: no config, or one that Transformers has no model for.
        PairsError, SiteError, CaptureError: as :func:`austeer.measure` would.
    """
    if strategy not in STRATEGIES:
        raise CaptureError(f"strategy: found {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    for what, value in (("block_pairs", block_pairs), ("sample", sample), ("batch_tokens", batch_tokens or 1)):
        check_count(what, value, 2**40, "pairs, or tokens of a batch", PairsError)
    if not isinstance(pairs, (Pairs, PairStream)):
        pairs = Pairs.of(pairs)
    config = load_config(model) if isinstance(model, str) else model
    subject = Subject(config, *dtypes(config, dtype), sites, layers, layout)
    if named_dtype(config) is None:
        subject.notes.append("the config names no dtype: the weights are taken to be saved in float32")
    if tokenizer is None and isinstance(model, str):
        tokenizer = load_tokenizer(model)
    if tokenizer is None:
        subject.notes.append(f"no tokenizer was loaded: a token is taken to have {CHARACTERS} characters")
    share = share_prompts and bool(forms(subject.network, decoder_of(subject.network)))
    if share_prompts and not share:
        subject.notes.append("this model cannot share prompts: every text is run whole")
    where, free = free_on(device) if machine is None else (torch.device(machine.device), machine.free)
    batch_tokens = batch_tokens or subject.batch_tokens(free, where)
    work = workload(
        tokenizer,
        pairs,
        vocabulary=vocabulary_size(subject.network),
        max_length=length_limit(subject.network, max_length),
        block_pairs=block_pairs,
        batch_tokens=batch_tokens,
        share=share,
        sample=sample,
    )
    if machine is None:
        files = checkpoint_files(model) if isinstance(model, str) else []
        folder = scratch or (Path(checkpoint).parent if checkpoint else tempfile.gettempdir())
        machine = this_machine(where, free, subject.dtype, subject.product(work), files, Path(folder))
    held = min(block_pairs, work.pairs) if isinstance(pairs, Pairs) else block_pairs
    resident, layerwise = subject.needs(work, machine, held, checkpoint is not None)
    chosen, why = _choice(strategy, resident, layerwise, machine, subject.refused)
    return Estimate(
        model=model if isinstance(model, str) else getattr(config, "_name_or_path", "") or config.model_type,
        dtype=str(subject.dtype).removeprefix("torch."),
        itemsize=subject.dtype.itemsize,
        depth=len(subject.works),
        parameters=subject.parameters,
        active=sum(layer.active for layer in subject.works),
        experts=subject.experts,
        work=work,
        flops=subject.flops(work),
        batch_tokens=batch_tokens,
        machine=machine,
        resident=resident,
        layerwise=layerwise,
        strategy=chosen,
        why=why,
        notes=tuple(subject.notes),
    )


def _choice(
    asked: str, resident: Need, layerwise: Need | None, machine: Machine, refused: str | None
) -> tuple[str, str]:
    """The strategy, and why."""
    if asked == "layerwise" and layerwise is None:
        raise CaptureError(
            f"strategy: found 'layerwise', and this model cannot be measured so ({refused}); take 'resident'"
        )
    strategy = asked
    if asked == "auto":
        strategy = "layerwise" if resident.fits is False and layerwise is not None else "resident"
    fits = {True: "fits", False: "does not fit", None: "is not known to fit"}
    why = f"the model {fits[resident.fits]} into the {_bytes(machine.free)} that are free on {machine.device}"
    if strategy == "layerwise" and layerwise is not None and not layerwise.fits:
        why += "; nor does measuring it layer by layer, with hidden states and texts"
    if strategy == "resident" and not resident.fits and refused is not None:
        why += f"; it cannot be measured layer by layer: {refused}"
    return strategy, why if asked == "auto" else f"as asked; {why}"


def _bytes(count: float) -> str:
    return _number(count, "B")


def _number(count: float, unit: str = "") -> str:
    """Three digits, a prefix and a unit: 1.41 GB."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if count >= 0.9995 * 10**power:
            return f"{count / 10**power:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".rstrip()


def _time(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"
