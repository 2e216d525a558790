"""The scope of an answer on a running model: the tokens that the definition names, however the model is called."""

import copy
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

import austeer
from austeer.errors import SteeringWarning
from austeer.steering.markers import Automaton
from dense_formula import formula_at, logits, random_plan
from letter_answers import answer_of, letters_in_answer, tokens_of
from scripted import Script, logits_by_formula, scripted_logits
from tiny_models import left_padded

MARKERS = {"start": ["ab"], "pauses": [("cc", "d"), ("e", "ba")], "turn": ["fg"]}
PROMPTS = ["xxfgx", "xabccfgxab", "xxabxe"]
TEXTS = ["abxxccxxxdxxexxbaxxx", "xxxccxabxdxxeexbabxx", "xxabaxfgxxabcxccccdx"]


def where_of(prompts, texts, markers=None):
    """bool [batch, columns] of a left-padded batch: the tokens in the answer behind each prompt."""
    markers = MARKERS if markers is None else markers
    longest = max(map(len, prompts))
    rows = []
    for prompt, text in zip(prompts, texts):
        inside = letters_in_answer(prompt + text, **markers)[len(prompt) :]
        rows.append([False] * longest + inside)
    return torch.tensor(rows)


def batch_of(prompts):
    return left_padded([list(tokens_of(prompt)) for prompt in prompts])


@pytest.fixture(scope="module")
def plan(one_lively):
    return random_plan(one_lively, ("ffn", "attention"), 20, "push")


FORMS = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("form", FORMS)
def test_generated_tokens_of_the_answer(one_lively, plan, form, mode):
    batch, texts = batch_of(PROMPTS), [tokens_of(text) for text in TEXTS]
    where = where_of(PROMPTS, TEXTS)
    assert all(0 < int(row.sum()) < len(TEXTS[0]) for row in where)
    expected = logits_by_formula(one_lively, batch, texts, plan, 2.0, where)
    with austeer.steer(one_lively, plan, 2.0, scope=answer_of(**MARKERS), mode=mode) as steering:
        found = scripted_logits(one_lively, batch, texts, **FORMS[form])
        again = scripted_logits(one_lively, batch, texts, **FORMS[form])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, again)
    unsteered = scripted_logits(one_lively, batch, texts, **FORMS[form])
    assert (found - unsteered).abs().amax() > 0.1
    if form == "dynamic cache":  # the last token is chosen, and never run
        assert {row.tokens for row in steering.report()} == {2 * int(where[:, :-1].sum())}


def test_a_shift_that_biases_hold_under_other_scopes(one_lively):
    plan = random_plan(one_lively, ("ffn", "layer"), 20, "shift")
    batch, texts = batch_of(PROMPTS), [tokens_of(text) for text in TEXTS]
    expected = logits_by_formula(one_lively, batch, texts, plan, 2.0, where_of(PROMPTS, TEXTS))
    with austeer.steer(one_lively, plan, 2.0, scope=answer_of(**MARKERS)) as steering:
        torch.testing.assert_close(scripted_logits(one_lively, batch, texts), expected)
    assert {row.path for row in steering.report()} == {"columns"}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("abcdefgx", min_size=1, max_size=9), st.text("abcdefg", min_size=8, max_size=8)),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from([{}, {"use_cache": False}]),
)
def test_any_text(one_lively, plan, rows, form):
    prompts, texts = zip(*rows)
    batch, tokens = batch_of(prompts), [tokens_of(text) for text in texts]
    expected = logits_by_formula(one_lively, batch, tokens, plan, 2.0, where_of(prompts, texts))
    steering = austeer.steer(one_lively, plan, 2.0, scope=answer_of(**MARKERS))
    steering.attach()
    try:
        found = scripted_logits(one_lively, batch, tokens, **form)
    finally:
        steering.detach()
    torch.testing.assert_close(found, expected)


