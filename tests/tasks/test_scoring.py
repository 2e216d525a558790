"""Scores: equal to those of the full model, text by text, also where contexts are shared."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from austeer import Pairs, PairsError, steer
from austeer.demo.demo import load_data
from austeer.errors import TaskError
from austeer.models.sites import LAYOUTS
from austeer.tasks import Item, Task, side_effects
from austeer.tasks.scoring import OptionScores, cross_entropy, log_odds, option_scores
from dense_formula import formula_at, random_plan
from letter_tokens import Letters
from naive_scores import naive_log_odds
from tiny_models import tiny_model

SHARED = [
    ("The soup was", " good", " bad"),
    ("The soup was", " good and warm", " good but cold"),  # begins with the one above
    ("The soup was good and", " warm", " cold and thin and old"),
    ("It is", " fine", " awful, and nobody who was there would say otherwise"),
]
TEXTS = ["The river runs north of the old mill, where two roads meet.", "Tea", "A short one.", "Two boats left."]


def loss_of_model(model, tokenizer, texts):
    """The mean over all tokens of what the model itself calls its loss."""
    total = count = 0
    for text in texts:
        ids = torch.tensor(tokenizer([text])["input_ids"])
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


# --- on the real model -----------------------------------------------------------------------------------------------


def test_log_odds_on_a_real_model(demo):
    pairs = Pairs.of([*load_data().held_out[:1], *SHARED[1:3]])
    found = log_odds(*demo, pairs)
    assert found.shape == (3,) and found.dtype == torch.float64
    torch.testing.assert_close(found, naive_log_odds(*demo, pairs), rtol=1e-5, atol=1e-4)


def test_cross_entropy_on_a_real_model(demo):
    assert cross_entropy(*demo, TEXTS) == pytest.approx(loss_of_model(*demo, TEXTS), rel=1e-5)


# --- in every family -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYOUTS)
def test_scores_are_the_models_own_in_every_family(family):
    # Some families scale or cap their logits behind the head. Large weights make that matter.
    changes = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}.get(family, {})
    model, tokenizer = tiny_model(family, **changes), Letters()
    model.get_output_embeddings().weight.data *= 60
    assert cross_entropy(model, tokenizer, TEXTS) == pytest.approx(loss_of_model(model, tokenizer, TEXTS), rel=1e-5)
    pairs = Pairs.of(SHARED)
    expected = naive_log_odds(model, tokenizer, pairs)
    torch.testing.assert_close(log_odds(model, tokenizer, pairs), expected, rtol=1e-4, atol=1e-3)


# --- sharing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny_of):
    return tiny_of("llama").double()


words = st.sampled_from([" the", " soup", " was", " good", " bad", " and"])
phrases = st.lists(words, min_size=1, max_size=4).map("".join)


@contextmanager
def contexts_run(model):
    """The token ids of every row that the decoder runs, without padding."""
    run = []

    def note(module, args, inputs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool())
        run.extend(tuple(ids[real].tolist()) for ids, real in rows)

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    yield run
    handle.remove()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(phrases, phrases, phrases), min_size=2, max_size=6), st.integers(1, 60))
def test_shared_contexts_change_nothing(small, demo, rows, batch_tokens):
    """Few words and short texts, so many contexts begin another one, and are not run then."""
    pairs = Pairs.of([*rows, ("It", " is", " was")])
    with contexts_run(small) as run:
        found = log_odds(small, demo[1], pairs, batch_tokens=batch_tokens)
    texts = {p.prompt + side for p in pairs if p.positive != p.negative for side in (p.positive, p.negative)}
    contexts = {tuple(ids[:-1]) for ids in demo[1](list(texts))["input_ids"]}
    assert sorted(run) == sorted(a for a in contexts if not any(a == b[: len(a)] for b in contexts - {a}))
    # In float64, so rounding does not show.
    torch.testing.assert_close(found, naive_log_odds(small, demo[1], pairs), rtol=1e-9, atol=1e-9)


# --- many steerings at once ------------------------------------------------------------------------------------------


def with_options(rows):
    return Task(
        "t", "continuation", tuple(Item(prompt, tuple(options), i % 2) for i, (prompt, options) in enumerate(rows))
    )


#: Prompts of unlike length, options of one to six tokens, two or three of them, and contexts that begin another one.
OPTIONS = [
    ("The soup was", [" good", " good and warm", " bad, thin and cold"]),
    ("The soup was good and", [" warm", " cold and thin and old"]),
    ("It is, as all of us who were there would say,", [" fine", " awful", " a day"]),
    ("It was fin", ["ally done", "e"]),
]


@torch.no_grad()
def naive_options(model, tokenizer, task):
    """log p of each option, and whether each of its tokens is the likeliest, from one pass of the full model each.

    Options are scored from the first token that not all texts of the item share with the prompt.
    """
    log_prob = torch.full((len(task), 3), -torch.inf, dtype=torch.float64)
    greedy = torch.zeros(len(task), 3, dtype=torch.bool)
    for i, item in enumerate(task):
        prompt = tokenizer(item.prompt)["input_ids"]
        texts = [tokenizer(item.prompt + option)["input_ids"] for option in item.options]
        start = len(prompt)
        while any(ids[:start] != prompt[:start] for ids in texts):
            start -= 1
        for j, ids in enumerate(texts):
            scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            log_prob[i, j] = sum(scores[t - 1, ids[t]] for t in range(start, len(ids)))
            greedy[i, j] = all(int(scores[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))
    return log_prob, greedy


def steered_by(model, count=4):
    """Plans of every operation at two sites, and their strengths."""
    operations = ("scale", "push", "shift", "shift")
    plans = {
        f"plan {i}": random_plan(model, ("attention", "ffn"), 6 + i, operations[i % 4], seed=i) for i in range(count)
    }
    return plans, {name: 3.0 - 2 * i for i, name in enumerate(plans)}


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_options_under_many_steerings_are_those_of_the_full_model(small, demo, batch_tokens):
    task = with_options(OPTIONS)
    plans, alphas = steered_by(small)
    names = ["plan 2", None, "plan 0", "plan 1", "plan 3"]
    with steer(small, plans, alphas) as steering:
        found = option_scores(small, demo[1], task, steering, names, batch_tokens=batch_tokens)
    assert found.log_prob.shape == (5, 4, 3) and found.log_prob.dtype == torch.float64
    for name, log_prob, greedy in zip(names, found.log_prob, found.greedy):
        with nullcontext() if name is None else formula_at(small, plans[name], alphas[name]):
            expected = naive_options(small, demo[1], task)
        torch.testing.assert_close(log_prob, expected[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(greedy, expected[1])
    assert (found.log_prob[:, 0] - found.log_prob[1, 0]).abs().amax(-1)[[0, 2, 3, 4]].min() > 1e-3


def test_margins_are_against_the_best_other_option():
    log_prob = torch.tensor([[[-1.0, -2.0, -3.0], [-5.0, -4.5, -torch.inf]]], dtype=torch.float64)
    scores = OptionScores(log_prob, torch.tensor([[[True, False, False], [False, True, False]]]))
    task = Task("t", "choice", (Item("P", (" a", " b", " c"), 2), Item("Q", (" a", " b"), 1)))
    assert scores.margins(task).tolist() == [[-2.0, 0.5]]
    assert scores.correct(task).tolist() == [[False, True]]
    assert scores.exact(task).tolist() == [[False, True]]


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [1, 60, 2048])
def test_side_effects_are_those_of_the_full_model(small, demo, batch_tokens):
    plans, alphas = steered_by(small)
    names = ["plan 3", "plan 0", "plan 1"]
    with steer(small, plans, alphas) as steering:
        found = side_effects(small, demo[1], TEXTS, steering, names, batch_tokens=batch_tokens)
    ids = [i for i in (torch.tensor([demo[1](text)["input_ids"]]) for text in TEXTS) if i.shape[1] > 1]
    base = [small(i).logits[0, :-1].log_softmax(-1) for i in ids]
    assert found.tokens.tolist() == [len(b) for b in base]
    for name, kl, rise, (mean_kl, mean_rise) in zip(names, found.kl, found.rise, found.mean()):
        with formula_at(small, plans[name], alphas[name]):
            steered = [small(i).logits[0, :-1].log_softmax(-1) for i in ids]
        of_token = [(b.exp() * (b - s)).sum(-1) for b, s in zip(base, steered)]
        torch.testing.assert_close(kl, torch.stack([k.mean() for k in of_token]), rtol=1e-6, atol=1e-9)
        lost = [(b - s).gather(-1, i[0, 1:, None])[:, 0] for b, s, i in zip(base, steered, ids)]
        torch.testing.assert_close(rise, torch.stack([r.mean() for r in lost]), rtol=1e-6, atol=1e-6)
        assert mean_kl == pytest.approx(float(torch.cat(of_token).mean()), rel=1e-5)
        assert mean_rise == pytest.approx(float(torch.cat(lost).mean()), abs=1e-6)
        assert mean_kl > 1e-6


def test_tokens_of_every_pass_are_told(small, demo):
    told, ran = [], []
    handle = small.model.register_forward_hook(lambda m, args, output: ran.append(output[0].shape[:2].numel()))
    option_scores(small, demo[1], with_options(OPTIONS), batch_tokens=20, on_batch=told.append)
    handle.remove()
    assert told == ran and len(told) > 1


def test_numeric_task_has_no_options(small, demo):
    with pytest.raises(TaskError, match=r"t:.*numeric"):
        option_scores(small, demo[1], Task("t", "numeric", (Item("Q", answer=1.0),)))


# --- edges -----------------------------------------------------------------------------------------------------------


def test_equal_sides_have_no_odds(demo, small):
    pairs = Pairs.of([("The soup was", " good", " good"), *SHARED])
    assert float(log_odds(small, demo[1], pairs)[0]) == 0


def test_eos_appended_by_the_tokenizer_is_not_scored(demo, small):
    tokenizer = copy.deepcopy(demo[1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    pairs = Pairs.of(SHARED)
    assert torch.equal(log_odds(small, tokenizer, pairs), log_odds(small, demo[1], pairs))
    assert cross_entropy(small, tokenizer, TEXTS) == cross_entropy(small, demo[1], TEXTS)


def test_continuation_that_cannot_be_scored(demo, small):
    # "Tea" + "m" is one token: nothing comes before it that it could be scored after.
    assert len(demo[1]("Team")["input_ids"]) == 1
    with pytest.raises(TaskError, match=r"item 1.*no token"):
        log_odds(small, demo[1], Pairs.of([("It is", " fine", " bad"), ("Tea", "m", " is")]))


def test_an_empty_prompt_takes_a_tokenizer_that_begins_texts(demo, small):
    pairs = Pairs.of([("", " fine weather", " bad weather"), ("", " good", " poor")])
    with pytest.raises(TaskError, match=r"item 0.*prompt is empty"):
        log_odds(small, demo[1], pairs)
    tokenizer = copy.deepcopy(demo[1])
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    written = Pairs.of([(bos, pair.positive, pair.negative) for pair in pairs])
    assert torch.equal(log_odds(small, tokenizer, pairs), log_odds(small, demo[1], written))
    assert torch.equal(log_odds(small, tokenizer, written), log_odds(small, demo[1], written)), "no second one"


def test_rendered_chat_is_scored_without_more_special_tokens(demo, small):
    pairs = Pairs.of(SHARED).with_chat_template(demo[1])
    expected = naive_log_odds(small, demo[1], pairs)
    torch.testing.assert_close(log_odds(small, demo[1], pairs), expected, rtol=1e-9, atol=1e-9)


def test_short_and_empty_texts_count_for_nothing(demo, small):
    expected = cross_entropy(small, demo[1], TEXTS[::-1], batch_tokens=1)
    assert cross_entropy(small, demo[1], ["", *TEXTS, "a", ""]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("texts", [[], [""], ["a", "b"]])
def test_no_neutral_text(demo, small, texts):
    with pytest.raises(PairsError, match="neutral text"):
        cross_entropy(small, demo[1], texts)


def test_scoring_makes_no_cache_and_leaves_no_gradient(demo, small):
    outputs = []
    handle = small.model.register_forward_hook(lambda m, args, output: outputs.append(output))
    cross_entropy(small, demo[1], TEXTS)
    log_odds(small, demo[1], Pairs.of(SHARED))
    handle.remove()
    assert outputs and all(o.past_key_values is None and not o.last_hidden_state.requires_grad for o in outputs)
