"""Continuations cut at the ends of words, and both sides to one number of tokens."""

from itertools import pairwise

import pytest

from austeer.forward.tokens import encode
from austeer.making.truncation import ends, even, whole_words


def test_a_text_may_be_cut_behind_words_and_marks():
    text = " Don't go, it's 3.5 km (or so)!"
    pieces = [text[start:end] for start, end in pairwise([0, *ends(text)])]
    assert pieces == [" Don't", " go", ",", " it's", " 3.5", " km", " (", "or", " so", ")", "!"]
    assert ends(" \n") == []


@pytest.mark.parametrize(
    "text, whole", [(" We sat dow", " We sat"), (" We sat.", " We sat."), (" sat. ", " sat."), ("dow", ""), ("", "")]
)
def test_a_last_word_that_broke_off_goes(text, whole):
    assert whole_words(text) == whole


@pytest.mark.parametrize("prompt", ["The film was", "<|im_start|>assistant\n"])
def test_both_sides_have_as_many_tokens_and_are_as_long_as_can_be(demo, prompt):
    tokenizer = demo[1]
    texts = [
        (prompt, " extraordinarily good, and the music was lovely", " bad"),
        (prompt, " bad.", " unbelievably tedious"),
        (prompt, " wonderful from the first scene to the last", " terrible from the first to the last scene of all"),
    ]

    def count(text):
        return len(encode(tokenizer, [text])[0])

    found = even(tokenizer, texts)
    for (_, *sides), cut in zip(texts, found):
        possible = [{count(prompt + side[:end]) for end in ends(side)} for side in sides]
        common = possible[0] & possible[1]
        if not common:
            assert cut is None
            continue
        assert {count(prompt + side) for side in cut} == {max(common)}
        assert all(side.startswith(own) and len(own) in ends(side) for side, own in zip(sides, cut))
    assert found[2] is not None and len(found[2][0].split()) >= 7


def test_sides_without_a_common_length_have_none(demo):
    tokenizer = demo[1]
    # One word of many tokens against one of one token.
    long = " Donaudampfschifffahrtsgesellschaft"
    assert len(encode(tokenizer, [long])[0]) > 3
    assert even(tokenizer, [("It is", long, " bad")]) == [None]
    assert even(tokenizer, [("It is", "", " bad")]) == [None]