class Pass:
    """The tokens that are steered in the pass at hand, of whole texts."""

    def __init__(self, scope, prompt):
        self.automaton, self.prompt, self.where = Automaton(scope), prompt, torch.empty(0)

    def __call__(self, module, args, kwargs):
        rows = [row[row != 0].tolist() for row in kwargs["input_ids"]]  # 0 pads
        columns = kwargs["input_ids"].shape[1]
        inside = [[False] * (columns - len(row)) + self.automaton.read(row) for row in rows]
        self.where = torch.tensor(inside) & (torch.arange(columns) >= self.prompt)

    def reshape(self, *shape):
        return self.where.reshape(*shape)


@contextmanager
def by_definition(model, plan, alpha, scope, prompt):
    """Steers whole texts, which are run anew for each token, at the tokens that the markers leave."""
    where = Pass(scope, prompt)
    handle = model.model.register_forward_pre_hook(where, with_kwargs=True)
    try:
        with formula_at(model, plan, alpha, where):
            yield
    finally:
        handle.remove()


SEARCHES = {
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling beams": {"num_beams": 2, "do_sample": True},
    "several samples": {"num_return_sequences": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("form", SEARCHES)
def test_rows_that_change_places_and_drafted_tokens(one_lively, form):
    """With markers among what the model writes by itself: beams that have read them change places."""
    plan = random_plan(one_lively, ("ffn", "attention"), 30, "push")
    prompts = ["abcdefabcdef"] if form == "prompt lookup" else ["xyz", "abcdefg", "hi"]
    batch = batch_of(prompts)
    new = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False} | SEARCHES[form]

    def run(**options):
        torch.manual_seed(3)
        return one_lively.generate(**batch, **(new | options))

    plain = run()
    length = batch["input_ids"].shape[1]
    written = plain[:, length:].flatten().unique().tolist()
    scope = austeer.Answer(start=tuple((t,) for t in written[::3]), turn=tuple((t,) for t in written[1::3]))
    whole = {"use_cache": False, "prompt_lookup_num_tokens": None}
    for alpha in (0.3, 3.0):
        with austeer.steer(one_lively, plan, alpha, scope=scope) as steering:
            found = run()
            assert torch.equal(run(**whole), found)
        with by_definition(one_lively, plan, alpha, scope, length):
            assert torch.equal(run(**whole), found)
        assert {row.tokens > 0 for row in steering.report()} == {True}
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_direct_calls(one_lively, plan, cache):
    """The state moves on by what each call is given; a text begins with an empty cache."""
    batch, texts = batch_of(PROMPTS), [tokens_of(text) for text in TEXTS]
    prompt = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], torch.tensor(texts)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, len(texts[0]), dtype=torch.int64)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with formula_at(one_lively, plan, 2.0, where_of(PROMPTS, TEXTS)):
        expected = logits(one_lively, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    cuts = {None: [prompt] + [1] * 20, prompt: [4, prompt - 1, 1, 5, 1, 1, 3, 6]}
    with torch.no_grad(), austeer.steer(one_lively, plan, 2.0, scope=answer_of(**MARKERS)) as steering:
        for length, sizes in cuts.items():
            steering.prompt_length = length
            memory = StaticCache(config=one_lively.config, max_cache_len=40) if cache == "static" else None
            got, at = [], 0
            for size in sizes:
                part = slice(at, min(at + size, ids.shape[1]))
                out = one_lively(
                    input_ids=ids[:, part],
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                    past_key_values=memory,
                    use_cache=True,
                )
                got.append(out.logits)
                memory, at = out.past_key_values, part.stop
            real = mask[:, :at].bool()
            torch.testing.assert_close(torch.cat(got, 1)[real], expected[:, :at][real])


@pytest.mark.parametrize("form", ["dynamic cache", "static cache"])
def test_compiled(one_lively, plan, form):
    torch._dynamo.reset()  # what other tests compiled counts against its limit
    batch, texts = batch_of(PROMPTS), [tokens_of(text) for text in TEXTS]
    expected = logits_by_formula(one_lively, batch, texts, plan, 2.0, where_of(PROMPTS, TEXTS))
    model = copy.deepcopy(one_lively)
    with austeer.steer(model, plan, 2.0, scope=answer_of(**MARKERS)) as steering:
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=form == "static cache")
        found = scripted_logits(model, batch, texts, **FORMS[form])
        assert {row.compiled for row in steering.report()} == {True}
        del model.forward
    torch.testing.assert_close(found, expected)


