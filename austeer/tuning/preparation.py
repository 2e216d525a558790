"""What a search stands on: the parts of the data, neutral texts, the record, and the momentum of the measured part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines.arm import Material
from ..errors import TaskError
from ..forward.tokens import encode
from ..measuring.measure import measure
from ..momentum.momentum import Momentum
from ..pairs.pairs import Pairs
from ..tasks.neutral import neutral_texts
from ..tasks.task import Task
from .data import Most, Parts, digest_of, halved, split
from .record import Record
from .scorer import Scorer

FILE_NAME = "momentum.safetensors"

#: Of a time budget, what measuring may take; and on how many pairs, at least, there is something to search with.
MEASURING, FEWEST_PAIRS = 0.3, 20


@dataclass(frozen=True)
class Ground:
    """Attributes:
    parts: of the data. settings: all that the search depends on, for its record and its result.
    material: what methods make their plans from.
    tune, test: score on the tuning part, and on the test part with other neutral texts.
    """

    parts: Parts
    settings: dict[str, Any]
    material: Material
    tune: Scorer
    test: Scorer


def prepare(
    model: nn.Module,
    tokenizer,
    data: Task | Pairs | Parts,
    *,
    momentum: Momentum | None,
    sites: Iterable[str],
    budget: float | None,
    neutral: Sequence[str] | None,
    most: Most,
    seed: int,
    folder: str | Path | None,
    progress: bool | None,
    settings: dict[str, Any],
) -> Ground:
    """
    Args:
        sites: those to measure, where there is no momentum. settings: what else the search depends on.
        budget: what measures as many pairs as a part of it allows. Others as for :func:`austeer.tune`.

    Raises:
        TaskError: a numeric task, too little data, or a budget too small to measure.
        FileFormatError: ``folder`` holds another search.
    """
    given = isinstance(data, Parts) and data.measure is not None
    parts = split(data, measured=momentum is not None and not given, most=most, seed=seed)
    chosen_on, reported_on = (neutral_texts(), neutral_texts("heldout")) if neutral is None else halved(neutral)
    settings = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "data": {"name": parts.name, "source": parts.source, **parts.to_json()},
        "neutral": {"tune": digest_of(chosen_on), "test": digest_of(reported_on)},
        **settings,
    }
    record = Record(None if folder is None else Path(folder, "search.jsonl"), settings)
    tune = Scorer(model, tokenizer, parts.tune, chosen_on, record)
    test = Scorer(model, tokenizer, parts.test, reported_on, record, name="test")
    if momentum is None:
        if budget is not None and parts.measure is not None:
            parts = replace(parts, measure=_affordable(parts.measure, tune, budget))
            settings["data"] |= parts.to_json()
        momentum = _measured(model, tokenizer, parts, sorted(sites), folder, progress)
    return Ground(parts, settings, Material(model, tokenizer, parts.measure or Pairs(()), momentum), tune, test)


def _affordable(pairs: Pairs, scorer: Scorer, budget: float) -> Pairs:
    """As many of the pairs as can be measured within a part of the budget, from all over them.

    Raises:
        TaskError: they are too few for a search.
    """
    count = scorer.record.get("pairs to measure")
    if count is None:
        some = pairs[:: max(1, len(pairs) // 100)]
        texts = [pair.prompt + side for pair in some for side in (pair.positive, pair.negative)]
        seconds = scorer.costs.token * sum(map(len, encode(scorer.tokenizer, texts))) / len(some)
        least = min(FEWEST_PAIRS, len(pairs))
        if MEASURING * budget < least * seconds:
            raise TaskError(
                f"budget: found {budget:.0f} s, too little to measure {least} pairs; expected at least "
                f"{math.ceil(least * seconds / MEASURING)} s here, or a momentum that was measured before"
            )
        count = min(len(pairs), int(MEASURING * budget / seconds))
        scorer.record.put("pairs to measure", count)
    return replace(pairs, items=tuple(pairs[i * len(pairs) // count] for i in range(count)))


def _measured(
    model: nn.Module, tokenizer, parts: Parts, sites: Sequence[str], folder: str | Path | None, progress: bool | None
) -> Momentum:
    """The momentum of the measured part; from ``folder`` if it was counted there before."""
    assert parts.measure is not None
    path = None if folder is None else Path(folder, FILE_NAME)
    if path is not None and path.exists():
        return Momentum.load(path)
    checkpoint = None if path is None else path.with_name("momentum.checkpoint")
    momentum = measure(
        model, tokenizer, parts.measure, sites, checkpoint=checkpoint, resume=checkpoint is not None, progress=progress
    )
    if path is not None and checkpoint is not None:
        momentum.save(path)
        checkpoint.unlink(missing_ok=True)
    return momentum


def fitting(ks: Iterable[int], momentum: Momentum, sites: Sequence[str]) -> list[int]:
    """The numbers of AUs that every site has; a small model has fewer than the default's largest.

    Raises:
        TaskError: none are given. SelectionError: a site that was not measured.
    """
    ks = list(ks)
    if not ks:
        raise TaskError("ks: found none, expected numbers of AUs, for example (10, 100)")
    smallest = min(momentum.counters(site).positive.numel() for site in sites)
    return [k for k in ks if k <= smallest] or [smallest]
