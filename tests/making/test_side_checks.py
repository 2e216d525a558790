"""Artefacts that tokens show: lengths, last tokens, answer words, the boundary, the context."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from austeer.forward.tokens import encode
from austeer.making.side_checks import (
    Sides,
    check_answer_words,
    check_beginning,
    check_boundary,
    check_last_token,
    check_length,
    check_truncation,
)
from austeer.pairs.pair import Pair

PEOPLE = ("man", "woman", "child", "dog", "cat", "king", "nurse", "boy")
VERBS = ("left", "came", "slept", "sang", "stood", "fell", "ate", "won")
PROMPTS = [f"After the {a} {b}, it was" for a in PEOPLE for b in VERBS]
GOOD = ("good", "great", "fine", "lovely", "nice", "happy", "bright", "calm")
BAD = ("bad", "poor", "wrong", "ugly", "sad", "angry", "dark", "cold")


@pytest.fixture(scope="module")
def sides(demo):
    def build(positive, negative, prompts=PROMPTS):
        pairs = [Pair(prompt, positive(i), negative(i)) for i, prompt in enumerate(prompts)]
        return Sides.of(demo[1], pairs, True)

    return build


def one_word(words):
    return lambda i: f" {words[(i + i // 8) % len(words)]}"


def test_sides_of_one_word_are_the_contrast_itself(demo, sides):
    found = sides(one_word(GOOD), one_word(BAD))
    assert found.short and set(found.differences) == {0}
    last = check_last_token(demo[1], found)
    assert last.level == "note" and last.numbers["told"] > 0.95 and "' good'" in last.verdict
    assert check_length(found).level == check_answer_words(found).level == check_boundary(found).level == "ok"


def test_long_sides_that_end_unlike_are_an_artefact(demo, sides):
    found = sides(lambda i: f" quite a {GOOD[i % 8]} day for all.", lambda i: f" quite a {BAD[i % 8]} day for all")
    last = check_last_token(demo[1], found)
    assert last.level == "grave" and last.numbers["told"] == 1 and last.numbers["same"] == 0
    assert last.numbers["most_frequent"] == {"positive": [(".", 64)], "negative": [(" all", 64)]}
    alike = sides(lambda i: f" quite a {GOOD[i % 8]} day for all.", lambda i: f" quite a {BAD[i % 8]} day for all.")
    last = check_last_token(demo[1], alike)
    assert last.level == "ok" and last.numbers["same"] == 64 and last.numbers["told"] == 0.5


def test_lengths(sides):
    plain = sides(one_word(GOOD), lambda i: f" not at all{one_word(BAD)(i)}" if i < 56 else one_word(BAD)(i))
    found = check_length(plain)
    assert found.level == "grave" and found.numbers["negative_longer"] == 56 and found.numbers["equal"] == 8
    assert found.numbers["mean_difference"] == pytest.approx(-3 * 56 / 64)
    assert "94 %" in found.verdict
    both = sides(
        lambda i: (" not at all" if i % 2 else "") + one_word(GOOD)(i),
        lambda i: ("" if i % 2 else " not at all") + one_word(BAD)(i),
    )
    assert check_length(both).level == "ok" and check_length(both).numbers["p"] == 1


@pytest.mark.parametrize("right, level", [(32, "ok"), (42, "warning"), (60, "grave")])
def test_answer_words(demo, sides, right, level):
    found = sides(
        lambda i: " yes" if i * 13 % 64 < right else " no", lambda i: " no" if i * 13 % 64 < right else " yes"
    )
    words = check_answer_words(found)
    assert words.level == level
    table = {entry["word"]: (entry["positive"], entry["negative"]) for entry in words.numbers["words"]}
    assert table == {"yes": (right, 64 - right), "no": (64 - right, right)}
    assert ("--balance" in words.remedy) == (level != "ok")


def test_a_rare_first_word_is_no_answer_word(sides):
    found = check_answer_words(
        sides(lambda i: f" w{i}x so it goes on and on", lambda i: f" v{i}y so it goes on and on")
    )
    assert found.level == "ok" and found.numbers["words"] == [] and "no word begins" in found.verdict
    words = [w.title() for w in GOOD]
    many = check_answer_words(
        sides(lambda i: f" {words[i % 8]}. So it goes on", lambda i: f" {BAD[i % 8]} as it goes on")
    )
    assert many.level == "note" and many.numbers["told"] == 1, "content may be meant so; each word is in 1 of 8"


def test_the_boundary(demo, sides):
    torn = sides(lambda i: "ful news", lambda i: "less news", [p.replace("it was", "use") for p in PROMPTS])
    prompts, ids = torn.prompts[0], torn.positive[0]
    assert ids[: len(prompts)] != prompts, "useful is one token"
    found = check_boundary(torn)
    assert found.level == "warning" and found.numbers == {"joined": 128, "texts": 128}
    blank = sides(lambda i: "good news", lambda i: "bad news", [f"{p} " for p in PROMPTS])
    assert check_boundary(blank).level == "warning"


def test_texts_that_already_begin_as_the_tokenizer_begins_them(demo):
    tokenizer = copy.deepcopy(demo[1])
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    pairs = [Pair(f"{bos}user: hi", " good", " bad"), Pair("user: hi", " good", " bad")]
    found = check_beginning(tokenizer, Sides.of(tokenizer, pairs, True), True)
    assert found.level == "note" and found.numbers["begun"] == 1
    for plain, special in ((demo[1], True), (tokenizer, False)):
        assert check_beginning(plain, Sides.of(plain, pairs, special), special).level == "ok"


def test_texts_that_are_cut(sides):
    found = sides(one_word(GOOD), lambda i: " not at all" * 5 + one_word(BAD)(i))
    assert check_truncation(found, None).level == "ok"
    longest = max(map(len, found.negative))
    assert check_truncation(found, longest).numbers["cut"] == 0
    cut = check_truncation(found, 15)
    assert cut.level == "warning" and cut.numbers == {"limit": 15, "cut": 64, "longest": longest}


def test_pairs_with_equal_tokens_are_left_out(demo):
    pairs = [Pair("a", " b", " b"), Pair("a", " c", " d")]
    found = Sides.of(demo[1], pairs, True)
    assert found.pairs == [pairs[1]] and len(found) == 1
    assert found.prompts == encode(demo[1], ["a"]) and found.positive == encode(demo[1], ["a c"])
