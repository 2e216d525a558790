"""Steering where a probe fires: each row is as the definition has it alone, steered or not by its prompt's score."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import StaticCache

import austeer
from austeer.errors import SteeringWarning
from austeer.models.sites import find_sites, fingerprint
from dense_formula import formula_at, hook, logits, random_plan
from letter_answers import answer_of
from scripted import Script, scripted_logits
from tiny_models import left_padded

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22], [30, 31], [40, 41, 42, 43]]
NEW = 7
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
ALPHA = 3.0


@pytest.fixture(scope="module")
def model(one_lively):
    return one_lively


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model, ("ffn", "attention"), 20, "push")


def probe_at(model, site, layer, threshold=0.0, seed=5):
    """A probe of a random direction."""
    sites = find_sites(model, site)
    print_ = fingerprint(model, sites)
    direction = torch.randn(print_.widths[site], generator=torch.Generator().manual_seed(seed))
    return austeer.Probe(site, layer, direction / direction.norm(), threshold, print_)


def score_of(model, probe, prompt):
    """A prompt's score, by a hook on the unsteered model."""
    seen = []
    site = find_sites(model, probe.site)[probe.site][probe.layer]
    handle = hook(model, site, lambda x: seen.append(x) or x)
    logits(model, {"input_ids": torch.tensor([prompt])})
    handle.remove()
    return float(seen[0].reshape(-1, site.width)[-1].double() @ probe.direction.double())


@pytest.fixture(scope="module")
def probes(model):
    """At each site, with a threshold between the second and the third of the prompts' scores."""
    found = {}
    for site, layer in (("layer", 1), ("ffn", 0), ("attention", 2), ("neuron", 2)):
        probe = probe_at(model, site, layer)
        scores = sorted(score_of(model, probe, prompt) for prompt in PROMPTS)
        found[site] = replace(probe, threshold=(scores[1] + scores[2]) / 2)
    return found