def test_a_plan_for_each_row(one_lively, plan):
    batch, texts = batch_of(PROMPTS), [tokens_of(text) for text in TEXTS]
    where = where_of(PROMPTS, TEXTS)
    where[1] = False
    expected = logits_by_formula(one_lively, batch, texts, plan, 2.0, where)
    steering = austeer.steer(one_lively, {"a": plan}, 2.0, scope=answer_of(**MARKERS))
    with steering, steering.rows(["a", None, "a"]):
        found = scripted_logits(one_lively, batch, texts)
    torch.testing.assert_close(found, expected)


def test_a_generate_inside_another_has_its_own_answer(one_lively, plan):
    batch, texts = batch_of(PROMPTS), [tokens_of(text) for text in TEXTS]
    one = batch_of(["xx"])

    def ask(ids, scores):
        one_lively.generate(**one, max_new_tokens=3, do_sample=False)
        return scores

    with austeer.steer(one_lively, plan, 2.0, scope=answer_of(**MARKERS)):
        expected = scripted_logits(one_lively, batch, texts)
        found = one_lively.generate(
            **batch,
            max_new_tokens=20,
            do_sample=False,
            logits_processor=[ask, Script(texts, batch["input_ids"].shape[1])],
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(torch.stack(found.logits, 1), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_markers_that_never_come(one_lively, plan, compiled):
    batch, model = batch_of(PROMPTS), copy.deepcopy(one_lively)
    scope = austeer.Answer(start=(tokens_of("zzzz"),), text="from 'zzzz' on")
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)
    with (
        pytest.warns(SteeringWarning, match=r"no token was steered.*answer, from 'zzzz' on"),
        austeer.steer(model, plan, 2.0, scope=scope),
    ):
        if compiled:
            torch._dynamo.reset()
            model.compile(backend="eager")
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)


def test_what_cannot_be_right_is_refused(one_lively, plan):
    batch = batch_of(PROMPTS)
    embeddings = one_lively.get_input_embeddings()(batch["input_ids"])
    scope = answer_of(**MARKERS)
    with torch.no_grad():
        filled = one_lively(**batch, use_cache=True).past_key_values
        static = StaticCache(config=one_lively.config, max_cache_len=40)
        one_lively(**batch, past_key_values=static)
    one, columns = {"input_ids": torch.full((3, 1), 7)}, batch["input_ids"].shape[1]
    mask = torch.ones(3, batch["input_ids"].shape[1] + 4, dtype=torch.int64)
    with pytest.warns(SteeringWarning), austeer.steer(one_lively, plan, 2.0, scope=scope):
        for call, named in (
            (lambda: one_lively.generate(inputs_embeds=embeddings), "inputs_embeds"),
            (lambda: one_lively(inputs_embeds=embeddings), "inputs_embeds"),
            (lambda: one_lively(**one, past_key_values=filled), f"cache of {columns} columns"),
            (lambda: one_lively(**one, past_key_values=static), f"cache of {columns} columns"),
            (lambda: one_lively.generate(batch["input_ids"], attention_mask=mask), f"a mask of {mask.shape[1]}"),
        ):
            with pytest.raises(austeer.SteeringError, match=f"answer.*{named}"):
                call()
    assert "prepare_inputs_for_generation" not in vars(one_lively)
    with pytest.raises(austeer.SteeringError, match=f"answer.*{10**7}.*vocabulary"):
        austeer.steer(one_lively, plan, 2.0, scope=austeer.Answer(start=((10**7,),)))
    with pytest.raises(austeer.SteeringError, match=r"scope.*'answer'.*answer_scope"):
        austeer.steer(one_lively, plan, 2.0, scope="answer")
