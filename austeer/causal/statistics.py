"""Do top AUs do more than matched random ones, and does the effect go with beta? With intervals and p-values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.stats import rankdata

RESAMPLES = 2000
LEVEL = 0.95

#: What an interval says that is above zero, below it, or neither.
SENTENCES = {
    "size": (
        "top AUs have a larger effect than matched random AUs",
        "top AUs have a smaller effect than matched random AUs",
        "no difference in the size of the effect from matched random AUs was found",
    ),
    "wanted": (
        "top AUs act in the wanted direction more than matched random AUs",
        "top AUs act in the wanted direction less than matched random AUs",
        "no difference in the wanted direction from matched random AUs was found",
    ),
    "signed": (
        "the direction of the effect goes with the sign and size of beta",
        "the direction of the effect goes against beta",
        "no rank correlation of beta with the effect was found",
    ),
    "absolute_given": (
        "the size of the effect rises with |beta|, layer and scale held constant",
        "the size of the effect falls with |beta|, layer and scale held constant",
        "no rank correlation of |beta| with the size of the effect was found, layer and scale held constant",
    ),
}

Array = np.ndarray


@dataclass(frozen=True)
class Difference:
    """A mean over the top AUs beside that over the matched ones.

    Attributes:
        top, matched: nats. difference: top - matched, with its 95 % interval (bootstrap).
        p: two-sided, of the test that exchanges top and matched AUs within pairs at random, on these items.
    """

    top: float
    matched: float
    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, with its 95 % interval (bootstrap)."""

    rho: float
    low: float
    high: float


@dataclass(frozen=True)
class Findings:
    """What one way of steering single AUs shows. Intervals are over AUs; of ``wanted`` and ``signed`` over items, too.

    Attributes:
        size: of the mean |effect|. wanted: of the mean effect in the direction that momentum predicts.
        larger: share of the top AUs whose |effect| is larger than their match's, with its interval.
        signed: correlation of beta with the effect of raising the AU. absolute: of |beta| with the |effect|.
        absolute_given: the same when layer and scale are held constant (partial rank correlation).
    """

    size: Difference
    wanted: Difference
    larger: tuple[float, float, float]
    signed: Correlation
    absolute: Correlation
    absolute_given: Correlation


def resampled(count: int, groups: Sequence[str] | None) -> Callable[[np.random.Generator], Array]:
    """Draws what each of so many items counts in the mean of a resample: [items]. Items of one group are alike.

    Args:
        groups: each item's group; None: these items are all there are, and none is resampled.
    """
    if groups is None:
        return lambda rng: np.full(count, 1 / count)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    label, total = [numbers[group] for group in groups], len(numbers)

    def draw(rng: np.random.Generator) -> Array:
        found = rng.multinomial(total, np.full(total, 1 / total))[label]
        return found / found.sum()

    return draw


def difference(top: Array, matched: Array, groups: Sequence[str] | None = None, seed: int = 0) -> Difference:
    """
    Args:
        top, matched: [pairs, items], values of each top AU and of its match.
        groups: of the items, which are resampled too; None: they are not.
    """
    each, weights = top - matched, resampled(top.shape[1], groups)
    low, high = _interval(lambda chosen, rng: float((each[chosen] @ weights(rng)).mean()), len(each), seed)
    test = stats.permutation_test(
        (top.mean(1), matched.mean(1)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return Difference(float(top.mean()), float(matched.mean()), float(each.mean()), low, high, float(test.pvalue))


def correlation(
    x: Array, y: Array, given: Array | None = None, groups: Sequence[str] | None = None, seed: int = 0
) -> Correlation:
    """Spearman's; with ``given`` [AUs, columns] the partial one, of the ranks that a linear fit on theirs leaves over.

    NaN where one side does not vary.

    Args:
        x: [AUs]. y: [AUs, items]. groups: of the items, as above.
    """
    weights = resampled(y.shape[1], groups)

    def again(chosen: Array, rng: np.random.Generator) -> float:
        return rank_correlation(x[chosen], y[chosen] @ weights(rng), None if given is None else given[chosen])

    return Correlation(rank_correlation(x, y.mean(1), given), *_interval(again, len(x), seed))


def rank_correlation(x: Array, y: Array, given: Array | None = None) -> float:
    """Spearman's rho of x and y [AUs], or the partial one."""
    a, b = rankdata(x), rankdata(y)
    if given is not None:
        ranks = np.column_stack([np.ones(len(x)), *(rankdata(column) for column in given.T)])
        fit, *_ = np.linalg.lstsq(ranks, np.column_stack([a, b]), rcond=None)
        a, b = (np.column_stack([a, b]) - ranks @ fit).T
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 1e-9 else float("nan")


def _interval(statistic: Callable[[Array, np.random.Generator], float], count: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over so many AUs, or pairs of them, and over what the statistic resamples itself."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count), rng) for _ in range(RESAMPLES)]
    if np.isnan(values).all():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def findings(
    *,
    raised: Array,
    sign: Array,
    beta: Array,
    given: Array,
    top: Array,
    matched: Array,
    spread: Array,
    groups: Sequence[str],
    seed: int = 0,
) -> Findings:
    """
    Args:
        raised: [AUs, items], the effect of raising each AU, nats. sign: [AUs], +1 or -1, which way is wanted.
        beta: [AUs]. given: [AUs, columns], what is held constant. groups: of the items.
        top, matched, spread: places of the three kinds of AUs.
    """
    # Resampled items would add their noise to every |effect|, so those have their interval on these items alone.
    size, wanted = np.abs(raised.mean(1, keepdims=True)), sign[:, None] * raised
    hits = int((size[top] > size[matched]).sum())
    share = stats.binomtest(hits, len(top)).proportion_ci(LEVEL, method="wilson")
    strength = np.abs(beta[spread])
    return Findings(
        difference(size[top], size[matched], seed=seed),
        difference(wanted[top], wanted[matched], groups, seed),
        (hits / len(top), float(share.low), float(share.high)),
        correlation(beta[spread], raised[spread], groups=groups, seed=seed),
        correlation(strength, size[spread], seed=seed),
        correlation(strength, size[spread], given[spread], seed=seed),
    )


def verdict(found: Findings) -> list[str]:
    """In plain words what follows from the intervals, and nothing else."""
    sentences = []
    for name, (above, below, neither) in SENTENCES.items():
        value: Difference | Correlation = getattr(found, name)
        sentences.append(above if value.low > 0 else below if value.high < 0 else neither)
    return sentences
