"""Rows with plans of their own: a mixed batch equals its rows run one by one, and switching costs no compilation."""

import contextlib
import copy
import math

import peft
import pytest
import torch
from transformers import StaticCache

import austeer
from austeer.steering import columns, run_path
from dense_formula import OPERATIONS, assert_unchanged, formula_at, logits, random_plan, snapshot

NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def model(lively):
    return lively


@pytest.fixture
def batch(padded):
    return padded


@pytest.fixture
def plans(model):
    return {
        "kind": random_plan(model, ("ffn", "attention"), 20),
        "brief": random_plan(model, ("ffn", "layer"), 15, "push", seed=1),
        "frank": random_plan(model, ("ffn", "layer", "attention"), 25, "ablate", seed=3),
        "calm": random_plan(model, "attention", 9, "shift", seed=2),
    }


ALPHA = {"kind": {"ffn": 3.0, "attention": -2.0}, "brief": 1.5, "calm": 2.0, "frank": 1.0}


def one_by_one(model, batch, plans, rows, **options):
    """Each row run alone, with its own plan or none."""
    out = []
    for i, name in enumerate(rows):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        with austeer.steer(model, plans[name], ALPHA[name]) if name else contextlib.nullcontext():
            out.append(model.generate(**alone, **options))
    return torch.cat(out)


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize(
    ("rows", "form"),
    [
        (["kind", None, "brief"], {"num_beams": 3, "num_return_sequences": 2}),
        (["kind", None, "brief"], {"use_cache": False}),
        (["calm", "brief", "frank"], {}),
    ],
    ids=str,
)
def test_a_mixed_batch_equals_its_rows_alone(model, batch, plans, rows, form, mode):
    options = GREEDY | form
    expected = one_by_one(model, batch, plans, rows, **options)
    with austeer.steer(model, plans, ALPHA, mode=mode) as steering, steering.rows(rows):
        assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize(
    ("mode", "second"),
    [*((mode, "shift") for mode in ("auto", "fused", "columns", "dense")), ("columns", "ablate"), ("dense", "ablate")],
)
@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_logits_of_mixed_rows_are_those_of_the_formula(model, batch, site, mode, second):
    a, b = random_plan(model, site, 20), random_plan(model, site, 20, second, seed=3)
    rows, alpha = ["a", None, "b"], {"a": 2.0, "b": -1.0}
    expected = []
    for i, name in enumerate(rows):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        plan = {"a": a, "b": b}.get(name, a)
        with formula_at(model, plan, alpha.get(name, 0.0)):
            expected.append(logits(model, alone))
    with austeer.steer(model, {"a": a, "b": b}, alpha, mode=mode) as steering, steering.rows(rows):
        got = logits(model, batch)
        steering.k, steering.alpha = {"a": 20, "b": 1}, alpha
        steering.k = 20
        again = logits(model, batch)
        if mode == "fused":
            assert {row.path for row in steering.report()} == {"fused"}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], torch.cat(expected)[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(got, again)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_sparse_and_the_dense_form_give_the_same(model, batch, operation, monkeypatch):
    """A decoded token takes whichever is cheaper; both must be right."""
    plans = {name: random_plan(model, ("ffn", "layer"), 20, operation, seed=i) for i, name in enumerate("ab")}
    plans["c"] = plans["a"].with_operation("shift")
    token, results, took, kernel = {"input_ids": batch["input_ids"][:, -1:]}, [], [], columns.sparse
    monkeypatch.setattr(columns, "sparse", lambda *args: took.append(1) or kernel(*args))
    for most in (math.inf, 0):
        assert not took
        monkeypatch.setattr(columns, "most_elements", lambda *_, most=most: most)
        with austeer.steer(model, plans, 0.5) as steering, steering.rows(["b", None, "c"]):
            results += [logits(model, token), logits(model, token)]  # the general way and the short one
            steering.alpha = 0.2
            results.append(logits(model, token))
            steering.rows(["c", "b", "b"])
            results.append(logits(model, token))
    assert took and torch.equal(results[0], results[1])
    for dense, sparse in zip(results[:4], results[4:]):
        assert not torch.equal(dense, logits(model, token))
        torch.testing.assert_close(dense, sparse, rtol=1e-5, atol=1e-5)


def test_rows_and_a_scope_together(model, batch, plans):
    rows, scope = ["kind", None, "brief"], (1, 8)
    expected = []
    for i, name in enumerate(rows):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        with austeer.steer(model, plans[name], ALPHA[name], scope=scope) if name else contextlib.nullcontext():
            expected.append(model.generate(**alone, **GREEDY))
    with austeer.steer(model, plans, ALPHA, scope=scope) as steering, steering.rows(rows):
        assert torch.equal(model.generate(**batch, **GREEDY), torch.cat(expected))


def test_one_name_is_for_every_row_and_switching_is_live(model, batch, plans):
    before = model.generate(**batch, **GREEDY)
    expected = {name: one_by_one(model, batch, plans, [name] * 3, **GREEDY) for name in plans}
    assert len({tuple(t.flatten().tolist()) for t in expected.values()}) == len(plans)
    with austeer.steer(model, plans, ALPHA) as steering:
        for name in plans:
            steering.rows(name)
            assert torch.equal(model.generate(**batch, **GREEDY), expected[name])
        with steering.rows([None] * 3):
            assert torch.equal(model.generate(**batch, **GREEDY), before)
            with steering.rows(["kind", None, None]):
                assert torch.equal(model.generate(**batch, **GREEDY)[:1], expected["kind"][:1])
            assert torch.equal(model.generate(**batch, **GREEDY), before)
        assert torch.equal(model.generate(**batch, **GREEDY), expected["calm"])  # what was chosen before the block
    assert torch.equal(model.generate(**batch, **GREEDY), before)


def test_contexts_made_before_they_are_entered(model, batch, plans):
    with austeer.steer(model, plans, ALPHA) as steering:
        one, other = steering.rows("kind"), steering.rows("calm")
        results = []
        for context in (one, other):
            with context:
                results.append(logits(model, batch))
        for name, value in zip(("kind", "calm"), results):
            with steering.rows(name):
                assert torch.equal(logits(model, batch), value)
    assert not torch.equal(*results)


def test_rows_of_what_begins_from_nothing(model, plans):
    model.generation_config.bos_token_id = 1
    with austeer.steer(model, plans, ALPHA) as steering, steering.rows(["kind"]):
        out = model.generate(num_beams=2, num_return_sequences=2, **GREEDY)
    with austeer.steer(model, plans["kind"], ALPHA["kind"]):
        assert torch.equal(out, model.generate(num_beams=2, num_return_sequences=2, **GREEDY))


def test_rows_chosen_in_inference_mode_are_chosen_anew_anywhere(model, batch, plans):
    with austeer.steer(model, plans, ALPHA) as steering:
        with torch.inference_mode():
            steering.rows(["kind", None, "calm"])
            steering.rows([None, "calm", "kind"])
        steering.rows(["brief", None, None])
        with steering.rows([None, "kind", "brief"]):
            expected = logits(model, batch)
        with torch.inference_mode(), steering.rows([None, "kind", "brief"]):
            assert torch.equal(model(**batch).logits, expected)


def test_decoding_with_a_static_cache_takes_the_short_way_too(model, batch, plans, monkeypatch):
    ids, general, general_way = batch["input_ids"], [], run_path.RunPath.steer
    monkeypatch.setattr(run_path.RunPath, "steer", lambda path, x: general.append(x.shape) or general_way(path, x))
    with torch.no_grad(), austeer.steer(model, plans, ALPHA, mode="columns") as steering, steering.rows("kind"):
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(input_ids=ids, past_key_values=cache)
        for step in range(3):
            general.clear()
            model(input_ids=ids[:, :1], past_key_values=cache)
            assert bool(general) == (step == 0)


def test_rows_of_the_wrong_number_or_name(model, batch, plans):
    before = snapshot(model)
    with austeer.steer(model, plans, ALPHA) as steering:
        for rows, message in (
            (["kind", "kinder", None], "rows.*'kinder'.*'kind', 'brief', 'frank', 'calm'"),
            ("kinder", "rows.*'kinder'"),
            ([1, 2, 3], "rows.* 1"),
            ([], r"rows.*\[\]"),
            (3, "rows.* 3"),
        ):
            with pytest.raises(austeer.SteeringError, match=message):
                steering.rows(rows)
        with pytest.raises(austeer.SteeringError, match=r"no choice.*steering\.rows"):
            model.generate(**batch, **GREEDY)
        steering.rows(["kind", None])
        with pytest.raises(austeer.SteeringError, match=r"rows.*2.*3"):
            model.generate(**batch, **GREEDY)
        with pytest.raises(austeer.SteeringError, match=r"rows.*2.*3"):
            model(**batch)
        with pytest.raises(austeer.SteeringError, match=r"rows.*2.*6"):
            model(input_ids=batch["input_ids"].repeat(2, 1))  # no expansion where nothing expands
        steering.rows(["kind", None, None])
        model(**batch)
    assert_unchanged(model, before)
    with austeer.steer(model, plans["kind"], 1.0, mode="columns") as steering:
        model(**batch)
        with pytest.raises(austeer.SteeringError, match=r"one plan.*steer\("):
            steering.rows(["kind", None, None])
    with austeer.steer(model, plans["kind"], 1.0, scope="prompt") as steering:
        model(**batch)
        with pytest.raises(austeer.SteeringError, match="one plan"):
            steering.rows(["kind", None, None])


@pytest.mark.parametrize("wrapper", ["compile", "peft"])
def test_generate_is_watched_inside_wrappers(model, batch, plans, wrapper):
    rows = ["kind", None, "brief"]
    if wrapper == "peft":
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
        inner = wrapped.get_base_model()
    else:
        inner = copy.deepcopy(model)
        wrapped = torch.compile(inner, backend="eager")
    expected = one_by_one(model, batch, plans, rows, **GREEDY, num_beams=2, num_return_sequences=2)
    with austeer.steer(wrapped, plans, ALPHA) as steering, steering.rows(rows):
        got = wrapped.generate(**batch, **GREEDY, num_beams=2, num_return_sequences=2)
    assert torch.equal(got, expected)
    assert "generate" not in vars(inner) and not any(hasattr(m, "_hf_hook") for m in inner.modules())


def test_gradients_of_mixed_rows_are_those_of_the_rows_alone(model, batch, plans):
    plans = {name: plans[name] for name in ("kind", "calm")}
    alpha = {name: ALPHA[name] for name in plans}

    def gradient(run):
        model.zero_grad()
        run()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    def alone():
        for i, name in enumerate(("kind", "calm")):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            with austeer.steer(model, plans[name], alpha[name], mode="columns"):
                model(**one).logits[one["attention_mask"].bool()].square().sum().backward()

    def mixed():
        two = {key: value[:2] for key, value in batch.items()}
        with austeer.steer(model, plans, alpha) as steering, steering.rows(["kind", "calm"]):
            model(**two).logits[two["attention_mask"].bool()].square().sum().backward()

    torch.testing.assert_close(gradient(mixed), gradient(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scope", ["all", (10, 12)], ids=str)
def test_compiled_decoding_is_one_graph_for_all_steps_and_rows(model, batch, plans, scope):
    torch._dynamo.reset()
    plans.pop("brief")
    ids = batch["input_ids"][:2]

    def decode(run, steering):
        steering.alpha, steering.k = 1.0, 9
        cache = StaticCache(config=model.config, max_cache_len=32)
        out, written = model(input_ids=ids, past_key_values=cache, use_cache=True), []
        for step, rows in enumerate([["kind", None], ["calm", "kind"], [None, "calm"]] * 2):
            steering.alpha, steering.k = 1.0 + step / 2, 3 + step
            steering.rows(rows)
            written.append(out.logits[:, -1:].argmax(-1))
            positions = torch.full((2, 1), ids.shape[1] + step)
            out = run(input_ids=written[-1], past_key_values=cache, position_ids=positions, use_cache=True)
        return torch.cat(written, 1)

    steering = austeer.steer(model, plans, scope=scope)
    with torch.no_grad():
        with steering, steering.rows(["kind", "calm"]):
            expected = decode(model, steering)
        with steering, steering.rows(["kind", "calm"]), torch._dynamo.config.patch(error_on_recompile=True):
            assert torch.equal(decode(torch.compile(model, fullgraph=True, backend="aot_eager"), steering), expected)
            assert all(row.compiled for row in steering.report())
