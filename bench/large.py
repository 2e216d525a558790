"""What only a GPU shows: the counting kernel against the memory's bandwidth, and a model of 8B's sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import austeer_kernels as ak
from austeer import Pairs
from austeer.costs.ceilings import ceilings

from .compare import compare
from .footprint import peak
from .graphs import Replay, WrongResultError, copies_of, interleaved, ratios, spread, warm_up
from .naive import Gate
from .pair_sets import PairSet
from .shapes import ModelShape, build
from .ways import OURS, STACKED, UNSHARED, WAYS

KERNEL, EAGER = "kernel", "eager"


def eager_update(positive: Tensor, negative: Tensor, counters: Sequence[Tensor]) -> None:
    """The counters' four sums with PyTorch's own operations; without the look for NaN and infinities."""
    delta = positive.float() - negative.float()
    counters[0].add_((positive > negative).sum(0))
    counters[1].add_((positive < negative).sum(0))
    counters[2].add_(delta.sum(0, dtype=torch.float64))
    counters[3].add_(delta.square().sum(0, dtype=torch.float64))


def kernel(pairs: int, columns: int, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    """``momentum_update`` and PyTorch's operations on activations [pairs, columns], both in CUDA graphs.

    Raises:
        WrongResultError: a count differs, or a sum by more than rounding.
    """
    warm_up(device)
    bandwidth = ceilings(device, dtype).bandwidth
    torch.manual_seed(0)
    nbytes = 2 * pairs * columns * dtype.itemsize
    copies = copies_of(nbytes, device)
    inputs = [tuple(torch.randn(pairs, columns, device=device, dtype=dtype) for _ in range(2)) for _ in range(copies)]
    counters = {name: [ak.momentum_counters(columns, device) for _ in inputs] for name in (KERNEL, EAGER)}
    calls = {
        KERNEL: [lambda x=x, c=c: ak.momentum_update(*x, *c) for x, c in zip(inputs, counters[KERNEL])],
        EAGER: [lambda x=x, c=c: eager_update(x[0], x[1], c) for x, c in zip(inputs, counters[EAGER])],
    }
    nbytes += 2 * sum(counter.nbytes for counter in counters[KERNEL][0])  # read and written
    replays = {name: Replay(own, device, nbytes / bandwidth) for name, own in calls.items()}
    for name, replay in replays.items():
        _check(name, replay, inputs, counters[name])
    seconds = interleaved(replays, rounds)
    sizes = {"pairs": pairs, "columns": columns, "dtype": str(dtype).removeprefix("torch.")}
    return sizes | {
        "bytes": nbytes,
        "copies": copies,
        "bandwidth": bandwidth,
        "seconds": {name: dataclasses.asdict(spread(values)) for name, values in seconds.items()},
        "of_bandwidth": nbytes / spread(seconds[KERNEL]).median / bandwidth,
        "faster_than_eager": dataclasses.asdict(ratios(seconds[EAGER], seconds[KERNEL])),
    }


def _check(name: str, replay: Replay, inputs: Sequence[Sequence[Tensor]], counters: Sequence[Sequence[Tensor]]) -> None:
    """What a whole sample adds up to, for the first copy of the inputs."""
    for counter in counters[0][:4]:
        counter.zero_()
    replay.run()
    # A graph holds as many passes over the inputs as a sample; without one, run() makes a single pass.
    passes = replay.count // len(inputs) if inputs[0][0].device.type == "cuda" else 1
    positive, negative = inputs[0]
    for counted, wins in zip(counters[0], (positive > negative, positive < negative)):
        if not torch.equal(counted, passes * wins.sum(0)):
            raise WrongResultError(f"{name}: {int((counted != passes * wins.sum(0)).sum())} counts differ")
    for start in range(0, positive.shape[1], 4096):  # float64 of everything would take gigabytes
        some = slice(start, start + 4096)
        delta = positive[:, some].double() - negative[:, some].double()
        for summed, exact in ((counters[0][2], delta.sum(0)), (counters[0][3], delta.square().sum(0))):
            if not torch.allclose(summed[some], passes * exact, rtol=1e-5, atol=1e-3):
                raise WrongResultError(f"{name}: a sum differs by more than rounding")


def trained_tokenizer(pairs: Iterable[Pairs], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer learnt from the pairs: texts get about as many tokens as from a real one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for some in pairs for pair in some for text in (pair.prompt, pair.positive, pair.negative))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def model(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    sets: Sequence[PairSet],
    counts: tuple[int, int],
    rounds: int,
) -> dict[str, Any]:
    """A random model: our ways beside the stacked one, and the device memory that each needs at two numbers of pairs.

    Args:
        counts: pairs that are timed, and pairs at which memory is looked at again.
    """
    tokenizer = trained_tokenizer([s.pairs for s in sets], shape.values["vocab_size"])
    loaded = build(shape, device, dtype)
    ways = {name: WAYS[name] for name in (STACKED, OURS, UNSHARED)}
    timed, more = counts
    rows, memory = [], []
    for pair_set in sets:
        gate = Gate(loaded, tokenizer, pair_set.pairs[:timed])
        rows.append(
            compare(loaded, tokenizer, pair_set, ways, dict.fromkeys(ways, timed), gate, rounds, references=(STACKED,))
        )
        del gate
        if device.type == "cuda":
            for name in (STACKED, OURS):
                extra = {
                    str(count): peak(partial(ways[name], loaded, tokenizer, pair_set.pairs[:count]), device)
                    for count in (timed, more)
                }
                memory.append({"way": name, "set": pair_set.name, "bytes": extra})
    return {
        "shape": {"name": shape.name},
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "sets": rows,
        "memory": memory,
    }
