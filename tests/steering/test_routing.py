"""Scopes on a running model: equal to the formula at the same tokens, however the model is called."""

import copy
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from transformers import StaticCache

import austeer
from dense_formula import formula_at, greedy_by_recomputing, inside, logits, random_plan

NEW = 6
SCOPES = ["prompt", "generation", "last_prompt_token", "from_last_prompt_token", (0, 3), (2, None), (6, 11), (9, 10)]
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def model(lively):
    return lively


@pytest.fixture
def batch(padded):
    return padded


FEW_SCOPES = ("generation", (0, 3))


@pytest.mark.parametrize(
    ("mode", "scope"),
    [*(("auto", scope) for scope in SCOPES), *((mode, scope) for mode in ("fused", "dense") for scope in FEW_SCOPES)],
    ids=str,
)
def test_generation_equals_recomputation_without_a_cache(model, batch, scope, mode):
    plan = random_plan(model, ("ffn", "attention"), 20, "push")
    expected = greedy_by_recomputing(model, batch, plan, 3.0, scope, NEW)
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
            assert "some tokens" in steering.report()[0].reason


def test_what_generate_makes_of_pad_tokens_is_a_mask_too(model, batch):
    """Without a mask generate takes it from the pad tokens; ranges must count from each row's first token then too."""
    plan = random_plan(model, "ffn", 40, "push")
    for some in (batch, {name: value[1:2] for name, value in batch.items()}):
        expected = greedy_by_recomputing(model, some, plan, 3.0, (0, 3), NEW)
        with austeer.steer(model, plan, 3.0, scope=(0, 3)):
            for form in ({}, {"cache_implementation": "static"}):
                assert torch.equal(model.generate(some["input_ids"], **GREEDY, **form), expected)


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
@pytest.mark.parametrize("scope", ["last_prompt_token", "from_last_prompt_token", (1, 4)], ids=str)
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_no_mask_tells_is_refused(model, side):
    """The pad token stands in rows, and nothing says that it pads: a scope that counts from there would be off."""
    plan = random_plan(model, "ffn", 30, "push")
    pad, end = 0, 2
    model.config.pad_token_id, model.config.eos_token_id = pad, end
    ids = torch.randint(3, 999, (2, 5), generator=torch.Generator().manual_seed(2))
    ids[1, 0 if side == "left" else -1] = pad
    mask = (ids != pad).long()
    for scope in ("last_prompt_token", "from_last_prompt_token", (0, 2)):
        with austeer.steer(model, plan, 2.0, scope=scope):
            with pytest.raises(austeer.SteeringError, match=rf"attention_mask.*{pad}"):
                model(ids)
            model(ids, attention_mask=mask)
            model(ids.clamp(min=3))
    with austeer.steer(model, plan, 2.0, scope="prompt"):
        model(ids)
    # Where the end of a text pads, rows that all end so are whole texts; generate takes no mask from it either.
    model.config.pad_token_id = model.generation_config.pad_token_id = end
    model.generation_config.eos_token_id = end
    ids[1, 0], ids[:, -1] = 5, end
    with austeer.steer(model, plan, 2.0, scope="last_prompt_token"):
        model(ids)
        ids[0, -1] = 7
        for run in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
            with pytest.raises(austeer.SteeringError, match=rf"attention_mask.*{end}"):
                run(ids)


def test_a_mask_as_long_as_a_static_cache(model, batch):
    plan = random_plan(model, "ffn", 30, "push")
    ids = batch["input_ids"]
    results = []
    for columns in (9, 16):
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, columns - 9), value=1)
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad(), austeer.steer(model, plan, 2.0, scope="last_prompt_token"):
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            results.append(out.logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], logits(model, batch)[batch["attention_mask"].bool()])


