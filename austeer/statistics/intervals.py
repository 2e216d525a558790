"""Intervals and paired tests for what was seen on a sample."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats
from torch import Tensor


def mean_interval(values: Tensor, groups: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    """A confidence interval around the mean of all values when those of one group are alike.

    Student's t with the cluster-robust error of the mean: the sum of a group's deviations is what varies. With groups
    of equal size that is the interval of the groups' means.

    Args:
        values: [n]. groups: the group of each value, for example a pair's topic; at least two different ones.
    """
    mean = float(values.double().mean())
    sums: dict[str, float] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    count = len(sums)
    error = (count / (count - 1) * sum(u * u for u in sums.values())) ** 0.5 / len(values)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    return mean - reach, mean + reach


def group_interval(values: Tensor, groups: Sequence[str]) -> tuple[float, float] | tuple[None, None]:
    """:func:`mean_interval`, or twice None where all values are of one group."""
    return mean_interval(values, groups) if len(set(groups)) > 1 else (None, None)


def share_interval(hits: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, for example an accuracy."""
    found = stats.binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def mcnemar(first: Tensor, second: Tensor) -> float:
    """Exact two-sided p-value of McNemar's test: whether two variants are right equally often on the same items.

    Args:
        first, second: bool [items], whether each variant was right.
    """
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0
