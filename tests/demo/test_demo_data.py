"""The demo's own data: contrastive sentiment pairs and neutral paragraphs, in two splits that share nothing."""

import json
import re
from collections import Counter

import pytest

from places import ROOT

DATA = ROOT / "austeer" / "data"
SPLITS = ("selection", "heldout")
SIDES = ("positive", "negative")
FUNCTION_WORDS = {"a", "an", "the", "it", "part"}  # in continuations such as " loved it" and " best part"


def load(name):
    # Newlines only: str.splitlines would also break at rarer separators.
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").strip().split("\n")]


PAIRS = load("demo_pairs.jsonl")
NEUTRAL = load("neutral.jsonl")


def of_split(records, split):
    return [record for record in records if record["split"] == split]


def words(text):
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower())


def evaluative(split, side):
    return {word for pair in of_split(PAIRS, split) for word in words(pair[side])} - FUNCTION_WORDS


def evaluative_of(split):
    return evaluative(split, "positive") | evaluative(split, "negative")


def ngrams(split, n):
    found = set()
    for pair in of_split(PAIRS, split):
        tokens = words(pair["prompt"])
        found.update(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return found


def test_fields():
    for pair in PAIRS:
        assert set(pair) == {"prompt", "positive", "negative", "topic", "split"}, pair
        assert all(isinstance(value, str) and value for value in pair.values()), pair
        assert pair["split"] in SPLITS, pair
    for record in NEUTRAL:
        assert set(record) == {"text", "split"}, record
        assert record["split"] in SPLITS, record


@pytest.mark.parametrize("name", ["demo_pairs.jsonl", "neutral.jsonl"])
def test_plain_ascii_and_final_newline(name):
    raw = (DATA / name).read_bytes()
    assert raw.isascii()
    assert raw.endswith(b"\n") and not raw.endswith(b"\n\n")
    assert b"\r" not in raw


@pytest.mark.parametrize(("split", "least"), [("selection", 260), ("heldout", 80)])
def test_enough_pairs(split, least):
    assert len(of_split(PAIRS, split)) >= least


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("split", "least"), [("selection", 60), ("heldout", 25)])
def test_evaluative_words_vary(split, least, side):
    assert len(evaluative(split, side)) >= least
    uses = Counter(pair[side] for pair in of_split(PAIRS, split))
    assert max(uses.values()) <= 0.06 * len(of_split(PAIRS, split)), uses.most_common(3)


def test_prompts_and_continuations_join():
    for pair in PAIRS:
        prompt, positive, negative = pair["prompt"], pair["positive"], pair["negative"]
        assert prompt == prompt.strip() and "  " not in prompt and "\n" not in prompt, pair
        assert 5 <= len(words(prompt)) <= 20, pair
        assert prompt[-1].isalpha(), pair  # it stops inside a sentence
        assert positive != negative, pair
        for continuation in (positive, negative):
            assert re.fullmatch(r"( [a-z]+){1,3}", continuation), pair
            first = continuation.lstrip()[0]
            assert not (prompt.endswith(" a") and first in "aeiou"), pair
            assert not (prompt.endswith(" an") and first not in "aeiou"), pair
        # The same form on both sides, and a difference from the first word on.
        assert len(positive.split()) == len(negative.split()), pair
        assert positive.split()[0] != negative.split()[0], pair


def test_no_duplicates():
    for key in (lambda pair: words(pair["prompt"]), lambda pair: words(pair["prompt"])[:5]):
        seen = Counter(tuple(key(pair)) for pair in PAIRS)
        assert [k for k, count in seen.items() if count > 1] == []
    assert len({record["text"] for record in NEUTRAL}) == len(NEUTRAL)


def test_topics_are_disjoint():
    topics = {split: {pair["topic"] for pair in of_split(PAIRS, split)} for split in SPLITS}
    assert not topics["selection"] & topics["heldout"]
    assert len(topics["selection"]) >= 20 and len(topics["heldout"]) >= 10


def test_evaluative_words_are_disjoint():
    """Neither words nor, as far as five letters tell, word families are shared between the splits."""
    selection, heldout = evaluative_of("selection"), evaluative_of("heldout")
    assert not selection & heldout
    assert not {word[:5] for word in selection} & {word[:5] for word in heldout}


@pytest.mark.parametrize("split", SPLITS)
def test_no_word_is_on_both_sides(split):
    assert not evaluative(split, "positive") & evaluative(split, "negative")


def test_prompts_and_paragraphs_hold_no_evaluative_word():
    listed = evaluative_of("selection") | evaluative_of("heldout")
    for text in [pair["prompt"] for pair in PAIRS] + [record["text"] for record in NEUTRAL]:
        assert not listed & set(words(text)), text


def test_templates_are_disjoint():
    """No run of four words is shared, nor how a prompt opens or closes, nor the recurring frames."""
    assert not ngrams("selection", 4) & ngrams("heldout", 4)
    for part in (slice(0, 3), slice(-3, None)):
        ends = {split: {tuple(words(p["prompt"])[part]) for p in of_split(PAIRS, split)} for split in SPLITS}
        assert not ends["selection"] & ends["heldout"]
    for pair in of_split(PAIRS, "heldout"):
        assert not re.match(r"(Compared with|Next to|Q:|Hi|Dear|Diary|Of all|\")", pair["prompt"]), pair


def test_neutral_paragraphs():
    for split in SPLITS:
        assert len(of_split(NEUTRAL, split)) == 12
    openings = [tuple(words(record["text"])[:3]) for record in NEUTRAL]
    assert len(set(openings)) == len(openings)
    for record in NEUTRAL:
        assert record["text"] == record["text"].strip() and record["text"].endswith(".")
        assert 38 <= len(words(record["text"])) <= 62, record["text"]
