"""Prepares a search: the parts of the data, neutral texts, the record, momentum of the measured part, a profile."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines.arm import Material
from ..errors import GradientError, SelectionError, TaskError
from ..forward.causality import expect_causal
from ..forward.neutral import neutral_texts
from ..forward.tokens import encode
from ..measuring.measure import measure
from ..measuring.profiling import cached_profile
from ..models.sites import find_sites, fingerprint
from ..models.structure import is_offloaded, unwrap
from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..pairs.pairs import Pairs
from ..tasks.task import Task
from .budget import Budget
from .data import Parts, digest_of, split
from .options import SearchOptions
from .record import Record
from .scorer import Scorer

FILE_NAME = "momentum.safetensors"

#: Of a time budget, what measuring may take; and on how many pairs, at least, there is something to search with.
MEASURING, FEWEST_PAIRS = 0.3, 20

#: What a pair's effects take, in forward passes of it.
EFFECTS = 3.0


@dataclass(frozen=True)
class Preparation:
    """Attributes:
    parts: of the data. settings: all that the search depends on, for its record and its result.
    material: what methods make their plans from.
    tune_scorer, test_scorer: score on the tuning part, and on the test part with other neutral texts.
    """

    parts: Parts
    settings: dict[str, Any]
    material: Material
    tune_scorer: Scorer
    test_scorer: Scorer


def prepare(
    model: nn.Module,
    tokenizer,
    data: Task | Pairs | Parts,
    options: SearchOptions,
    *,
    sites: Iterable[str],
    profiled: Iterable[str] = (),
    profile: Profile | None = None,
    instead: str,
    settings: dict[str, Any],
    budget: Budget,
) -> Preparation:
    """
    Args:
        options: with a budget, as many pairs are measured as a part of it allows.
        sites: those to measure, where there is no momentum. profiled: those of which a method needs effects and a
            profile. profile: that one, if it was made before. instead: what to do without gradients.
        settings: what else the search depends on.
        budget: of the options, running; it notes what is left out.

    Raises:
        TaskError: a numeric task, too little data, a budget too small to measure, or a model that is not causal.
        CaptureError: a model that cannot be measured; GradientError where effects or profile are what it is for.
        FileFormatError: ``folder`` holds another search.
    """
    expect_causal(model)
    momentum, neutral = options.momentum, options.neutral
    if profile is not None:
        _check_profile(profile, model, profiled)
        settings = {**settings, "profile": [list(profile.sources), len(profile.tokens), profile.weights[:16]]}
    if momentum is not None and profiled:
        Material(model, tokenizer, Pairs(()), momentum).expect_effects("effect", profiled)
    given = isinstance(data, Parts) and data.measure is not None
    parts = split(data, measured=momentum is not None and not given, most=options.most, seed=options.seed)
    if neutral is None:
        tune_texts, test_texts = neutral_texts(), neutral_texts("heldout")
    else:  # every second one each
        tune_texts, test_texts = list(neutral[::2]), list(neutral[1::2]) or list(neutral)
    settings = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "data": {"name": parts.name, "source": parts.source, **parts.to_json()},
        "neutral": {"tune": digest_of(tune_texts), "test": digest_of(test_texts)},
        **settings,
    }
    record = Record(None if options.folder is None else Path(options.folder, "search.jsonl"), settings)
    tune_scorer = Scorer(model, tokenizer, parts.tune, tune_texts, record)
    test_scorer = Scorer(model, tokenizer, parts.test, test_texts, record, name="test")
    pairs = parts.measure
    if momentum is None and pairs is not None and budget.seconds is not None:
        everything = len(pairs)
        pairs = _affordable_pairs(pairs, tune_scorer, budget.seconds, 1 + EFFECTS if profiled else 1.0, instead)
        budget.note("pairs measured", len(pairs), everything)
        parts = replace(parts, measure=pairs)
        settings["data"] |= parts.to_json()
    try:
        if profiled and profile is None:
            texts, more = None if neutral is None else tune_texts, {"recompute": is_offloaded(model)}
            with budget.paused():
                profile = cached_profile(model, tokenizer, sorted(profiled), texts, progress=options.progress, **more)
        if momentum is None:
            assert pairs is not None
            momentum = _measured_momentum(model, tokenizer, pairs, sorted(sites), bool(profiled), options)
    except GradientError as error:
        raise GradientError(f"{error}; or {instead}") from error
    material = Material(model, tokenizer, parts.measure or Pairs(()), momentum, profile)
    return Preparation(parts, settings, material, tune_scorer, test_scorer)


def _check_profile(profile: Profile, model: nn.Module, sites: Iterable[str]) -> None:
    """Raises SelectionError: a profile of another model or weights, or without one of the sites."""
    profile.check(fingerprint(model, find_sites(model, list(profile.rows))))
    profile.check_weights(unwrap(model))
    if missing := sorted({*sites} - {*profile.rows}):
        raise SelectionError(
            f"profile: found one of {', '.join(profile.rows)}, expected one of {', '.join(missing)}, too; make it anew "
            "with these sites, or search others"
        )


def _affordable_pairs(pairs: Pairs, scorer: Scorer, budget: float, passes: float, instead: str) -> Pairs:
    """As many of the pairs as can be measured within a part of the budget, from all over them.

    Args:
        passes: what a pair takes, in forward passes of it. instead: what to do without gradients, which take most.

    Raises:
        TaskError: they are too few for a search.
    """
    count = scorer.record.get("pairs to measure")
    if count is None:
        some = pairs[:: max(1, len(pairs) // 100)]
        texts = [pair.prompt + side for pair in some for side in (pair.positive, pair.negative)]
        seconds = passes * scorer.costs.token * sum(map(len, encode(scorer.tokenizer, texts))) / len(some)
        least = min(FEWEST_PAIRS, len(pairs))
        if MEASURING * budget < least * seconds:
            raise TaskError(
                f"budget: found {budget:.0f} s, too little to measure {least} pairs; expected at least "
                f"{math.ceil(least * seconds / MEASURING)} s here, or a momentum that was measured before"
                + (f"; or {instead}" if passes > 1 else "")
            )
        count = min(len(pairs), int(MEASURING * budget / seconds))
        scorer.record.put("pairs to measure", count)
    return replace(pairs, items=tuple(pairs[i * len(pairs) // count] for i in range(count)))


def _measured_momentum(
    model: nn.Module, tokenizer, pairs: Pairs, sites: list[str], effects: bool, options: SearchOptions
) -> Momentum:
    """The momentum of the measured part; from the search's folder if it was counted there before."""
    if options.folder is None:
        return measure(model, tokenizer, pairs, sites, effects=effects, progress=options.progress)
    path = Path(options.folder, FILE_NAME)
    if path.exists():
        return Momentum.load(path)
    checkpoint = path.with_name("momentum.checkpoint")
    show = options.progress
    momentum = measure(
        model, tokenizer, pairs, sites, effects=effects, checkpoint=checkpoint, resume=True, progress=show
    )
    momentum.save(path)
    checkpoint.unlink(missing_ok=True)
    return momentum
