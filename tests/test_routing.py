"""Scopes and rows on a running model: equal to the formula at the same tokens, however the model is called."""

import contextlib
import copy

import peft
import pytest
import torch

import austeer
from austeer import paths
from dense_formula import assert_unchanged, formula_at, logits, random_plan, snapshot

NEW = 6
SCOPES = ["prompt", "generation", "last_prompt_token", (0, 3), (2, None), (6, 11), (9, 10)]
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def model(tiny):
    """The tiny model, made so that steering it changes what it writes and it never stops by itself."""
    tiny.generation_config.eos_token_id = None
    tiny.generation_config.pad_token_id = 0
    with torch.no_grad():
        for p in tiny.parameters():
            p *= 3
    return tiny


@pytest.fixture
def batch(model):
    """Three rows, of which the second has four and the third two tokens of padding on the left."""
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def inside(scope, mask, prompt):
    """bool [batch, columns]: the definition of a scope, token by token, from the mask of whole sequences."""
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    for row, real in enumerate(mask.bool()):
        columns = real.nonzero().flatten().tolist()
        for number, column in enumerate(columns):
            chosen[row, column] = {
                "all": True,
                "prompt": column < prompt,
                "generation": column >= prompt,
                "last_prompt_token": column == max(c for c in columns if c < prompt),
            }.get(scope, False)
            if isinstance(scope, tuple):
                chosen[row, column] = scope[0] <= number < (scope[1] or 10**6)
    return chosen


def greedy_by_recomputing(model, batch, plan, alpha, scope):
    """Greedy tokens from whole sequences run anew for each token, with the formula at the scope's tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt = ids.shape[1]
    for _ in range(NEW):
        with formula_at(model, plan, alpha, inside(scope, mask, prompt)):
            best = logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("mode", ["auto", "fused", "dense"])
def test_generation_equals_recomputation_without_a_cache(model, batch, scope, mode):
    plan = random_plan(model, ("ffn", "attention"), 20, "push")
    expected = greedy_by_recomputing(model, batch, plan, 3.0, scope)
    assert not torch.equal(expected, model.generate(**batch, **GREEDY))
    with austeer.steer(model, plan, 3.0, scope=scope, mode=mode) as steering:
        for form in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**batch, **GREEDY, **form), expected), form
        assert torch.equal(
            model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **GREEDY), expected
        )
        assert steering.prompt_length is None  # known only while generate runs
        if mode == "auto":
            assert {row.path for row in steering.report()} == {"columns"}
            assert "only some tokens are steered" in steering.report()[0].reason


def test_what_generate_makes_of_pad_tokens_is_a_mask_too(model, batch):
    """Without a mask generate takes it from the pad tokens; ranges must count from each row's first token then too."""
    plan = random_plan(model, "ffn", 40, "push")
    expected = greedy_by_recomputing(model, batch, plan, 3.0, (0, 3))
    with austeer.steer(model, plan, 3.0, scope=(0, 3)):
        assert torch.equal(model.generate(batch["input_ids"], **GREEDY), expected)


@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_direct_calls_with_a_cache(model, batch, scope):
    """Prefill and single tokens are told apart by themselves; a prompt in pieces needs its length."""
    plan = random_plan(model, ("ffn", "layer"), 20, "push")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    more = torch.randint(3, 999, (3, 3), generator=torch.Generator().manual_seed(2))
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    with formula_at(model, plan, 1.0, inside(scope, mask, 9)):
        expected = logits(model, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        for cuts, length in (((9, 1, 1, 1), None), ((4, 5, 1, 1, 1), 9), ((3, 6, 3), 9)):
            with austeer.steer(model, plan, 1.0, scope=scope) as steering:
                steering.prompt_length = length
                got, cache, at = [], None, 0
                for cut in cuts:
                    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, at : at + cut]
                    out = model(
                        input_ids=ids[:, at : at + cut],
                        attention_mask=mask[:, : at + cut],
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                    )
                    got.append(out.logits)
                    cache, at = out.past_key_values, at + cut
            real = mask.bool()
            torch.testing.assert_close(torch.cat(got, 1)[real], expected[real])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["last_prompt_token", (1, 4)], ids=str)
