"""A model whose weights lie on disk: layer by layer, beside forward passes that load every weight each time.

``accelerate.disk_offload`` puts the weights of the model into files. In one case the system may keep them in memory
after the first pass; in the other it is made to forget them before each forward pass, which is how a model runs that is
larger than the memory.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import disk_offload
from transformers import PreTrainedModel

from austeer import Pairs

from .compare import compare
from .naive import Gate
from .pair_sets import PairSet
from .ways import PUBLIC, STACKED, WAYS, Run, Way, ours

LAYERWISE, RESIDENT = "layer by layer", "batch by batch"

CACHED, FROM_DISK = "weights stay in the system's cache", "weights come from the disk at each pass"


def measure(
    model: PreTrainedModel, tokenizer, pair_set: PairSet, counts: Mapping[str, int], rounds: int
) -> dict[str, Any]:
    """Both strategies, and both peers, on a copy of the model that is offloaded; by case.

    Args:
        counts: with how many pairs each way runs.
    """
    gate = Gate(model, tokenizer, pair_set.pairs[: max(counts.values())])
    ways = {LAYERWISE: ours("layerwise"), RESIDENT: ours("resident"), STACKED: WAYS[STACKED], PUBLIC: WAYS[PUBLIC]}
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        offloaded = copy.deepcopy(model)
        disk_offload(offloaded, folder, execution_device=device)
        weights = sorted(Path(folder).iterdir())
        found = {}
        for case in (CACHED, FROM_DISK):
            run = {n: forgetful(way, weights, n != LAYERWISE) for n, way in ways.items()} if case == FROM_DISK else ways
            found[case] = compare(
                offloaded, tokenizer, pair_set, run, counts, gate, rounds, (RESIDENT, STACKED, PUBLIC)
            )
    return {"weights": sum(p.nbytes for p in model.get_decoder().parameters()), "cases": found}


def forgetful(way: Way, weights: Sequence[Path], each_pass: bool) -> Way:
    """A way before which the system drops these files from its cache; with ``each_pass`` before each forward pass, too.

    That is how weights are read that are larger than the memory. What reads each of them once needs no more.
    """
    for path in weights:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not yet on the disk would stay in the cache

    def forget(*_: object) -> None:
        for path in weights:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def run(model: PreTrainedModel, tokenizer, pairs: Pairs) -> Run:
        forget()
        handle = model.get_decoder().register_forward_pre_hook(forget) if each_pass else None
        try:
            return way(model, tokenizer, pairs)
        finally:
            if handle is not None:
                handle.remove()

    return run
