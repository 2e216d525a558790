"""Token ids of texts and pairs: what a tokenizer adds of itself, cutting, and pairs without a difference."""

import copy
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from austeer import Pair, Pairs, PairsError
from austeer.forward.tokens import begun as begins
from austeer.forward.tokens import encode, length_limit, tokenise

EXPECTED = [
    Pair("The soup was", " good", " bad"),
    Pair("The bread was", " fresh", " stale"),
    Pair("Der Käse war", " köstlich 🧀", " übel"),
    Pair('He said, "it is', ' fine"\nand left', ' awful"'),
]


@pytest.fixture(scope="module")
def framing(demo):
    """The demo's tokenizer, but one that begins with bos and ends with eos by itself."""
    tokenizer = copy.deepcopy(demo[1])
    special = [(tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}", special_tokens=special
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return tokenizer


def test_sides_are_prompt_and_continuation_joined(demo):
    tokens = tokenise(demo[1], Pairs.of(EXPECTED), 512)
    assert [demo[1].decode(ids) for ids in tokens.positive] == [p.prompt + p.positive for p in EXPECTED]
    assert [demo[1].decode(ids) for ids in tokens.negative] == [p.prompt + p.negative for p in EXPECTED]
    assert tokens.cut == 0


def test_appended_eos_is_dropped_and_bos_kept(demo, framing):
    plain, framed = (tokenise(t, Pairs.of(EXPECTED), 512) for t in (demo[1], framing))
    bos = [demo[1].bos_token_id]
    assert framed.positive == [bos + ids for ids in plain.positive]
    assert framed.negative == [bos + ids for ids in plain.negative]


def test_a_text_that_begins_with_bos_gets_no_second_one(demo, framing):
    bos, eos = framing.bos_token, framing.eos_token
    plain, begun, twice, ended = encode(framing, ["soup", f"{bos}soup", f"{bos}{bos}soup", f"soup{eos}"])
    assert begun == plain and twice == [framing.bos_token_id, *plain]
    assert ended == [*plain, framing.eos_token_id], "the text's own end stays, the tokenizer's goes"
    assert encode(framing, [""]) == [[framing.bos_token_id]] and encode(demo[1], [""]) == [[]]
    assert begins(framing, ["soup", f"{bos}soup"]) == 1 and begins(demo[1], [f"{bos}soup"]) == 0


def test_eos_that_the_text_itself_ends_with_stays(demo):
    end = demo[1].eos_token
    tokens = tokenise(demo[1], Pairs.of([("a", f" b{end}", f" c{end}"), ("d", " e", " f")]), 512)
    assert [ids[-1] == demo[1].eos_token_id for ids in tokens.positive + tokens.negative] == [True, False, True, False]


def test_rendered_chat_gets_no_second_bos(demo, framing):
    rendered = Pairs.of(EXPECTED).with_chat_template(framing)
    for ids in tokenise(framing, rendered, 512, special=not rendered.chat_template).positive:
        assert ids[:2].count(framing.bos_token_id) == 1 and ids[-1] != framing.eos_token_id


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_long_texts_lose_their_beginning(demo, framing, max_length, words, with_bos):
    tokenizer = framing if with_bos else demo[1]
    pairs = Pairs.of([("one" + " two" * words, " good", " bad"), ("The soup was", " good", " bad")])
    whole, cut = tokenise(tokenizer, pairs, 10_000), tokenise(tokenizer, pairs, max_length)
    longer = 0
    for before, after in zip(whole.positive + whole.negative, cut.positive + cut.negative):
        if len(before) <= max_length:
            assert after == before
            continue
        longer += 1
        bos = [tokenizer.bos_token_id] if with_bos and max_length > 1 else []
        assert len(after) == max_length and after[: len(bos)] == bos
        assert after[len(bos) :] == before[len(before) - max_length + len(bos) :], "the end, with the answer, must stay"
    assert cut.cut == longer and whole.cut == 0


def test_pairs_equal_in_tokens_are_left_out_and_counted(demo):
    pairs = Pairs.of([("a", " b", " c"), ("d", " e", " e"), ("f", " g", " h")])
    tokens = tokenise(demo[1], pairs, 100)
    assert tokens.number == [0, 2] and len(tokens.positive) == len(tokens.negative) == 2


def test_pairs_that_a_cut_makes_equal_are_left_out(demo):
    pairs = Pairs.of([("x", " one end", " two end"), ("x", " one", " two")])
    tokens = tokenise(demo[1], pairs, 1)
    assert tokens.number == [1] and tokens.cut == 4


def test_a_text_without_a_token_is_named(demo):
    class Empty:
        eos_token_id = bos_token_id = None

        def __call__(self, texts, **options):
            return {"input_ids": [[1], [2], [], [3]]}

    pairs = Pairs.of([("a", " b", " c"), ("d", " e", " f")])
    with pytest.raises(PairsError, match=r"p\.jsonl.*pair 40.*'a c'"):
        tokenise(Empty(), pairs, 10, source="p.jsonl", first=40)


def test_a_limit_above_the_context_is_lowered_with_a_warning(tiny):
    context = tiny.config.max_position_embeddings
    with pytest.warns(UserWarning, match=rf"max_length: found {context + 5}.*{context} tokens"):
        assert length_limit(tiny, context + 5) == context
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert length_limit(tiny, context) == length_limit(tiny, None) == context


def test_a_limit_is_an_integer_of_python(tiny):
    assert type(length_limit(tiny, np.int64(20))) is int
    with pytest.raises(PairsError, match=r"max_length.*0.*at least 1"):
        length_limit(tiny, 0)
