"""How stable a ranking is: how much of the top k two disjoint halves of the pairs agree on.

Each half has half of the pairs, and so ranks worse than all of them do: another set of as many pairs as all would
choose more of the same again than one half does of the other's. :func:`expected_overlap` estimates how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from scipy import optimize, stats

from ..counters import Counted
from ..errors import SelectionError, check_count
from .ranking import ranking

#: Below so many AUs one more or less is a tenth and more, and an overlap mostly luck.
LEAST_K = 10

_NODES, _WEIGHTS = (t / 2 for t in np.polynomial.legendre.leggauss(200))
_NODES = _NODES + 0.5  # of an integral from 0 to 1
_MOST = 0.99999


def overlap(first: Counted, second: Counted, site: str, k: int, ties: str = "effect") -> float:
    """Share of the top k AUs of ``first`` that are also in the top k of ``second``; k / size by chance.

    Raises:
        SelectionError: a site that was not measured, or a k that is not from 1 to its size.
    """
    order = ranking(first, site, ties)
    k = check_count("k", k, order.numel(), f"AUs of {site!r}", SelectionError)
    return len(np.intersect1d(order[:k].numpy(), ranking(second, site, ties)[:k].numpy())) / k


@dataclass(frozen=True)
class Stability:
    """What two halves of the pairs say of a site's ranking, for some k.

    Attributes:
        pairs: of each half. size: AUs of the site. k: ascending.
        overlap: share of the top k of one half that is in the top k of the other.
        chance: what that would be by chance, k / size.
        score: the share that is in both with the same sign less the share that is in both with opposite signs. By
            chance both are alike, whatever else the AUs have in common (say, how often they are active at all), so that
            the score of chance is 0 for every k; 1 is full agreement.
        expected: the overlap that is to be expected between all pairs and another set of as many.
    """

    pairs: tuple[int, int]
    size: int
    k: tuple[int, ...]
    overlap: tuple[float, ...]
    chance: tuple[float, ...]
    score: tuple[float, ...]
    expected: tuple[float, ...]

    def best(self) -> tuple[int, float]:
        """The k of the largest score, and that score."""
        place = max(range(len(self.k)), key=lambda i: self.score[i])
        return self.k[place], self.score[place]


def stability(momentum: Counted, site: str, k: tuple[int, ...] | None = None, ties: str = "effect") -> Stability:
    """How much of the top k the two halves of the pairs agree on.

    Args:
        k: a geometric series from 10 to a tenth of the site by default (:func:`geometric`).

    Raises:
        SelectionError: the momentum has no halves, the site was not measured, or a k is out of range.
    """
    counters = momentum.counters(site)
    halves, size = momentum.halves(), counters.positive.numel()
    if k is None:
        chosen = geometric(size)
    else:
        chosen = tuple(sorted({check_count("k", n, size, f"AUs of {site!r}", SelectionError) for n in k}))
    place, sign = np.zeros((2, size), dtype=np.int64), np.zeros((2, size), dtype=np.int64)
    for i, half in enumerate(halves):
        place[i, ranking(half, site, ties).numpy()] = np.arange(size)
        found = half.counters(site)
        sign[i] = torch.sign(found.positive - found.negative).flatten().numpy()
    # An AU is in both tops from the k on that is the worse of its two places.
    worst, agree = place.max(0), sign[0] * sign[1]
    both = np.cumsum(np.bincount(worst, minlength=size))
    net = np.cumsum(np.bincount(worst, weights=agree, minlength=size))
    ks = np.array(chosen, dtype=np.int64)
    score = net[ks - 1] / ks
    factor = momentum.pairs / (halves[0].pairs * halves[1].pairs) ** 0.5
    return Stability(
        pairs=(halves[0].pairs, halves[1].pairs),
        size=size,
        k=chosen,
        overlap=tuple((both[ks - 1] / ks).tolist()),
        chance=tuple((ks / size).tolist()),
        score=tuple(score.tolist()),
        expected=tuple(expected_overlap(s, n, size, factor) for s, n in zip(score.tolist(), chosen)),
    )


def geometric(size: int) -> tuple[int, ...]:
    """k from 10 to a tenth of a site of this size, ten to a factor of ten; of tiny sites every k up to half.

    In a larger part of a site AUs no longer stand out: halves can agree on many signs there, and on no AU of the top.
    """
    last = size // 10
    if last < LEAST_K:
        return tuple(range(1, max(size // 2, 1) + 1))
    series = LEAST_K * 10 ** (np.arange(int(np.log10(last / LEAST_K) * 10 + 1e-9) + 1) / 10)
    return tuple(dict.fromkeys(series.round().astype(int).tolist()))


def stable_k(momentum: Counted, site: str, min_stability: float, ties: str = "effect") -> int:
    """The largest k of the series with a score of ``min_stability`` or more; SelectionError if there is none."""
    asked = min_stability
    if isinstance(asked, bool) or not isinstance(asked, Real) or not 0 < asked <= 1:
        raise SelectionError(f"min_stability: found {asked!r}, expected a share above 0 up to 1, for example 0.5")
    found = stability(momentum, site, ties=ties)
    k = max((k for k, score in zip(found.k, found.score) if score >= asked), default=None)
    if k is None:
        best, score = found.best()
        raise SelectionError(
            f"min_stability: no k of site {site!r} reaches {asked}; found at most {score:.2f}, at k = {best}, between "
            f"halves of {found.pairs[0]} and {found.pairs[1]} pairs. Give more pairs, another site, or a smaller share"
        )
    return k


def expected_overlap(score: float, k: int, size: int, factor: float) -> float:
    """The overlap to be expected between two sets of ``factor`` times as many pairs as those with this score at k.

    The sign statistics of an AU on two sets of pairs are taken as normal with a correlation of their own at this k: the
    one that gives the score. ``factor`` times as many pairs raise it as in Spearman and Brown's formula.
    """
    low, high = 0.0, _MOST
    if score <= 0:
        correlation = low
    elif score >= _agreement(high, k, size)[1]:
        correlation = high
    else:
        correlation = float(optimize.brentq(lambda r: _agreement(r, k, size)[1] - score, low, high))
    correlation = factor * correlation / (1 + (factor - 1) * correlation)
    # Nearer to 1 than the largest correlation gives, the score itself: an overlap is never less.
    return max(_agreement(min(correlation, high), k, size)[0], score)


def _agreement(correlation: float, k: int, size: int) -> tuple[float, float]:
    """Overlap and score of the top k by |z| of ``size`` AUs, where the two z of an AU are normal and so correlated."""
    tail = k / size / 2
    cut, z = stats.norm.isf(tail), stats.norm.isf(tail * _NODES)
    rest = (1 - correlation**2) ** 0.5
    same, opposite = (float(_WEIGHTS @ stats.norm.sf((cut - s * correlation * z) / rest)) for s in (1, -1))
    return min(same + opposite, 1.0), same - opposite


@dataclass(frozen=True)
class Ties:
    """AUs that share |beta| with the last one of the top k.

    Attributes:
        k: how many are taken. beta: |beta| of the last. tied: how many AUs have it. inside: how many of them are taken.
    """

    k: int
    beta: float
    tied: int
    inside: int


def ties_at_cut(momentum: Counted, site: str, k: int) -> Ties:
    """How much of the top k the tie rule decides.

    Raises:
        SelectionError: a site that was not measured, or a k that is not from 1 to its size.
    """
    counters = momentum.counters(site)
    most = torch.maximum(counters.positive, counters.negative).flatten()
    k = check_count("k", k, most.numel(), f"AUs of {site!r}", SelectionError)
    cut = most.topk(k).values[-1]
    above = int((most > cut).sum())
    return Ties(k, float(cut) / momentum.pairs, int((most == cut).sum()), k - above)
