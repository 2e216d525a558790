"""One decoding step at a fixed place: right logits, the same ones each time, compiled or not, and timed by turns."""

import gc

import pytest
import torch

from bench import steps
from bench.catalogue import OURS as WAYS
from bench.plain_ways import Formula
from bench.plans import spread_plan
from bench.steered import Steered, UnavailableError, twin
from bench.steps import COMPILE, GRAPH, Step
from tiny_models import ids_of_rows, tiny_model

ALPHA = 4.0
MAKE = {way.name: way.make for way in WAYS} | {
    "formula": Formula,
    "unsteered": lambda model, plan, alpha: Steered(model),
}


@pytest.fixture
def uncompiled(monkeypatch):
    """Everything but the compiler."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: asked.append(options) or call)
    return asked


@pytest.fixture(scope="module", autouse=True)
def clean():
    """What other tests have left does not have to be looked at again and again; and nothing compiled stays."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch._dynamo.reset()


def expected(model, plan, ids):
    with torch.no_grad():
        return Formula(twin(model), plan, ALPHA).logits(torch.cat([ids, ids[:, :1]], 1))[:, -1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("name", ["columns", "fold", "formula"])
def test_a_step_is_what_comes_after_the_prompt(uncompiled, family, name):
    model, ids = tiny_model(family), ids_of_rows()["input_ids"]
    plan = spread_plan(model, "ffn", 40)
    step = Step(MAKE[name](twin(model), plan, ALPHA), ids, COMPILE)
    first = step.run()
    torch.testing.assert_close(first, expected(model, plan, ids), rtol=1e-4, atol=1e-4)
    assert step.sample(5) > 0 and step.sample(steps.ROOM - 1) > 0
    assert torch.equal(step.run(), first), "wound back, it is the same step"
    assert uncompiled == [{"fullgraph": True, "dynamic": False}]
    assert torch.equal(step.token, ids[:, :1])


def test_two_compiled_ways_of_one_model_keep_apart():
    """Compiled code is looked up by the function's code: one way must not run another's."""
    model, ids = tiny_model(num_hidden_layers=1), ids_of_rows()["input_ids"]
    plan = spread_plan(model, "ffn", 20)
    made = {name: MAKE[name](twin(model), plan, ALPHA) for name in ("unsteered", "formula", "fold")}
    compiled = {name: Step(way, ids, COMPILE) for name, way in made.items()}
    with torch.no_grad():
        plain = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1]
    for _ in range(2):
        found = {name: step.run() for name, step in compiled.items()}
        for name in ("formula", "fold"):
            torch.testing.assert_close(found[name], expected(model, plan, ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["unsteered"], plain, rtol=1e-4, atol=1e-4)
        assert (found["fold"] - plain).abs().max() > 0.1
        compiled["fold"].sample(3)


def test_what_is_not_one_graph_is_unavailable():
    model = tiny_model(num_hidden_layers=1)
    other = twin(model)
    other.get_decoder().layers[0].mlp.register_forward_hook(lambda *args: torch._dynamo.graph_break())
    with pytest.raises(UnavailableError, match=r"^compile: ") as found:
        Step(Steered(other), ids_of_rows()["input_ids"], COMPILE)
    assert "\n" not in str(found.value)


def test_a_cuda_graph_needs_a_gpu():
    with pytest.raises(UnavailableError, match="found a CPU, expected a GPU; use execution 'eager' or 'compile'"):
        Step(Steered(tiny_model()), ids_of_rows()["input_ids"], GRAPH)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_cuda_graph_is_the_same_step(family):
    model, ids = tiny_model(family).cuda(), ids_of_rows()["input_ids"].cuda()
    plan = spread_plan(model, "ffn", 40)
    for name in ("columns", "fold", "formula"):
        step = Step(MAKE[name](twin(model), plan, ALPHA), ids, GRAPH)
        first = step.run()
        torch.testing.assert_close(first, expected(model, plan, ids), rtol=1e-3, atol=1e-3)
        assert step.sample(5) > 0
        assert torch.equal(step.run(), first), name


class Fake:
    """A step that counts its samples and takes as many seconds as its name says."""

    def __init__(self, log, seconds):
        self.log, self.seconds, self.token, self.compiled = log, seconds, torch.zeros(1, 1), False

    def sample(self, count):
        assert count == 1 and not gc.isenabled()
        self.log.append(self.seconds)
        return self.seconds


def test_samples_are_taken_by_turns_after_a_group_that_warms_up():
    log, groups, asked = [], [], []
    fakes = {str(seconds): Fake(log, seconds) for seconds in (1.0, 2.0, 3.0)}

    def go_on(done):
        asked.append(done)
        return done < 4

    found = steps.by_turns(fakes, 5, go_on, lambda: groups.append(1))
    assert found == {name: [[fake.seconds] * 5] * 4 for name, fake in fakes.items()}
    assert asked == [0, 1, 2, 3, 4] and len(groups) == 5 and gc.isenabled()
    rounds = [tuple(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert len(rounds) == 25 and all(sorted(one) == [1.0, 2.0, 3.0] for one in rounds)
    assert len(set(rounds)) == 6
