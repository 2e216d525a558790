"""Do top AUs do more than matched random ones, and what does the effect go with? With intervals and p-values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    "beta": (
        "the direction of the effect goes with the sign and size of beta",
        "the direction of the effect goes against beta",
        "no rank correlation of beta with the effect was found",
    ),
    "absolute_given": (
        "the size of the effect rises with |beta|, layer and scale held constant",
        "the size of the effect falls with |beta|, layer and scale held constant",
        "no rank correlation of |beta| with the size of the effect was found, layer and scale held constant",
    ),
    "predicted": (
        "the effect goes with the one that its gradient predicts",
        "the effect goes against the one that its gradient predicts",
        "no rank correlation of the predicted effect with the measured one was found",
    ),
    "ahead": (
        "the gradient ranks effects better than beta does",
        "the gradient ranks effects worse than beta does",
        "no difference between the gradient and beta in ranking effects was found",
    ),
}

Array = np.ndarray

#: A value and its 95 % interval.
Interval = tuple[float, float, float]


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
class Agreement:
    """How the measured effect of raising AUs goes with what was known of them before. Intervals are over AUs and items.

    Attributes:
        count: AUs. beta, delta, predicted: rank correlation of each with the measured effect. predicted is the gradient
            times the shift; it, ``ahead`` and ``slope`` are None where that is not known.
        ahead: by how much the correlation of the predicted effect is above beta's.
        slope: the measured effect for one nat of predicted effect: of a line through zero, where both vanish.
    """

    count: int
    beta: Correlation
    delta: Correlation
    predicted: Correlation | None = None
    ahead: Interval | None = None
    slope: Interval | None = None


@dataclass(frozen=True)
class Findings:
    """What one way of steering single AUs shows. Intervals are over AUs; of ``wanted`` and agreements over items, too.

    Attributes:
        size: of the mean |effect|. wanted: of the mean effect in the direction that momentum predicts.
        larger: share of the top AUs whose |effect| is larger than their match's, with its interval.
        absolute: correlation of |beta| with the |effect|. absolute_given: the same when layer and scale are held
            constant (partial rank correlation).
        spread: with the effect of raising, over AUs of every |beta|. mixed: the same when the top ones by predicted
            effect, and by effect per side effect, are among them; None where effects are not known.
    """

    size: Difference
    wanted: Difference
    larger: Interval
    absolute: Correlation
    absolute_given: Correlation
    spread: Agreement
    mixed: Agreement | None


#: Statistics of resamples: of the places of AUs [resamples, AUs] and their effects [resamples, AUs], each [resamples].
Statistics = Callable[[Array, Array], Sequence[Array]]


def weights(count: int, groups: Sequence[str] | None, resamples: int, rng: np.random.Generator) -> Array:
    """What each of so many items counts in the mean of each resample: [resamples, items]. Items of a group go together.

    Args:
        groups: each item's group; None: these items are all there are, and none is resampled.
    """
    if groups is None:
        return np.full((resamples, count), 1 / count)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    label, total = [numbers[group] for group in groups], len(numbers)
    found = rng.multinomial(total, np.full(total, 1 / total), size=resamples)[:, label]
    return found / found.sum(1, keepdims=True)


def with_intervals(y: Array, statistics: Statistics, groups: Sequence[str] | None, seed: int) -> list[Interval]:
    """Statistics as they are and their percentile bootstraps, all on the same resamples of AUs and of items.

    Args:
        y: [AUs, items], or pairs or groups of AUs. groups: of the items.
    """
    count, items = y.shape
    rng = np.random.default_rng(seed)
    chosen = rng.integers(count, size=(RESAMPLES, count))
    effects = np.take_along_axis(weights(items, groups, RESAMPLES, rng) @ y.T, chosen, axis=1)
    found: list[Interval] = []
    for values, again in zip(statistics(np.arange(count)[None], y.mean(1)[None]), statistics(chosen, effects)):
        unknown = np.isnan(again).all()  # one side does not vary
        low, high = (np.nan, np.nan) if unknown else np.nanquantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found.append((float(values[0]), float(low), float(high)))
    return found


def difference(top: Array, matched: Array, groups: Sequence[str] | None = None, seed: int = 0) -> Difference:
    """
    Args:
        top, matched: [pairs, items], values of each top AU and of its match.
        groups: of the items, which are resampled too; None: they are not.
    """
    ((mean, low, high),) = with_intervals(top - matched, lambda _, effect: [effect.mean(-1)], groups, seed)
    test = stats.permutation_test(
        (top.mean(1), matched.mean(1)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return Difference(float(top.mean()), float(matched.mean()), mean, low, high, float(test.pvalue))


def correlation(x: Array, y: Array, given: Array | None = None, seed: int = 0) -> Correlation:
    """Spearman's; with ``given`` [AUs, columns] the partial one, of the ranks that a linear fit on theirs leaves over.

    NaN where one side does not vary.

    Args:
        x, y: [AUs].
    """

    def rho(chosen: Array, effect: Array) -> list[Array]:
        return [rank_correlation(x[chosen], effect, None if given is None else given[chosen])]

    return Correlation(*with_intervals(y[:, None], rho, None, seed)[0])


def agreement(known: Mapping[str, Array], y: Array, groups: Sequence[str], seed: int = 0) -> Agreement:
    """
    Args:
        known: "beta", "delta", and "predicted" if it is known, in this order: [AUs] each.
        y: [AUs, items], the effect of raising them. groups: of the items.
    """

    def all_of(chosen: Array, effect: Array) -> list[Array]:
        rhos = [rank_correlation(x[chosen], effect) for x in known.values()]
        if "predicted" not in known:
            return rhos
        return [*rhos, rhos[2] - rhos[0], slope(known["predicted"][chosen], effect)]

    beta, delta, *rest = with_intervals(y, all_of, groups, seed)
    if not rest:
        return Agreement(len(y), Correlation(*beta), Correlation(*delta))
    predicted, ahead, line = rest
    return Agreement(len(y), Correlation(*beta), Correlation(*delta), Correlation(*predicted), ahead, line)


def linearity(predicted: Array, y: Array, groups: Sequence[str], seed: int = 0) -> tuple[Interval, Interval]:
    """Pearson's correlation of predicted with measured effects, and the slope, with intervals over AUs and items.

    Args:
        predicted: [groups of AUs]. y: [groups of AUs, items]. groups: of the items.
    """

    def both(chosen: Array, effect: Array) -> list[Array]:
        x = predicted[chosen]
        rounding = 1e-12 * np.linalg.norm(x, axis=-1) * np.linalg.norm(effect, axis=-1)
        return [_correlation(x, effect, rounding), slope(x, effect)]

    pearson, line = with_intervals(y, both, groups, seed)
    return pearson, line


def slope(x: Array, y: Array) -> Array:
    """Of the line through zero that is nearest to y at x: [..., AUs] to [...]; NaN where x is zero throughout."""
    size = (x * x).sum(-1)
    return np.where(size > 0, (x * y).sum(-1) / np.where(size > 0, size, 1), np.nan)


def rank_correlation(x: Array, y: Array, given: Array | None = None) -> Array:
    """Spearman's rho of x and y [..., AUs], or the partial one, given [..., AUs, columns]: [...]."""
    a, b = _centred(rankdata(x, axis=-1)), _centred(rankdata(y, axis=-1))
    if given is not None:
        columns = rankdata(given, axis=-2)
        columns = columns - columns.mean(-2, keepdims=True)
        inverse = np.linalg.pinv(columns, rcond=1e-10)  # a column may not vary, or two be alike
        a, b = (t - (columns @ (inverse @ t[..., None]))[..., 0] for t in (a, b))
    return _correlation(a, b, 1e-9)


