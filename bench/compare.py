"""Ways to measure momentum side by side on the same pairs: checked, then timed in turns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from .graphs import ratios, spread
from .naive import Gate
from .pair_sets import PairSet
from .ways import Run, TokensRun, Way, tokens_of

#: The paper measures with up to so many pairs. Ratios are also given as they would be there, because what does not grow
#: with the pairs (the public loop over all AUs, our question whether the model takes trees) weighs more on few.
MANY = 1000


def evenly(lengths: Sequence[int], count: int) -> list[int]:
    """The numbers of ``count`` pairs whose lengths are spread as all are: the middle one of as many equal groups."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return sorted(order[int((group + 0.5) * len(order) / count)] for group in range(count))


def compare(
    model: PreTrainedModel,
    tokenizer,
    pair_set: PairSet,
    ways: Mapping[str, Way],
    counts: Mapping[str, int],
    gate: Gate,
    rounds: int,
    references: Sequence[str],
) -> dict[str, Any]:
    """Every way on the first pairs of a set. In each round all run once, in a new random order, and each is checked.

    Args:
        counts: with how many pairs, by the ways' names. gate: made for at least as many pairs.
        rounds: at least 2; one more, not timed, warms up and counts tokens. references: what speeds are compared with.

    Raises:
        WrongResultError: a way counts something else.
    """
    first = pair_set.pairs[: max(counts.values())]
    lengths = tokens_of(tokenizer, first)
    chosen = {name: evenly([sum(pair) for pair in zip(lengths[::2], lengths[1::2])], counts[name]) for name in ways}
    pairs = {name: replace(first, items=tuple(first[i] for i in chosen[name])) for name in ways}
    rows: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        with TokensRun(model) as tokens_run:
            run = way(model, tokenizer, pairs[name])
        rows[name] = {
            "pairs": counts[name],
            "tokens": sum(tokens_of(tokenizer, pairs[name])),
            # Layer by layer, what lies before the layers runs once for each of them; ours counts by itself.
            "tokens_run": run.report["tokens_padded"] if run.report else tokens_run.count,
            "differing_counts": gate.check(name, run.counts, chosen[name]),
        }
    order, shuffle = list(ways), random.Random(0).shuffle
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            run = ways[name](model, tokenizer, pairs[name])
            gate.check(name, run.counts, chosen[name])
            runs[name].append(run)
    for name, row in rows.items():
        row["seconds"] = asdict(spread([run.seconds for run in runs[name]]))
        row["report"] = runs[name][-1].report
        row["fixed_seconds"] = spread([run.fixed for run in runs[name]]).median
        for where, at in (("", None), (f"_at_{MANY}", MANY)):
            mine = [run.a_pair(counts[name], at) for run in runs[name]]
            row[f"pairs_a_second{where}"] = 1 / spread(mine).median
            row[f"faster_than{where}"] = {
                reference: asdict(ratios([run.a_pair(counts[reference], at) for run in runs[reference]], mine))
                for reference in references
                if reference != name
            }
    return {
        "set": pair_set.name,
        "source": pair_set.pairs.source,
        "long": pair_set.long,
        "tokens_a_text": asdict(spread(lengths)),
        "near_ties": gate.near_share,
        "ways": rows,
    }