def by_definition(model, plan, probe, prompts, **options):
    """Each row alone: its score first, then the plan on what is generated, without a cache."""
    rows, fired = [], []
    for prompt in prompts:
        fired.append(score_of(model, probe, prompt) > probe.threshold)
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            where = (torch.arange(ids.shape[1]) >= len(prompt))[None] & fired[-1]
            with formula_at(model, plan, ALPHA, where):
                best = logits(model, {"input_ids": ids})[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
        rows.append(ids[0, len(prompt) :])
    return torch.stack(rows), fired


FORMS = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("site", ["layer", "ffn", "attention", "neuron"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_batch(model, plan, probes, site, form):
    probe, batch = probes[site], left_padded(PROMPTS)
    expected, fired = by_definition(model, plan, probe, PROMPTS)
    assert 0 < sum(fired) < len(PROMPTS)
    plain = model.generate(**batch, **GREEDY)[:, -NEW:]
    assert [torch.equal(a, b) for a, b in zip(expected, plain)] == [not fires for fires in fired]
    scores = torch.tensor([score_of(model, probe, prompt) for prompt in PROMPTS])
    with austeer.steer(model, plan, ALPHA, scope="generation", when=probe) as steering:
        assert torch.equal(model.generate(**batch, **GREEDY, **FORMS[form])[:, -NEW:], expected)
        when = steering.report().when
        assert (when.decided, when.fired) == (len(PROMPTS), sum(fired))
        torch.testing.assert_close(torch.tensor(when.scores), scores, rtol=1e-3, atol=1e-3)
        assert f"fired for {sum(fired)} of {len(PROMPTS)} rows" in str(steering.report())
        # Another batch is judged anew.
        again = model.generate(**left_padded(PROMPTS[::-1]), **GREEDY, **FORMS[form])[:, -NEW:]
        assert torch.equal(again, expected.flip(0))
        assert steering.report().when.decided == 2 * len(PROMPTS)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_plan_at_the_probed_site(model, probes, layer):
    """The prompt is not steered, so what is read there is the model's own."""
    plan = random_plan(model, ("layer",), 20, "shift")
    probe = probe_at(model, "layer", layer)
    scores = sorted(score_of(model, probe, prompt) for prompt in PROMPTS)
    probe = replace(probe, threshold=(scores[1] + scores[2]) / 2)
    expected, _ = by_definition(model, plan, probe, PROMPTS)
    with austeer.steer(model, plan, ALPHA, scope="generation", when=probe):
        for _ in range(2):
            assert torch.equal(model.generate(**left_padded(PROMPTS), **GREEDY)[:, -NEW:], expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_follow_their_row(model, plan, probes, options):
    fired = [score_of(model, probes["layer"], prompt) > probes["layer"].threshold for prompt in PROMPTS]
    for prompts, fires in [([prompt], fires) for prompt, fires in zip(PROMPTS, fired)]:
        with austeer.steer(model, {"a": plan}, ALPHA, scope="generation") as steering:
            steering.rows(["a" if fires else None])
            alone = model.generate(**left_padded(prompts), **GREEDY, **options)[:, -NEW:]
        with austeer.steer(model, plan, ALPHA, scope="generation", when=probes["layer"]):
            assert torch.equal(model.generate(**left_padded(prompts), **GREEDY, **options)[:, -NEW:], alone)
    with austeer.steer(model, {"a": plan}, ALPHA, scope="generation") as steering:
        steering.rows(["a" if fires else None for fires in fired])
        expected = model.generate(**left_padded(PROMPTS), **GREEDY, **options)
    with austeer.steer(model, plan, ALPHA, scope="generation", when=probes["layer"]):
        assert torch.equal(model.generate(**left_padded(PROMPTS), **GREEDY, **options), expected)


def test_drafted_tokens_before_the_prompt_has_run_are_refused(model, plan, probes):
    prompt = left_padded([[5, 6, 7, 5, 6, 7, 5, 6]])
    with (
        pytest.warns(SteeringWarning),
        austeer.steer(model, plan, scope="generation", when=probes["layer"]),
        pytest.raises(austeer.SteeringError, match=r"when.*together.*prompt lookup"),
    ):
        model.generate(**prompt, **GREEDY, prompt_lookup_num_tokens=2)


def test_plans_of_rows_and_the_scope_of_an_answer(model, plan, probes):
    """All three have to agree: the row has a plan, the probe fires, and the token is in the answer."""
    other = random_plan(model, ("neuron",), 20, "scale", seed=3)
    batch, script = left_padded(PROMPTS), [[9, 9, 3, 9, 9, 4, 9, 9]] * len(PROMPTS)  # a begins, b pauses
    fired = [score_of(model, probes["layer"], prompt) > probes["layer"].threshold for prompt in PROMPTS]
    rows = ["x", "y", "x", "y", None]
    assert {row for row, fires in zip(rows, fired) if fires} >= {"x", "y"}
    where = torch.zeros(len(PROMPTS), batch["input_ids"].shape[1] + 8, dtype=torch.bool)
    where[:, -6:-3] = True
    whole = {
        "input_ids": torch.cat([batch["input_ids"], torch.tensor(script)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(len(PROMPTS), 8, dtype=torch.int64)], 1),
    }
    steering = austeer.steer(
        model, {"x": plan, "y": other}, ALPHA, scope=answer_of(["a"], [("b", "cc")]), when=probes["layer"]
    )
    with steering, steering.rows(rows):
        found = scripted_logits(model, batch, script)
    for number, (row, fires) in enumerate(zip(rows, fired)):
        one = where[number : number + 1] & (fires and row is not None)
        with formula_at(model, other if row == "y" else plan, ALPHA, one):
            alone = logits(model, {name: value[number : number + 1] for name, value in whole.items()})
        torch.testing.assert_close(found[number], alone[0, -9:-1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_direct_calls(model, plan, probes, side):
    """A prompt whole or in pieces, padded on either side, then tokens one by one."""
    probe = probes["layer"]
    batch = left_padded(PROMPTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if side == "right":
        order = torch.argsort(mask, dim=1, descending=True, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    prompt = ids.shape[1]
    more = torch.tensor([[9, 23, 24]] * len(PROMPTS))
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    fired = torch.tensor([score_of(model, probe, p) > probe.threshold for p in PROMPTS])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    where = (torch.arange(ids.shape[1]) >= prompt)[None] & fired[:, None]
    with formula_at(model, plan, ALPHA, where):
        expected = logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    for cuts, length in (((prompt, 1, 1, 1), None), ((4, prompt - 4, 1, 2), prompt), ((3, 3, prompt - 6, 3), prompt)):
        with torch.no_grad(), austeer.steer(model, plan, ALPHA, scope="generation", when=probe) as steering:
            steering.prompt_length = length
            got, cache, at = [], None, 0
            for cut in cuts:
                out = model(
                    input_ids=ids[:, at : at + cut],
                    attention_mask=mask[:, : at + cut],
                    position_ids=positions[:, at : at + cut],
                    past_key_values=cache,
                    use_cache=True,
                )
                got.append(out.logits)
                cache, at = out.past_key_values, at + cut
            when = steering.report().when
        assert (when.decided, when.fired) == (len(PROMPTS), int(fired.sum()))
        torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ["dynamic cache", "static cache"])
def test_compiled(model, plan, probes, form):
    other = copy.deepcopy(model)
    expected, _ = by_definition(model, plan, probes["layer"], PROMPTS)
    with austeer.steer(other, plan, ALPHA, scope="generation", when=probes["layer"]) as steering:
        torch._dynamo.reset()
        other.compile(backend="aot_eager")
        found = other.generate(**left_padded(PROMPTS), **GREEDY, **FORMS[form])
        assert steering.report().when.decided == len(PROMPTS)
    assert torch.equal(found[:, -NEW:], expected)


def test_a_generate_inside_another_has_its_own_decisions(model, plan, probes):
    texts = [[9] * NEW] * len(PROMPTS)
    batch = left_padded(PROMPTS)

    def ask(ids, scores):
        model.generate(**left_padded(PROMPTS[::-1]), max_new_tokens=3, do_sample=False)
        return scores

    with austeer.steer(model, plan, ALPHA, scope="generation", when=probes["layer"]):
        expected = scripted_logits(model, batch, texts)
        found = model.generate(
            **batch,
            max_new_tokens=NEW,
            do_sample=False,
            logits_processor=[ask, Script(texts, batch["input_ids"].shape[1])],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(torch.stack(found.logits, 1), expected)


def test_a_probe_that_never_fires_is_no_fault(model, plan, probes, recwarn):
    with austeer.steer(
        model, plan, ALPHA, scope="generation", when=replace(probes["layer"], threshold=1e9)
    ) as steering:
        model.generate(**left_padded(PROMPTS), **GREEDY)
        assert steering.report().when.fired == 0 and {row.tokens for row in steering.report()} == {0}
    assert not [warning for warning in recwarn if issubclass(warning.category, SteeringWarning)]


@pytest.mark.parametrize("scope", ["all", "prompt", "from_last_prompt_token", "last_prompt_token", (0, 4)], ids=str)
def test_scopes_that_steer_the_prompt_are_refused(model, plan, probes, scope):
    with pytest.raises(austeer.SteeringError, match=r"when.*scope.*generation"):
        austeer.steer(model, plan, ALPHA, scope=scope, when=probes["layer"])


def test_what_cannot_be_judged_is_refused(model, plan, probes):
    probe, batch = probes["layer"], left_padded(PROMPTS)
    with pytest.raises(austeer.SteeringError, match=r"when.*0.5"):
        austeer.steer(model, plan, ALPHA, scope="generation", when=0.5)
    with pytest.raises(austeer.PlanError, match=r"when.*'layer': 16.*'layer': 32"):
        small = replace(probe, direction=torch.ones(16), model=replace(probe.model, widths={"layer": 16}))
        austeer.steer(model, plan, ALPHA, scope="generation", when=small)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    one = {"input_ids": torch.full((len(PROMPTS), 1), 7), "past_key_values": cache}
    with pytest.warns(SteeringWarning), austeer.steer(model, plan, ALPHA, scope="generation", when=probe) as steering:
        with pytest.raises(austeer.SteeringError, match=f"when.*batch of {len(PROMPTS)} rows"):
            model(**one)
        steering.prompt_length = 4
        with pytest.raises(austeer.SteeringError, match=r"when.*together"):
            model(**batch)
    assert model(**batch).logits.isfinite().all() and "forward" not in vars(model.model.layers[1])


def run(model, prompts, cache=None):
    """A direct call: a batch of prompts, or one token a row that goes on from a cache."""
    with torch.no_grad():
        out = model(**(left_padded(prompts) if cache is None else {"input_ids": prompts}), past_key_values=cache)
    return out.past_key_values


@pytest.mark.parametrize("static", [False, True])
def test_a_decision_ends_with_its_generate(model, plan, probes, static):
    cache = StaticCache(config=model.config, max_cache_len=40) if static else None
    with torch.no_grad():
        cache = model(**left_padded(PROMPTS), past_key_values=cache, use_cache=True).past_key_values
    with austeer.steer(model, plan, ALPHA, scope="generation", when=probes["layer"]) as steering:
        model.generate(**left_padded(PROMPTS), **GREEDY)
        with pytest.raises(austeer.SteeringError, match=r"when.*no probe has judged"):
            run(model, torch.full((len(PROMPTS), 1), 7), cache)
        assert len(steering.report().when.scores) == len(PROMPTS), "what was decided is reported all the same"


def test_a_conversation_that_another_one_came_between_is_refused(model, plan, probes):
    token = torch.full((2, 1), 7)
    with austeer.steer(model, plan, ALPHA, scope="generation", when=probes["layer"]):
        first = run(model, PROMPTS[1:3])
        second = run(model, PROMPTS[3:])
        with pytest.raises(austeer.SteeringError, match=r"when.*cache of 9 columns, after 4 "):
            run(model, token, first)
        run(model, token, run(model, token, second))
        with pytest.raises(austeer.SteeringError, match=r"when.*cache of 9 columns, after 6 "):
            run(model, token, first)


def test_a_model_that_changes_before_the_block(model, plan, probes):
    """The probe reads the module that is there when the block begins."""
    probe, other = probes["layer"], copy.deepcopy(model)
    steering = austeer.steer(other, plan, ALPHA, scope="generation", when=probe)
    other.model.layers[probe.layer] = copy.deepcopy(other.model.layers[probe.layer])
    expected, fired = by_definition(model, plan, probe, PROMPTS)
    with steering:
        assert torch.equal(other.generate(**left_padded(PROMPTS), **GREEDY)[:, -NEW:], expected)
        assert steering.report().when.fired == sum(fired)


def test_a_prompt_that_does_not_come_by_the_probe_is_refused(model, probes):
    probe, other = probes["layer"], copy.deepcopy(model)
    plan = random_plan(other, ("ffn",), 4, "shift")
    fresh = copy.deepcopy(other.model.layers[probe.layer])
    with (
        pytest.warns(SteeringWarning),
        austeer.steer(other, plan, ALPHA, scope="generation", when=probe),
    ):
        other.model.layers[probe.layer] = fresh
        with pytest.raises(austeer.SteeringError, match=rf"when.*'layer' of layer {probe.layer} .*not judged"):
            other.generate(**left_padded(PROMPTS), **GREEDY)


def test_a_probed_layer_that_cannot_be_restored_leaves_no_other_steered(model, probes):
    probe, other = probes["layer"], copy.deepcopy(model)
    plan, layer = random_plan(other, ("ffn",), 4, "shift"), other.model.layers[probe.layer]
    before = logits(other, left_padded(PROMPTS))
    with (
        pytest.raises(austeer.SteeringError, match="another forward"),
        austeer.steer(other, plan, ALPHA, scope="generation", when=probe),
    ):
        inner = layer.forward
        layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert "forward" not in vars(other.model) and not austeer.is_steered(other)
    assert torch.equal(logits(other, left_padded(PROMPTS)), before)


def test_rows_without_a_plan_are_judged_too(model, plan, probes):
    with austeer.steer(
        model, {"a": plan}, ALPHA, scope="generation", when=replace(probes["layer"], threshold=-1e9)
    ) as s:
        with s.rows(["a", None]):
            model.generate(**left_padded(PROMPTS[:2]), **GREEDY)
        assert (s.report().when.decided, s.report().when.fired) == (2, 2)