def _centred(x: Array) -> Array:
    return x - x.mean(-1, keepdims=True)


def _correlation(a: Array, b: Array, least: Array | float) -> Array:
    """Pearson's, of the last axis; NaN where the sides vary by no more than ``least``."""
    a, b = _centred(a), _centred(b)
    spread = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.where(spread > least, (a * b).sum(-1) / np.where(spread > least, spread, 1), np.nan)


def findings(
    *,
    raised: Array,
    sign: Array,
    known: Mapping[str, Array],
    given: Array,
    top: Array,
    matched: Array,
    spread: Array,
    mixed: Array | None,
    groups: Sequence[str],
    seed: int = 0,
) -> Findings:
    """
    Args:
        raised: [AUs, items], the effect of raising each AU, nats. sign: [AUs], +1 or -1, which way is wanted.
        known: see :func:`agreement`. given: [AUs, columns], what is held constant. groups: of the items.
        top, matched, spread: places of the three kinds of AUs. mixed: those of the last kind and of the top ones by
            effect, where effects are known.
    """
    # Resampled items would add their noise to every |effect|, so those have their interval on these items alone.
    size, wanted = np.abs(raised.mean(1, keepdims=True)), sign[:, None] * raised
    hits = int((size[top] > size[matched]).sum())
    share = stats.binomtest(hits, len(top)).proportion_ci(LEVEL, method="wilson")
    strength = np.abs(known["beta"][spread])

    def agreeing(places: Array) -> Agreement:
        return agreement({name: x[places] for name, x in known.items()}, raised[places], groups, seed)

    return Findings(
        difference(size[top], size[matched], seed=seed),
        difference(wanted[top], wanted[matched], groups, seed),
        (hits / len(top), float(share.low), float(share.high)),
        correlation(strength, size[spread, 0], seed=seed),
        correlation(strength, size[spread, 0], given[spread], seed=seed),
        agreeing(spread),
        None if mixed is None else agreeing(mixed),
    )


def verdict(found: Findings) -> list[str]:
    """In plain words what follows from the intervals, and nothing else."""
    intervals = {name: (getattr(found, name).low, getattr(found, name).high) for name in ("size", "wanted")}
    intervals["beta"] = (found.spread.beta.low, found.spread.beta.high)
    intervals["absolute_given"] = (found.absolute_given.low, found.absolute_given.high)
    if found.mixed is not None and found.mixed.predicted is not None and found.mixed.ahead is not None:
        intervals["predicted"] = (found.mixed.predicted.low, found.mixed.predicted.high)
        intervals["ahead"] = found.mixed.ahead[1:]
    sentences = []
    for name, (low, high) in intervals.items():
        above, below, neither = SENTENCES[name]
        sentences.append(above if low > 0 else below if high < 0 else neither)
    return sentences
