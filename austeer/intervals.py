"""Intervals and paired tests for what was seen on a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor


def mean_interval(values: Tensor, groups: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the mean when values of one group are alike (Student's t over the groups' means).

    Args:
        values: [n]. groups: the group of each value, for example a pair's topic; at least two different ones.
    """
    members: dict[str, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    means = torch.tensor([sum(m) / len(m) for m in members.values()], dtype=torch.float64)
    error = float(means.std()) / len(means) ** 0.5
    reach = float(stats.t.ppf((1 + level) / 2, len(means) - 1)) * error
    return float(means.mean()) - reach, float(means.mean()) + reach


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
