"""The benchmark of many plans in one batch: forms agree, the model is steered row by row, wrong gets no time."""

import json

import pytest
import torch

import austeer_kernels
from bench import many_plans, report, shapes
from bench.graphs import WrongResultError
from bench.many_plans import ManyPlans
from bench.plans import spread_plan
from bench.published.efficiency import section
from bench.published.load import Result

CPU, BATCH = torch.device("cpu"), 4


@pytest.fixture(autouse=True)
def loud():
    yield
    report.quiet = False


def test_the_union_is_the_same_steering_as_the_lists(seed):
    lists = many_plans.random_lists(3, 12, 5, CPU)
    union = many_plans.union_of(lists)
    assert union[0].shape[1] > 5 and union[0].stride(0) == 0
    y, row_plan = torch.randn(BATCH, 12), torch.tensor([0, 1, 2, 0], dtype=torch.int32)
    by_lists, by_union = (austeer_kernels.steer_columns_(y.clone(), *t, row_plan=row_plan) for t in (lists, union))
    torch.testing.assert_close(by_lists, by_union)
    assert not torch.equal(by_lists, y)


@pytest.fixture
def model():
    return shapes.build(shapes.tiny(shapes.LLAMA_8B), CPU, torch.float32)


def test_each_row_of_the_model_has_its_plan(model):
    plans = [spread_plan(model, many_plans.SITE, 8, seed=number) for number in range(3)]
    ids = torch.randint(3, 64, (BATCH, 4))
    way = ManyPlans(model, plans, BATCH)
    assert way.check(model, ids)[0] < 1e-6
    found = way.logits(ids)
    for row, number in enumerate([0, 1, 2, 0]):
        alone = ManyPlans(model, plans[number : number + 1], 1)
        torch.testing.assert_close(found[row], alone.logits(ids[row : row + 1])[0], rtol=1e-4, atol=1e-5)
        alone.close()
    way.steering.rows(["1", "0", "2", "0"])
    with pytest.raises(WrongResultError, match="3 plans, layer 0"):
        way.check(model, ids)
    way.close()


def test_what_is_wrong_gets_no_time(monkeypatch):
    monkeypatch.setattr(many_plans.ak, "steer_columns_", lambda y, *_, **__: y)
    with pytest.raises(WrongResultError, match="lists, 1"):
        many_plans.operation(many_plans.parse(["--quick"]), CPU, torch.float32)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert many_plans.main(["--out", str(tmp_path), "--quick", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (path,) = (tmp_path / "cpu").glob("plans-quick-*.json")
    assert json.loads(path.read_text()) == content and content["complete"]
    rows = content["operation"]["rows"]
    assert set(rows) == {"copy", many_plans.AGAIN, "lists, 1", "union, 1", "lists, 3", "union, 3"}
    assert rows["lists, 3"]["columns"] == many_plans.QUICK_AUS < rows["union, 3"]["columns"]
    (entry,) = content["models"]
    assert set(entry["rows"]) == {"unsteered", many_plans.AGAIN, "1", "3"}
    for row in (*rows.values(), *entry["rows"].values()):
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    shown = section(Result(path, "cpu", "plans", ("", 1), content))
    assert "lists, 3" in shown and "3 plans" in shown


@pytest.mark.parametrize("plans", [["0"], ["1", "5"]])
def test_more_plans_than_rows_are_refused(plans, capsys):
    with pytest.raises(SystemExit):
        many_plans.parse(["--batch", "4", "--plans", *plans])
    assert "expected 1 to 4" in capsys.readouterr().err
