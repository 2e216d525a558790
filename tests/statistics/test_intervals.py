"""Intervals and paired tests: they cover as often as they say, and agree with what is known."""

import pytest
import torch
from scipy import stats

from austeer.statistics.intervals import mcnemar, mean_interval, share_interval


def test_interval_covers_the_mean_as_often_as_it_says():
    """Also where the values of a group are alike, which an interval over single values would not survive."""
    generator = torch.Generator().manual_seed(0)
    groups = [f"topic {i // 8}" for i in range(80)]
    covered, naive = 0, 0
    for _ in range(200):
        topics = torch.randn(10, generator=generator, dtype=torch.float64).repeat_interleave(8)
        values = 3 + topics + 0.5 * torch.randn(80, generator=generator, dtype=torch.float64)
        low, high = mean_interval(values, groups)
        assert low < float(values.mean()) < high
        covered += low <= 3 <= high
        low, high = mean_interval(values, [str(i) for i in range(80)])
        naive += low <= 3 <= high
    assert 180 <= covered <= 198  # 190 expected
    assert naive < 160


def test_interval_is_students_t_where_each_value_is_its_own_group():
    values = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    expected = stats.t.interval(0.9, 3, loc=3.5, scale=stats.sem(values.numpy()))
    assert mean_interval(values, list("abcd"), 0.9) == pytest.approx(expected)
    assert mean_interval(torch.full((5,), 0.25), list("aabbc")) == (0.25, 0.25)


def test_interval_is_around_the_mean_of_all_values_also_where_groups_are_of_unlike_size():
    generator = torch.Generator().manual_seed(1)
    sizes = [1, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    groups = [f"topic {i}" for i, size in enumerate(sizes) for _ in range(size)]
    topics = torch.randn(len(sizes), generator=generator, dtype=torch.float64)
    values = 3 + topics.repeat_interleave(torch.tensor(sizes))
    assert sum(mean_interval(values, groups)) / 2 == pytest.approx(float(values.mean()))


def test_share_interval_is_wilsons():
    """Against the formula, and where the plain normal interval has no width."""
    z, n = stats.norm.ppf(0.975), 40
    for hits in (0, 7, 40):
        middle = (hits + z**2 / 2) / (n + z**2)
        reach = z / (n + z**2) * (hits * (n - hits) / n + z**2 / 4) ** 0.5
        assert share_interval(hits, n) == pytest.approx((middle - reach, middle + reach), abs=1e-12)
    assert share_interval(7, n, 0.5)[0] > share_interval(7, n)[0]


def test_mcnemar_counts_only_items_that_changed():
    first = torch.tensor([True] * 10 + [False] * 8)
    assert mcnemar(first, first) == 1
    second = first.clone()
    second[:1], second[10:16] = False, True  # one lost, six gained
    assert mcnemar(first, second) == mcnemar(second, first) == pytest.approx(2 * (1 + 7) / 2**7)
    more = torch.cat([first, torch.ones(100, dtype=torch.bool)]), torch.cat([second, torch.ones(100, dtype=torch.bool)])
    assert mcnemar(*more) == mcnemar(first, second)
