"""What an evaluation found: shares, means and tests of every variant, and the items that they are taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor

from ..pairs.chat import ChatForm
from ..statistics.intervals import group_interval, mcnemar, share_interval

UNSTEERED = "unsteered"


class IntervalEstimate(NamedTuple):
    """A value with its 95 % interval; None where fewer than two groups of items give none."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class VariantResult:
    """One variant on all items. A change is against the unsteered model, on the same items; None for that model itself.

    Attributes:
        accuracy: share of items whose wanted option is the likeliest; None for a numeric task. Wilson's interval.
        exact: share of exact matches (paper): the model, writing greedily, writes the wanted option, or the right
            number. Wilson's interval.
        margin: mean log-odds of the wanted option against the best other one, nats; None for a numeric task. Student's
            interval over groups of items, as of all changes.
        accuracy_p, exact_p: McNemar's exact test against unsteered, two-sided.
        kl, rise: KL(unsteered || steered), and rise of the cross-entropy, on neutral text, nats a token; None if there
            was none.
        operation, sites, k, alpha: the steering.
    """

    name: str
    accuracy: IntervalEstimate | None
    exact: IntervalEstimate
    margin: IntervalEstimate | None
    accuracy_change: IntervalEstimate | None = None
    exact_change: IntervalEstimate | None = None
    margin_change: IntervalEstimate | None = None
    accuracy_p: float | None = None
    exact_p: float | None = None
    kl: float | None = None
    rise: float | None = None
    operation: str | None = None
    sites: tuple[str, ...] = ()
    k: int = 0
    alpha: float | dict[str, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Two variants on the same items: McNemar's exact tests of accuracy (None for a numeric task) and exact match."""

    first: str
    second: str
    accuracy_p: float | None
    exact_p: float


@dataclass(frozen=True)
class Evaluation:
    """A model on a task, unsteered and steered.

    Attributes:
        task, kind, source, digest, items, groups, grouped_by, chat_template: the task's. model: its name.
        neutral_texts: how many texts the side effects are of.
        variants: unsteered first. between: each two steered variants.
        rows: one an item, for tests of one's own: group, label or answer, and for each variant whether it was right,
            the margin, and log p of the options, or the text and the number in it.
        seconds: of the task's items under all variants, and of the neutral texts.
    """

    task: str
    kind: str
    source: str
    digest: str
    items: int
    groups: int
    grouped_by: str
    chat_template: ChatForm
    model: str
    neutral_texts: int
    variants: tuple[VariantResult, ...]
    between: tuple[Comparison, ...]
    rows: tuple[dict[str, Any], ...]
    seconds: dict[str, float]

    def to_json(self, rows: bool = True) -> dict[str, Any]:
        """Everything as JSON has it; ``rows`` says whether the table of items is among it."""
        found = asdict(self)
        for variant in found["variants"]:
            for name, value in variant.items():
                if isinstance(value, IntervalEstimate):
                    variant[name] = value._asdict()
        if not rows:
            del found["rows"]
        return found


@dataclass(frozen=True)
class Observed:
    """What was seen, before any statistics.

    Attributes:
        correct, exact: bool [names, items], right by the options and by what the model writes. margin: float64, nats.
            ``correct`` and ``margin`` are None for a numeric task.
        details: [names][items], what the table of items says besides.
    """

    correct: Tensor | None
    exact: Tensor
    margin: Tensor | None
    details: list[list[dict[str, Any]]]


def summarise(
    observed: Observed,
    names: Sequence[str],
    groups: Sequence[str],
    about: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[VariantResult, ...], tuple[Comparison, ...]]:
    """The results of each variant and the tests between each two steered ones.

    Args:
        names: unsteered first. groups: of the items. about: name -> further fields of its result.
    """
    correct, exact, margin = observed.correct, observed.exact, observed.margin
    results = []
    for i, name in enumerate(names):
        changes: dict[str, Any] = {}
        if i:
            for what, values in (("accuracy", correct), ("exact", exact), ("margin", margin)):
                if values is not None:
                    changes[f"{what}_change"] = _mean(values[i].double() - values[0].double(), groups)
            changes["accuracy_p"], changes["exact_p"] = _tested(observed, 0, i)
        results.append(
            VariantResult(
                name,
                None if correct is None else _share(correct[i]),
                _share(exact[i]),
                None if margin is None else _mean(margin[i], groups),
                **changes,
                **about.get(name, {}),
            )
        )
    between = (
        Comparison(names[i], names[j], *_tested(observed, i, j)) for i, j in combinations(range(1, len(names)), 2)
    )
    return tuple(results), tuple(between)


def _tested(observed: Observed, i: int, j: int) -> tuple[float | None, float]:
    """McNemar's test of two variants' accuracies and of their exact matches."""
    correct, exact = observed.correct, observed.exact
    return None if correct is None else mcnemar(correct[i], correct[j]), mcnemar(exact[i], exact[j])


def _share(right: Tensor) -> IntervalEstimate:
    hits, total = int(right.sum()), len(right)
    return IntervalEstimate(hits / total, *share_interval(hits, total))


def _mean(values: Tensor, groups: Sequence[str]) -> IntervalEstimate:
    return IntervalEstimate(float(values.double().mean()), *group_interval(values, groups))
