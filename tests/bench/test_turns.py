"""Generation by turns: every token of every way once a turn, in random order, with a clock and edits of its own."""

import gc
from contextlib import contextmanager

import pytest
import torch
from transformers import GenerationConfig

from bench import turns
from bench.catalogue import InWeights
from bench.plain_ways import WAYS
from bench.plans import spread_plan
from bench.steered import Steered, twin
from tiny_models import ids_of_rows, tiny_model


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """What other tests have left does not have to be looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class World:
    """A clock that only made-up models move, what they did, and which of them are active."""

    def __init__(self):
        self.now, self.log, self.active, self.ended = 0.0, [], [], []


class Fake(Steered):
    """A model whose tokens take ``seconds`` each and whose prompt takes 10 times that; it may fail at a token."""

    def __init__(self, world, name, seconds, fails_at=None):
        self.world, self.name, self.seconds, self.fails_at = world, name, seconds, fails_at

    def generate(self, ids, *, max_new_tokens, min_new_tokens, do_sample, stopping_criteria):
        assert max_new_tokens == min_new_tokens and not do_sample
        try:
            for token in range(max_new_tokens):
                assert self.world.active == [self.name]
                self.world.log.append((self.name, int(ids[0, 0]), token))
                if token == self.fails_at:
                    raise ArithmeticError(self.name)
                self.world.now += self.seconds * (10 if token == 0 else 1)
                ids = torch.cat([ids, torch.full((len(ids), 1), token)], 1)
                assert not stopping_criteria(ids, None).any()
            return ids
        finally:
            self.world.ended.append(self.name)

    @contextmanager
    def active(self):
        self.world.now += 1000  # is nobody's time
        self.world.active.append(self.name)
        try:
            yield
        finally:
            self.world.active.remove(self.name)
            self.world.now += 1000


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: world.now)
    return world


def prompt_of(number):
    return torch.full((2, 3), number)


def test_each_way_has_its_own_clock(world):
    ways = {name: Fake(world, name, seconds) for name, seconds in {"a": 1.0, "b": 2.0, "c": 0.5}.items()}
    generations = []
    times = turns.by_turns(ways, prompt_of, 4, lambda done: done < 3, on_generation=lambda: generations.append(1))
    for name, fake in ways.items():
        assert times["first_token"][name] == [[10 * fake.seconds]] * 3
        assert times["token"][name] == [[fake.seconds] * 3] * 3
    assert len(generations) == 4  # and one that warms up
    assert {number for _, number, _ in world.log} == {-1, 0, 1, 2} and not world.active


def test_every_turn_has_each_way_once_in_another_order(world):
    ways = {name: Fake(world, name, 1.0) for name in "abc"}
    turns.by_turns(ways, prompt_of, 5, lambda done: done < 4)
    rounds = [world.log[i : i + 3] for i in range(0, len(world.log), 3)]
    assert len(rounds) == 5 * 5
    for same in rounds:
        assert sorted(name for name, _, _ in same) == list("abc")
        assert len({(number, token) for _, number, token in same}) == 1
    orders = ["".join(name for name, _, _ in one) for one in rounds]
    assert len(set(orders)) == 6 and max(map(orders.count, set(orders))) < 12
    first = [log[0] for log in world.log]
    again = World()
    world.log, world.now = again.log, 0.0
    turns.by_turns({name: Fake(world, name, 1.0) for name in "abc"}, prompt_of, 5, lambda done: done < 4)
    assert [log[0] for log in world.log] == first, "the same seed gives the same order"


def test_without_greenlets_whole_generations_take_turns(world, monkeypatch):
    monkeypatch.setattr(turns, "greenlet", None)
    ways = {name: Fake(world, name, seconds) for name, seconds in {"a": 1.0, "b": 2.0, "c": 0.5}.items()}
    times = turns.by_turns(ways, prompt_of, 4, lambda done: done < 6)
    for name, fake in ways.items():
        assert times["first_token"][name] == [[10 * fake.seconds]] * 6
        assert times["token"][name] == [[fake.seconds] * 3] * 6
    runs = ["".join(name for name, _, _ in world.log[i : i + 12 : 4]) for i in range(0, len(world.log), 12)]
    assert len(runs) == 7 and all(sorted(one) == list("abc") for one in runs) and len(set(runs)) > 2
    assert [token for _, _, token in world.log] == [0, 1, 2, 3] * 3 * 7 and not world.active


def test_an_exception_in_one_ends_all(world):
    ways = {name: Fake(world, name, 1.0, fails_at=2 if name == "b" else None) for name in "abc"}
    with pytest.raises(ArithmeticError, match="b"):
        turns.by_turns(ways, prompt_of, 5, lambda done: done < 3)
    assert sorted(world.ended) == list("abc") and not world.active and gc.isenabled()
    assert torch.is_grad_enabled()


@pytest.fixture
def ways():
    """A model's ways, and the weights that folding edits."""
    model = tiny_model().double()
    model.generation_config = GenerationConfig(pad_token_id=0)
    plan = spread_plan(model, "ffn", 40)
    made = {way.name: way.make(twin(model), plan, 4.0) for way in WAYS}
    return made | {
        "fold": InWeights("fold", twin(model), plan, 4.0),
        "fold again": InWeights("fold", twin(model), plan, -2.0),
    }


OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@torch.no_grad()
def test_interleaved_generations_are_those_of_each_alone(ways):
    ids = ids_of_rows()["input_ids"]
    alone = {}
    for name, way in ways.items():
        with way.active():
            alone[name] = way.generate(ids, **OPTIONS)
    assert torch.equal(alone["public"], alone["fold"]) and not torch.equal(alone["fold"], alone["unsteered"])
    assert not torch.equal(alone["fold again"], alone["fold"])
    running = {name: turns.Generation(way, ids, 5) for name, way in ways.items()}
    for _ in range(5):
        for generation in running.values():
            assert generation.step() > 0
    for name, generation in running.items():
        assert torch.equal(generation.finish(), alone[name]), name
        assert generation.output.shape == (2, 7 + 5)
    for generation in running.values():
        generation.abandon()  # has ended already: nothing happens


@pytest.mark.parametrize("fails", [False, True])
def test_folded_weights_are_those_of_the_model_while_others_run(ways, fails):
    model, calls = ways["unsteered"].model, []
    before = [p.clone() for p in model.parameters()]

    def look(*_):
        calls.append(all(map(torch.equal, model.parameters(), before)))
        if fails and len(calls) == 5:
            raise ArithmeticError

    model.get_output_embeddings().register_forward_hook(look)
    prompt = ids_of_rows()["input_ids"]
    if fails:
        with pytest.raises(ArithmeticError):
            turns.by_turns(ways, lambda number: prompt, 3, lambda done: done < 2)
    else:
        times = turns.by_turns(ways, lambda number: prompt, 3, lambda done: done < 2)
        for what, count in (("first_token", 1), ("token", 2)):
            rows = [row for of in times[what].values() for row in of]
            assert len(rows) == 2 * len(ways) and all(len(row) == count and min(row) > 0 for row in rows)
    assert len(calls) == (5 if fails else 9) and all(calls)
    assert all(map(torch.equal, model.parameters(), before)) and gc.isenabled()


def test_gradients_are_on_again_afterwards(ways):
    """``generate`` switches them off and on for itself; by turns each would restore what another has set."""
    prompt = ids_of_rows()["input_ids"]
    assert torch.is_grad_enabled()
    turns.by_turns(ways, lambda number: prompt, 2, lambda done: False)
    assert torch.is_grad_enabled()


@torch.no_grad()
def test_a_generation_that_is_abandoned_has_no_output(ways):
    generation = turns.Generation(ways["public"], ids_of_rows()["input_ids"], 5)
    generation.abandon()  # never started
    generation.step()
    generation.abandon()
    assert generation.output is None