def test_padding_on_either_side_of_a_direct_call(model, batch, scope, side):
    plan = random_plan(model, "ffn", 30, "push")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with formula_at(model, plan, 2.0, inside(scope, mask, 9)):
        expected = logits(model, {"input_ids": ids, "attention_mask": mask})
    with austeer.steer(model, plan, 2.0, scope=scope):
        got = logits(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()])


def test_a_second_turn_goes_on_from_the_cache(model, batch):
    """generate with a filled cache: all that stands before the new text is prompt."""
    plan = random_plan(model, "ffn", 40, "push")
    with austeer.steer(model, plan, 3.0, scope="generation"):
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.full((3, 2), 7)], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW + 2, dtype=torch.int64)], 1)
        cached = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    # The first answer's tokens were generation when they entered the cache, and the question's are prompt.
    steered = inside("generation", mask, 9)
    steered[:, -3:] = False
    for _ in range(NEW):
        with formula_at(model, plan, 3.0, steered):
            best = logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
        steered = torch.cat([steered, torch.ones(3, 1, dtype=torch.bool)], 1)
    assert torch.equal(cached, ids)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plans(model):
    return {
        "kind": random_plan(model, ("ffn", "attention"), 20),
        "brief": random_plan(model, ("ffn", "layer"), 15, "push", seed=1),
        "calm": random_plan(model, "attention", 9, "shift", seed=2),
    }


ALPHA = {"kind": {"ffn": 3.0, "attention": -2.0}, "brief": 1.5, "calm": 2.0}