def test_what_a_scope_cannot_tell_apart_is_refused(model, batch):
    plan = random_plan(model, "ffn", 10)
    ids = batch["input_ids"][:, :4]
    with pytest.warns(austeer.SteeringWarning), austeer.steer(model, plan, 1.0, scope=(0, 2)):
        with pytest.raises(austeer.SteeringError, match="position_ids"):
            model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]] * 3))
        with pytest.raises(austeer.SteeringError, match=r"attention mask.*Tensor"):
            model(input_ids=ids, attention_mask=torch.ones(3, 1, 4, 4, dtype=torch.bool))
    model.train()
    model.gradient_checkpointing_enable()
    with (
        pytest.raises(austeer.SteeringError, match=r"checkpointing.*scope"),
        austeer.steer(model, plan, 1.0, scope="prompt"),
    ):
        model(input_ids=ids)
    prompt = peft.get_peft_model(
        copy.deepcopy(model), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(austeer.SteeringError, match="virtual tokens"):
        austeer.steer(prompt, plan, 1.0, scope="prompt")
    austeer.steer(prompt, plan, 1.0)


def test_a_generate_inside_another_has_its_own_prompt(model, batch):
    plan = random_plan(model, "ffn", 40, "push")
    one, inner = {"input_ids": torch.tensor([[5, 6, 7]])}, []

    def ask(ids, scores):
        if not inner:
            inner.append(None)
            inner[0] = model.generate(**one, **GREEDY)
        return scores

    with austeer.steer(model, plan, 3.0, scope=(0, 2)):
        outer = model.generate(**batch, **GREEDY, logits_processor=[ask])
        assert torch.equal(inner[0], model.generate(**one, **GREEDY))
        assert torch.equal(outer, model.generate(**batch, **GREEDY))


def test_a_second_block_counts_anew(model, batch):
    steering = austeer.steer(model, random_plan(model, "ffn", 10), 1.0, scope="generation")
    with steering:
        model.generate(**batch, **GREEDY)
    with pytest.warns(austeer.SteeringWarning, match=r"no token.*generation"), steering:
        model(**batch)
    assert {row.tokens for row in steering.report()} == {0}


def test_a_pass_that_failed_does_not_lock_out_other_threads(model, batch):
    with austeer.steer(model, random_plan(model, "ffn", 10), 1.0, scope="prompt"):
        with pytest.raises(IndexError):
            model(input_ids=batch["input_ids"] + 10**6)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, **batch).result()
            assert pool.submit(model.generate, **batch, **GREEDY).result().shape == (3, 9 + NEW)
        with pytest.raises(IndexError):
            model(input_ids=batch["input_ids"] + 10**6)
        model.generate(**batch, **GREEDY)


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


def test_tokens_are_counted(model, batch):
    plan = random_plan(model, "ffn", 10)
    for scope, per_row in (
        ("prompt", 9),
        ("generation", NEW - 1),
        ("last_prompt_token", 1),
        ("from_last_prompt_token", NEW),
        ((0, 3), 3),
    ):
        with austeer.steer(model, plan, 1.0, scope=scope) as steering:
            model.generate(**batch, **GREEDY)
            assert {row.tokens for row in steering.report()} == {3 * per_row}
    with austeer.steer(model, {"a": plan}, 1.0) as steering, steering.rows(["a", None, "a"]):
        model.generate(**batch, **GREEDY)
        assert {row.tokens for row in steering.report()} == {2 * (9 + NEW - 1)}


def test_prompt_length_is_checked(model):
    with pytest.raises(austeer.SteeringError, match=r"prompt_length.*'all'"):
        austeer.steer(model, random_plan(model, "ffn", 10), 1.0).prompt_length = 3


def test_a_model_with_its_own_generate_gets_it_back(model):
    own = model.generate
    vars(model)["generate"] = own
    with pytest.warns(austeer.SteeringWarning), austeer.steer(model, random_plan(model, "ffn", 5), 1.0, scope="prompt"):
        assert vars(model)["generate"] is not own
    assert vars(model)["generate"] is own
