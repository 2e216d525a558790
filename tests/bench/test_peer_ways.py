"""Other libraries' ways to steer, against the definition written out; each where its package is installed."""

import importlib.util
import sys

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from bench.peers import libraries as peers
from bench.steered import UnavailableError, twin
from dense_formula import formula_at, random_plan
from tiny_models import ids_of_rows, tiny_model

WAYS = {way.name: way for way in peers.WAYS}
#: The package of each, and the sites that it can steer.
PACKAGES = {
    "lora": ("peft", ("ffn", "attention")),
    "pyvene": ("pyvene", ("ffn", "attention", "layer")),
    "nnsight": ("nnsight", ("ffn", "attention", "layer")),
    "repeng": ("repeng", ("layer",)),
    "steering-vectors": ("steering_vectors", ("ffn", "layer")),
}
CASES = [(name, site) for name, (_, sites) in PACKAGES.items() for site in sites]
ALPHA, STEPS = 4.0, 6  # alpha * beta is exact in float32


@pytest.fixture
def model():
    """In float64, where greedy choices do not hang on rounding; it never stops by itself."""
    model = tiny_model().double()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """Generations that are left in the middle leave without them; bench/turns.py sees to that itself."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def ids():
    return ids_of_rows()["input_ids"]


def make(name, model, plan, alpha=ALPHA):
    package = PACKAGES[name][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return WAYS[name].make(twin(model), plan, alpha)


@torch.no_grad()
def logits_of(model, ids):
    return model(input_ids=ids, use_cache=False).logits


class Switch(StoppingCriteria):
    """Never stops; counts the steps, and hands over to ``switch`` at each."""

    def __init__(self, switch=lambda: None):
        self.steps, self.switch = 0, switch

    def __call__(self, ids, scores, **kwargs):
        self.steps += 1
        self.switch()
        return torch.zeros(len(ids), dtype=torch.bool)


def generate(generate, ids, criterion=None, **options):
    criteria = StoppingCriteriaList([criterion or Switch()])
    with torch.no_grad():
        return generate(
            ids, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, stopping_criteria=criteria, **options
        )


def greedy(model, ids):
    return generate(lambda ids, **o: model.generate(ids, attention_mask=torch.ones_like(ids), **o), ids)


@pytest.mark.parametrize("name, site", CASES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_logits_are_the_formula_s(name, site, family, ids):
    model = tiny_model(family).double()
    plan = random_plan(model, site, 40)
    plan = plan.take((plan.layer != 1).nonzero()[:, 0])  # a layer is left alone
    steered = make(name, model, plan)
    with torch.no_grad():
        found, again = steered.logits(ids), steered.logits(ids)
    with formula_at(model, plan, ALPHA):
        expected = logits_of(model, ids)
    assert (expected - logits_of(model, ids)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(found, again)


@pytest.mark.parametrize("name, site", CASES)
@pytest.mark.parametrize("rows", [1, 2])
def test_generation_is_the_formula_s_from_the_prompt_on(name, site, rows, model, ids):
    ids, plan = ids[:rows], random_plan(model, site, 40)
    with formula_at(model, plan, ALPHA):
        expected = greedy(model, ids)
    unsteered = greedy(model, ids)
    assert not torch.equal(expected, unsteered)
    steered, criterion = make(name, model, plan), Switch()
    assert torch.equal(generate(steered.generate, ids, criterion), expected)
    assert criterion.steps == STEPS
    assert torch.equal(generate(steered.generate, ids), expected), "the second time"


@pytest.mark.parametrize("name, site", CASES)
def test_the_model_whose_weights_it_shares_is_left_alone(name, site, model, ids):
    before = {key: t.clone() for key, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    unsteered = logits_of(model, ids)
    steered = make(name, model, random_plan(model, site, 40))
    with torch.no_grad():
        assert not torch.equal(steered.logits(ids), unsteered)
        assert torch.equal(logits_of(model, ids), unsteered)
        generate(steered.generate, ids)
    steered.close()
    assert torch.equal(logits_of(model, ids), unsteered)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("name, site", CASES)
def test_bfloat16_errs_like_a_few_roundings(name, site, model, ids):
    plan = random_plan(model, site, 40)
    with formula_at(model, plan, 1.0):
        exact = logits_of(model, ids)
    narrow = tiny_model().bfloat16()
    with formula_at(narrow, plan, 1.0):
        allowed = 3 * (logits_of(narrow, ids) - exact).abs().mean()
    with torch.no_grad():
        found = make(name, narrow, plan, 1.0).logits(ids)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() <= allowed


@pytest.mark.parametrize("first", PACKAGES)
@pytest.mark.parametrize("second", PACKAGES)
def test_generations_interleave_token_by_token(first, second, model, ids):
    greenlet = pytest.importorskip("greenlet", reason="greenlet is not installed")
    turns, expected, runs = [], [], []
    for number, (name, rows) in enumerate(((first, ids[:1]), (second, ids[1:]))):
        plan = random_plan(model, PACKAGES[name][1][0], 40, seed=number)
        with formula_at(model, plan, ALPHA):
            expected.append(greedy(model, rows))
        steered = make(name, model, plan)

        def run(steered=steered, rows=rows, number=number):
            def switch():
                turns.append(number)
                greenlet.getcurrent().parent.switch()

            return generate(steered.generate, rows, Switch(switch))

        runs.append(greenlet.greenlet(run))
    found = [None, None]
    while not all(run.dead for run in runs):
        for number, run in enumerate(runs):
            if not run.dead:
                found[number] = run.switch()
    assert turns == [0, 1] * STEPS
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(name, model, monkeypatch):
    package, sites = PACKAGES[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=rf"found no module '{package}'; install it with: pip install .*"):
        WAYS[name].make(twin(model), random_plan(model, sites[0], 3), ALPHA)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_site_out_of_reach_is_refused(name, model):
    for site in {"ffn", "attention", "layer"}.difference(PACKAGES[name][1]):
        with pytest.raises(UnavailableError, match=r"found .*, expected "):
            make(name, model, random_plan(model, site, 3))


def test_peft_has_an_adapter_of_exactly_the_rank_of_each_planned_layer(model):
    plan = random_plan(model, "ffn", 7)
    steered = make("lora", model.bfloat16(), plan)
    weights = {key: p for key, p in steered.model.named_parameters() if "lora_A" in key}
    ranks = {int(key.split(".layers.")[1].split(".")[0]): p.shape[0] for key, p in weights.items()}
    assert ranks == {layer: plan.layer.tolist().count(layer) for layer in plan.layer.tolist()}
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("site", ["ffn", "attention"])
def test_peft_scales_a_bias_with_its_output(site, ids):
    model = tiny_model("llama", mlp_bias=True, attention_bias=True).double()
    plan = random_plan(model, site, 40)
    with formula_at(model, plan, ALPHA):
        expected = logits_of(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(make("lora", model, plan).logits(ids), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family, site", [("gpt2", "ffn"), ("gpt2", "attention"), ("mixtral", "ffn")])
def test_peft_refuses_what_no_lora_of_a_linear_layer_is(family, site):
    model = tiny_model(family)
    with pytest.raises(UnavailableError, match=r"found \w+ at .* of layer \d, expected a torch.nn.Linear"):
        make("lora", model, random_plan(model, site, 3))