def one_by_one(model, batch, plans, rows, **options):
    """Each row run alone, with its own plan or none."""
    out = []
    for i, name in enumerate(rows):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        with austeer.steer(model, plans[name], ALPHA[name]) if name else contextlib.nullcontext():
            out.append(model.generate(**alone, **options))
    return torch.cat(out)


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("rows", [["kind", None, "brief"], ["calm", "brief", "calm"], [None, None, None]], ids=str)
@pytest.mark.parametrize("form", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
def test_a_mixed_batch_equals_its_rows_alone(model, batch, plans, rows, form, mode):
    options = GREEDY | form
    expected = one_by_one(model, batch, plans, rows, **options)
    with austeer.steer(model, plans, ALPHA, mode=mode) as steering, steering.rows(rows):
        assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("mode", ["auto", "fused", "columns", "dense"])
@pytest.mark.parametrize("site", ["attention", "ffn", "neuron"])
def test_logits_of_mixed_rows_are_those_of_the_formula(model, batch, site, mode):
    a, b = random_plan(model, site, 20), random_plan(model, site, 20, "shift", seed=3)
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


@pytest.mark.parametrize("operation", ["scale", "push", "shift"])
def test_the_sparse_and_the_dense_form_give_the_same(model, batch, operation, monkeypatch):
    """On a CPU columns takes whichever is cheaper; with rows, too, both must be right."""
    plans = {name: random_plan(model, ("ffn", "layer"), 20, operation, seed=i) for i, name in enumerate("ab")}
    plans["c"] = plans["a"].with_operation("shift")
    results = []
    for dense in (True, False):
        monkeypatch.setattr(paths, "dense_is_cheaper", lambda x, table, dense=dense: dense)
        with austeer.steer(model, plans, 0.5) as steering, steering.rows(["b", None, "c"]):
            results.append(logits(model, batch)[batch["attention_mask"].bool()])
    assert not torch.equal(results[0], logits(model, batch)[batch["attention_mask"].bool()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


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
    assert len({tuple(t.flatten().tolist()) for t in expected.values()}) == 3
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


def test_rows_of_the_wrong_number_or_name(model, batch, plans):
    before = snapshot(model)
    with austeer.steer(model, plans, ALPHA) as steering:
        for rows, message in (
            (["kind", "kinder", None], "rows: found 'kinder', expected one of 'kind', 'brief', 'calm', or None"),
            ("kinder", "rows: found 'kinder'"),
            ([1, 2, 3], "rows: found 1"),
            ([], r"rows: found \[\], expected a list"),
            (3, "rows: found 3, expected a list"),
        ):
            with pytest.raises(austeer.SteeringError, match=message):
                steering.rows(rows)
        with pytest.raises(austeer.SteeringError, match=r"no choice for the rows, expected steering\.rows"):
            model.generate(**batch, **GREEDY)
        steering.rows(["kind", None])
        with pytest.raises(austeer.SteeringError, match="rows: found 2 entries and a batch of 3"):
            model.generate(**batch, **GREEDY)
        with pytest.raises(austeer.SteeringError, match="rows: found 2 entries and a batch of 3"):
            model(**batch)
        with pytest.raises(austeer.SteeringError, match="rows: found 2 entries and a batch of 6"):
            model(input_ids=batch["input_ids"].repeat(2, 1))  # no expansion where nothing expands
        steering.rows(["kind", None, None])
        model(**batch)
    assert_unchanged(model, before)
    with austeer.steer(model, plans["kind"], 1.0, mode="columns") as steering:
        model(**batch)
        with pytest.raises(austeer.SteeringError, match=r'one plan for all rows.*steer\(model, \{"name": plan'):
            steering.rows(["kind", None, None])
    with austeer.steer(model, plans["kind"], 1.0, scope="prompt") as steering:
        model(**batch)
        with pytest.raises(austeer.SteeringError, match="one plan for all rows"):
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


@pytest.mark.parametrize("kind", ["rows", "scope"])
def test_compiled_whole_and_switched_without_recompiling(model, batch, plans, kind):
    torch._dynamo.reset()
    plans.pop("brief")  # of push; with scale it needs two launches, and the test wants one
    alpha = {name: ALPHA[name] for name in plans}
    arguments = {"plan": plans, "alpha": alpha} if kind == "rows" else {"plan": plans["kind"], "alpha": 2.0}
    steering = austeer.steer(model, **arguments, scope="all" if kind == "rows" else (2, 5))
    changes = [(["kind", None, "calm"], 1.0), ([None, "calm", "calm"], 3.0), (["calm", "kind", None], -1.0)]
    with steering:
        expected = []
        for rows, strength in changes:
            steering.alpha = strength
            if kind == "rows":
                steering.rows(rows)
            expected.append(logits(model, batch))
    assert not torch.equal(expected[0], expected[1])
    with steering, torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for (rows, strength), value in zip(changes, expected):
            steering.alpha = strength
            if kind == "rows":
                steering.rows(rows)
            got = compiled(**batch, use_cache=False).logits
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


# --- guards ---------------------------------------------------------------------------------------------------------


def test_a_scope_without_tokens_is_a_warning(model, batch):
    plan = random_plan(model, "ffn", 10)
    with (
        pytest.warns(austeer.SteeringWarning, match=r"no token was steered.*generation"),
        austeer.steer(model, plan, 1.0, scope="generation"),
    ):
        model(**batch)


def test_tokens_are_counted(model, batch):
    plan = random_plan(model, "ffn", 10)
    for scope, per_row in (("prompt", 9), ("generation", NEW - 1), ("last_prompt_token", 1), ((0, 3), 3)):
        with austeer.steer(model, plan, 1.0, scope=scope) as steering:
            model.generate(**batch, **GREEDY)
            assert {row.tokens for row in steering.report()} == {3 * per_row}
    with austeer.steer(model, {"a": plan}, 1.0) as steering, steering.rows(["a", None, "a"]):
        model.generate(**batch, **GREEDY)
        assert {row.tokens for row in steering.report()} == {2 * (9 + NEW - 1)}


def test_prompt_length_is_checked(model):
    plan = random_plan(model, "ffn", 10)
    steering = austeer.steer(model, plan, 1.0, scope="prompt")
    for wrong in (0, -1, 2.5, True, "9"):
        with pytest.raises(austeer.SteeringError, match="prompt_length: found"):
            steering.prompt_length = wrong
    with pytest.raises(austeer.SteeringError, match="prompt_length: found scope 'all'"):
        austeer.steer(model, plan, 1.0).prompt_length = 3


def test_a_model_with_its_own_generate_gets_it_back(model):
    own = model.generate
    vars(model)["generate"] = own
    with pytest.warns(austeer.SteeringWarning), austeer.steer(model, random_plan(model, "ffn", 5), 1.0, scope="prompt"):
        assert vars(model)["generate"] is not own
    assert vars(model)["generate"] is own
