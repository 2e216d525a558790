"""Strength tables: what each operation and plan writes, and that the buffers stay where they are."""

import pytest
import torch

from austeer.plans.fit import LayerUnits
from austeer.steering.tables import StrengthTable


def table(operation):
    index, rank = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 0])
    beta, delta = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([2.0, 3.0, -4.0])
    return StrengthTable([LayerUnits(0, index, beta, delta, rank, operation)], 1, 6, torch.device("cpu"))


@pytest.mark.parametrize(
    ("operation", "gamma", "shift", "magnitude"),
    [
        ("scale", [-2.0, 0.5, 1.0], [0.0, 0.0, 0.0], False),
        ("push", [-2.0, 0.5, 1.0], [0.0, 0.0, 0.0], True),
        ("shift", [0.0, 0.0, 0.0], [6.0, -8.0, 4.0], False),
    ],
)
def test_each_operation_has_its_strengths(operation, gamma, shift, magnitude):
    t = table(operation)
    t.fill([(2.0, 6)])
    assert t.index.tolist() == [0, 2, 4]
    assert t.gamma.tolist() == [gamma] and t.shift.tolist() == [shift] and t.magnitude is magnitude
    assert t.dense_gamma.tolist() == [[gamma[0], 0, gamma[1], 0, gamma[2], 0]]
    assert t.dense_shift.tolist() == [[shift[0], 0, shift[1], 0, shift[2], 0]]


def test_aus_from_rank_k_on_get_nothing_and_come_back():
    t = table("scale")
    t.fill([(1.0, 2)])
    assert t.gamma.tolist() == [[0.0, 0.25, 0.5]]
    t.fill([(1.0, 6)])
    assert t.gamma.tolist() == [[-1.0, 0.25, 0.5]]


def test_refilling_keeps_the_buffers_where_they_are():
    t = table("shift")
    places = [getattr(t, name).data_ptr() for name in ("index", "gamma", "shift", "dense_gamma", "dense_shift")]
    t.fill([(3.0, 1)])
    t.fill([(-1.0, 6)])
    assert places == [getattr(t, name).data_ptr() for name in ("index", "gamma", "shift", "dense_gamma", "dense_shift")]


def test_gamma_is_computed_in_float32():
    t = table("scale")
    t.fill([(0.1, 6)])
    assert t.gamma[0, 0] == torch.tensor(0.1, dtype=torch.float32) * -1


def test_each_plan_has_a_row_over_the_aus_of_all():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    entries = [
        LayerUnits(0, torch.tensor([5, 1]), one, two, torch.tensor([0, 1]), "scale"),
        LayerUnits(2, torch.tensor([1, 3]), one, two, torch.tensor([0, 7]), "shift"),
    ]
    t = StrengthTable(entries, 3, 6, torch.device("cpu"), dense=False)
    t.fill([(1.0, 9), (9.0, 9), (2.0, 1)])
    assert t.index.tolist() == [1, 3, 5] and t.dense_gamma is None
    assert t.gamma.tolist() == [[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert t.shift.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [6.0, 0.0, 0.0]]
    assert t.shifts and t.scales


def test_push_and_scale_need_tables_of_their_own():
    index, values = torch.tensor([0]), torch.tensor([1.0])
    entries = [LayerUnits(i, index, values, values, index, name) for i, name in enumerate(("push", "scale"))]
    with pytest.raises(ValueError, match="magnitude"):
        StrengthTable(entries, 2, 4, torch.device("cpu"))
