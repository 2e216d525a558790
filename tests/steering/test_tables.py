"""Strength tables: what each operation and plan writes, and that the buffers stay where they are."""

import pytest
import torch

from austeer.plans.fit import LayerUnits
from austeer.steering.tables import DirectionTable, StrengthTable


def table(operation):
    index, rank = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 0])
    beta, delta = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([2.0, 3.0, -4.0])
    return StrengthTable([LayerUnits(0, index, beta, delta, rank, operation)], 1, 6, torch.device("cpu"), dense=True)


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
    assert t.index.tolist() == [[0, 2, 4]]
    assert t.gamma.tolist() == [gamma] and t.shift.tolist() == [shift] and t.magnitude is magnitude
    whole = [[[strengths[0], 0, strengths[1], 0, strengths[2], 0]] for strengths in (gamma, shift)]
    assert [t.dense_gamma.tolist(), t.dense_shift.tolist()] == whole == [each.tolist() for each in t.expanded()]
    operands = {"scale": [[1 + g for g in whole[0][0]]], "push": [whole[0][0], [1.0]], "shift": [whole[1][0]]}
    assert [each.tolist() for each in t.operands] == operands[operation]


def test_aus_from_rank_k_on_get_nothing_and_come_back():
    t = table("scale")
    t.fill([(1.0, 2)])
    assert t.gamma.tolist() == [[0.0, 0.25, 0.5]]
    t.fill([(1.0, 6)])
    assert t.gamma.tolist() == [[-1.0, 0.25, 0.5]]


def test_refilling_keeps_the_buffers_where_they_are():
    t = table("shift")

    def places():
        return [b.data_ptr() for b in (t.index, t.gamma, t.shift, t.dense_gamma, t.dense_shift, *t.operands)]

    before = places()
    t.fill([(3.0, 1)])
    t.fill([(-1.0, 6)])
    assert places() == before and len(before) == 6


def test_gamma_is_computed_in_float32():
    t = table("scale")
    t.fill([(0.1, 6)])
    assert t.gamma[0, 0] == torch.tensor(0.1, dtype=torch.float32) * -1


def test_each_plan_has_a_list_of_its_own_aus():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    entries = [
        LayerUnits(0, torch.tensor([5, 1]), one, two, torch.tensor([0, 1]), "scale"),
        LayerUnits(2, torch.tensor([1, 3]), one, two, torch.tensor([0, 7]), "shift"),
    ]
    t = StrengthTable(entries, 3, 6, torch.device("cpu"))
    t.fill([(1.0, 9), (9.0, 9), (2.0, 1)])
    assert t.index.tolist() == [[1, 5], [-1, -1], [1, 3]] and t.columns == 2
    assert t.dense_gamma is None and t.operands is None
    assert t.gamma.tolist() == [[2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert t.shift.tolist() == [[0.0, 0.0], [0.0, 0.0], [6.0, 0.0]]
    assert t.shifts and t.scales
    factor, addend = t.spread(torch.tensor([0, -1, 2, 1]))
    assert factor.tolist() == [[1, 3, 1, 1, 1, 2], [1] * 6, [1] * 6, [1] * 6]
    assert addend.tolist() == [[0] * 6, [0] * 6, [0, 6, 0, 0, 0, 0], [0] * 6]


def test_a_plan_with_every_au_beside_one_with_few():
    """Unused entries of the short list are written to a column that the plan does not have, and change nothing."""
    every, one = torch.arange(4), torch.tensor([0])
    entries = [
        LayerUnits(i, index, *(torch.ones(len(index)),) * 2, index, "scale") for i, index in enumerate((every, one))
    ]
    t = StrengthTable(entries, 2, 4, torch.device("cpu"))
    t.fill([(2.0, 4), (5.0, 4)])
    assert t.spread(torch.tensor([0, 1, -1]))[0].tolist() == [[3.0] * 4, [6.0, 1, 1, 1], [1.0] * 4]


def test_a_direction_is_of_the_aus_in_use_and_its_buffers_stay_where_they_are():
    index, rank, values = torch.tensor([4, 0, 2]), torch.tensor([1, 5, 0]), torch.tensor([3.0, -12.0, -4.0])
    other = LayerUnits(1, torch.tensor([5]), torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([7]), "ablate")
    t = DirectionTable([LayerUnits(0, index, values / 12, values, rank, "ablate")], 1, 6, torch.device("cpu"))
    two = DirectionTable([*t.entries, other], 2, 6, torch.device("cpu"))
    places = [b.data_ptr() for b in (t.index, t.direction, t.strength, *t.operands)]
    for k, expected in ((6, [-12 / 13, -4 / 13, 3 / 13]), (2, [0.0, -0.8, 0.6]), (1, [0.0, -1.0, 0.0])):
        t.fill([(0.5, k)])
        two.fill([(0.5, k), (2.0, k)])
        assert t.index.tolist() == [[0, 2, 4]] and two.index.tolist() == [[0, 2, 4], [5, -1, -1]]
        assert t.direction[0].tolist() == two.direction[0].tolist() == pytest.approx(expected)
        assert t.strength.tolist() == [0.5] and two.strength.tolist() == [0.5, 2.0]
        first = [expected[0], 0, expected[1], 0, expected[2], 0]
        whole, strength = two.spread(torch.tensor([0, -1, 1]))
        assert t.operands[0].tolist() == whole[0].tolist() == pytest.approx(first) and t.operands[1].tolist() == [0.5]
        assert whole[1:].tolist() == [[0.0] * 6, [0.0] * 6], "a plan has no direction of AUs beyond its k"
        assert strength.tolist() == [[0.5], [0.0], [2.0]]
    assert places == [b.data_ptr() for b in (t.index, t.direction, t.strength, *t.operands)]
    two.fill([(0.5, 6), (2.0, 8)])
    assert two.spread(torch.tensor([1]))[0].tolist() == [[0, 0, 0, 0, 0, 1.0]] and two.operands is None


def test_push_and_scale_need_tables_of_their_own():
    index, values = torch.tensor([0]), torch.tensor([1.0])
    entries = [LayerUnits(i, index, values, values, index, name) for i, name in enumerate(("push", "scale"))]
    with pytest.raises(ValueError, match="magnitude"):
        StrengthTable(entries, 2, 4, torch.device("cpu"))


def test_buffers_moved_in_inference_mode_can_be_refilled_outside():
    t = table("scale")
    with torch.inference_mode():
        t.to(torch.device("meta"))  # stands for another GPU
    assert not any(buffer.is_inference() for buffer in (t.index, t.gamma, t.shift, t.dense_gamma, *t.operands))
