"""Momentum of SmolLM2-135M on real pairs: austeer.measure beside the public algorithm and a hook-and-stack version.

    python -m bench.momentum [--rounds 3] [--sets persona boolq ...] [--data ../shared/data] [--quick] [--json]

Both sites, attention and ffn, are measured in one pass by every way. In each round all run, in a new random order, on
the first pairs of each set; the public algorithm on fewer, since its rate does not depend on their number but for its
loop over the AUs. That loop is a fixed cost, as is our question whether the model takes trees, so ratios are given
twice: as run, and as they would be at 1,000 pairs, the paper's number. Nothing is timed whose counts are not those of a
naive loop, up to comparisons that rounding can turn (naive.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from austeer.errors import ModelError
from austeer.measuring.measurement import BLOCK_PAIRS
from austeer.models.load import load_model

from . import command, files, footprint, large, offloaded, pair_sets, report, shapes
from .compare import compare
from .naive import Gate
from .ways import OURS, PUBLIC, STACKED, WAYS, tokens_of

#: Pairs of the demo whose peak memory is measured: of ours two blocks, since one is made ready while another runs, and
#: three times as many; of the others, which only show how they grow, few.
MEMORY_PAIRS = {OURS: (256, 768), STACKED: (64, 128), PUBLIC: (8, 16)}
QUICK_MEMORY_PAIRS = {OURS: (8, 16)}
#: Pairs of the demo with weights on disk, by way: the peers' rates do not depend on their number, ours get batches.
OFFLOADED_PAIRS = {offloaded.LAYERWISE: 96, offloaded.RESIDENT: 96, STACKED: 24, PUBLIC: 2}
QUICK_OFFLOADED_PAIRS = {offloaded.LAYERWISE: 12, offloaded.RESIDENT: 12, STACKED: 12, PUBLIC: 2}
#: Its times differ less from round to round than they take.
OFFLOADED_ROUNDS = 2
#: A GPU runs so many times more pairs: the rates of a few batches would be those of launches.
ON_GPU = 8
#: (pairs that are timed, pairs at which memory is looked at again), pairs and columns of the kernel.
LARGE_PAIRS, KERNEL_SHAPE = (128, 384), (1000, 131072)
#: A sample of the kernel takes milliseconds.
KERNEL_ROUNDS = 15
QUICK_LARGE_PAIRS, QUICK_KERNEL_SHAPE = (4, 8), (6, 100)


def empty(device: torch.device, commit: str | None, data: str, rounds: int, quick: bool) -> dict[str, Any]:
    """A result of this kind of which nothing is measured yet."""
    known = {"environment": files.about(device, commit), "data": data, "rounds": rounds, "quick": quick}
    return {"kind": "momentum", **known, "complete": False, "sets": [], "memory": []} | dict.fromkeys(
        ("offloaded", "large", "kernel")
    )


def run(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measures part by part; gives, after each, the content of the result file so far."""
    sets, quick = pair_sets.load_all(options.sets, options.data), options.quick
    data = "public data sets" if options.data.is_dir() else "demo pairs"
    if not options.data.is_dir():
        report.say(f"{options.data}: no such folder; the demo's own pairs are used, as they are and lengthened")
    content = empty(device, options.commit, data, options.rounds, quick)
    loaded = small(quick, device)
    if loaded is None:
        report.say("the demo model is not installed: nothing is measured on it")
    else:
        more = ON_GPU if device.type == "cuda" else 1
        for pair_set in sets:
            counts = dict.fromkeys(WAYS, pair_set.others * more) | {PUBLIC: pair_set.public * more}
            report.say(f"{pair_set.name}: {options.rounds} rounds of {', '.join(WAYS)}")
            gate = Gate(*loaded, pair_set.pairs[: pair_set.others * more])
            content["sets"].append(
                compare(*loaded, pair_set, WAYS, counts, gate, options.rounds, references=(PUBLIC, STACKED))
            )
            yield content
    if loaded is not None and device.type == "cpu":
        for way, counts_ in (QUICK_MEMORY_PAIRS if quick else MEMORY_PAIRS).items():
            report.say(f"peak memory: {way}")
            content["memory"].append({"way": way, "runs": [extra_memory(*loaded, way, n) for n in counts_]})
    if device.type == "cuda" or quick:
        for part in on_random_weights(sets, LARGE_PAIRS, options.rounds, device, quick):
            content |= part
            yield content
    if loaded is not None:
        report.say("weights on disk")
        numbers = QUICK_OFFLOADED_PAIRS if quick else OFFLOADED_PAIRS
        content["offloaded"] = offloaded.measure(*loaded, pair_sets.demo_pairs(), numbers, OFFLOADED_ROUNDS)
    yield content | {"complete": True}


def extra_memory(model: PreTrainedModel, tokenizer, way: str, count: int) -> dict[str, int]:
    """Bytes over the loaded model while ``count`` pairs are measured.

    They are the demo's first, as many as a block, over and over: nothing but their number differs from call to call.

    Raises:
        OSError: this system does not count peaks.
    """
    pairs = pair_sets.demo_pairs().pairs[:BLOCK_PAIRS]
    pairs = replace(pairs, items=(pairs.items * (count // len(pairs) + 1))[:count])
    WAYS[way](model, tokenizer, pairs[-2:])  # reads every weight
    nbytes = footprint.peak(lambda: WAYS[way](model, tokenizer, pairs), torch.device("cpu"))
    return {"pairs": count, "tokens": sum(tokens_of(tokenizer, pairs)), "bytes": nbytes}


def small(quick: bool, device: torch.device) -> tuple[PreTrainedModel, Any] | None:
    """The demo's model in float32, or a tiny random one with ``quick``; None where the demo's is not installed."""
    if quick:
        model = shapes.build(shapes.tiny(shapes.LLAMA_8B), device, torch.float32)
        return model, large.trained_tokenizer([pair_sets.demo_pairs().pairs], model.config.vocab_size)
    try:
        return load_model("demo", "float32", str(device))
    except ModelError:
        return None


def on_random_weights(
    sets: Sequence[pair_sets.PairSet], pairs: tuple[int, int], rounds: int, device: torch.device, quick: bool
) -> Iterator[dict[str, Any]]:
    """Two parts of a result: the counting kernel, and a model of 8B's sizes.

    Raises:
        TooLargeError: there is no room for the model.
    """
    shape = shapes.tiny(shapes.LLAMA_8B) if quick else shapes.LLAMA_8B
    shapes.check_memory(shape, device)
    report.say("counting kernel")
    size = QUICK_KERNEL_SHAPE if quick else KERNEL_SHAPE
    yield {"kernel": large.kernel(*size, torch.bfloat16, device, 3 if quick else KERNEL_ROUNDS)}
    report.say(f"random {shape.name}")
    yield {"large": large.model(shape, torch.bfloat16, device, sets, QUICK_LARGE_PAIRS if quick else pairs, rounds)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser("momentum", __doc__, quick="on tiny random models")
    parser.add_argument("--rounds", type=command.rounds, help="default: 3, quick: 2; at least 2")
    parser.add_argument("--sets", nargs="+", choices=pair_sets.NAMES, default=list(pair_sets.NAMES))
    parser.add_argument(
        "--data",
        type=Path,
        default=files.ROOT.parent / "shared" / "data",
        help="folder of the data sets (default: ../shared/data beside the checkout; without it, the demo's pairs)",
    )
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    options = parse(argv)
    command.measure("momentum", options, run(options, command.device()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
