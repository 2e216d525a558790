"""Strength tables: what each operation writes, and that the buffers stay where they are."""

import pytest
import torch

from austeer.strengths import StrengthTable


def table(operation):
    index, rank = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 0])
    beta, delta = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([2.0, 3.0, -4.0])
    return StrengthTable(index, beta, delta, rank, 6, operation, torch.device("cpu"))


@pytest.mark.parametrize(
    ("operation", "gamma", "shift", "magnitude"),
    [
        ("scale", [1.0, -2.0, 0.5], [0.0, 0.0, 0.0], False),
        ("push", [1.0, -2.0, 0.5], [0.0, 0.0, 0.0], True),
        ("shift", [0.0, 0.0, 0.0], [4.0, 6.0, -8.0], False),
    ],
)
def test_each_operation_has_its_strengths(operation, gamma, shift, magnitude):
    t = table(operation)
    t.fill(2.0, 6)
    assert t.gamma.tolist() == [gamma] and t.shift.tolist() == [shift] and t.magnitude is magnitude
    assert t.dense_gamma.tolist() == [[gamma[1], 0, gamma[2], 0, gamma[0], 0]]
    assert t.dense_shift.tolist() == [[shift[1], 0, shift[2], 0, shift[0], 0]]


def test_aus_from_rank_k_on_get_nothing_and_come_back():
    t = table("scale")
    t.fill(1.0, 2)
    assert t.gamma.tolist() == [[0.5, 0.0, 0.25]]
    t.fill(1.0, 6)
    assert t.gamma.tolist() == [[0.5, -1.0, 0.25]]


def test_refilling_keeps_the_buffers_where_they_are():
    t = table("shift")
    places = [getattr(t, name).data_ptr() for name in ("index", "gamma", "shift", "dense_gamma", "dense_shift")]
    t.fill(3.0, 1)
    t.fill(-1.0, 6)
    assert places == [getattr(t, name).data_ptr() for name in ("index", "gamma", "shift", "dense_gamma", "dense_shift")]


def test_gamma_is_computed_in_float32():
    t = table("scale")
    t.fill(0.1, 6)
    assert t.gamma[0, 1] == torch.tensor(0.1, dtype=torch.float32) * -1
