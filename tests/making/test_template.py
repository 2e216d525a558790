"""Pairs from templates: which combinations there are, what is paired, and what is refused."""

import json

import pytest

from austeer import PairsError
from austeer.making import pairs_from_template
from austeer.making.template import read_values

NOUNS = ["film", "book", "soup"]
VALUES = {"noun": NOUNS, "good": ["fine", "clever"], "bad": ["poor", "silly"]}
FORM = ("The {noun} was", " {good}", " {bad}")


def rows(made):
    return [(p.prompt, p.positive, p.negative) for p in made.pairs]


def test_all_combinations_with_sides_paired():
    assert rows(pairs_from_template(*FORM, VALUES)) == [
        (f"The {noun} was", f" {good}", f" {bad}")
        for noun in NOUNS
        for good, bad in (("fine", "poor"), ("clever", "silly"))
    ]


def test_what_both_sides_have_is_combined_and_braces_are_doubled():
    values = {"who": ["she", "he"], "mood": ["glad", "calm"], "other": ["sad", "cross"]}
    made = pairs_from_template("{{x}}:", " {who} is {mood}", " {who} is {other}", values)
    assert rows(made) == [
        ("{x}:", f" {who} is {mood}", f" {who} is {other}")
        for who in ("she", "he")
        for mood, other in (("glad", "sad"), ("calm", "cross"))
    ]


def test_a_count_draws_different_ones_with_the_seed():
    values = VALUES | {"noun": [f"n{i}" for i in range(50)]}
    everything = rows(pairs_from_template(*FORM, values))
    drawn = rows(pairs_from_template(*FORM, values, count=20, seed=1))
    assert len(set(drawn)) == 20 and set(drawn) < set(everything)
    assert drawn == rows(pairs_from_template(*FORM, values, count=20, seed=1))
    assert drawn != rows(pairs_from_template(*FORM, values, count=20, seed=2))


def test_a_large_product_is_drawn_from_without_being_made():
    many = {name: [str(i) for i in range(1000)] for name in "abcd"}
    made = pairs_from_template("{a} {b} {c} {d}", " x", " y", many, count=5)
    assert len(made.pairs) == 5
    with pytest.raises(PairsError, match=r"1000000000000.*--count"):
        pairs_from_template("{a} {b} {c} {d}", " x", " y", many)


@pytest.mark.parametrize(
    "form, values, found",
    [
        (FORM, {"noun": NOUNS, "good": ["a"]}, "template: .*{bad}.*noun, good"),
        (FORM, VALUES | {"more": ["x"]}, "values: .*'more'.*noun, good, bad"),
        (FORM, VALUES | {"bad": ["poor"]}, "2 for 'good', 1 for 'bad'"),
        (FORM, VALUES | {"noun": []}, r"\[\] for 'noun'"),
        (FORM, VALUES | {"noun": ["film", " "]}, r"\['film', ' '\] for 'noun'"),
        (FORM, VALUES | {"noun": "film"}, "'film' for 'noun'.*list"),
        (FORM, VALUES | {"noun": ["film", "book", "film"]}, "'film' twice for 'noun'"),
        (FORM, VALUES | {"bad": ["poor", "clever"]}, "' clever'.*both sides"),
        (("The {noun", " a", " b"), {}, "prompt: .*'The {noun'"),
        (("The {0} was", " a", " b"), {}, r"prompt: .*\{0\}"),
        (("The {noun.__class__} was", " a", " b"), {}, "prompt: .*{noun.__class__}"),
        (("The {noun!r} was", " a", " b"), {}, "prompt: .*{noun!r}"),
        (("{noun}", "", " b"), {"noun": NOUNS}, "positive: .*empty"),
        (("The film was", " a", " b"), {}, "template: .*1 pair.* 2"),
    ],
)
def test_what_is_refused(form, values, found):
    with pytest.raises(PairsError, match=found):
        pairs_from_template(*form, values)


@pytest.mark.parametrize("count", [1, 7])
def test_a_count_out_of_range(count):
    with pytest.raises(PairsError, match=rf"count: .* {count},.*2 to 6"):
        pairs_from_template(*FORM, VALUES, count=count)


def test_values_come_from_a_file_and_from_texts(tmp_path):
    path = tmp_path / "values.json"
    path.write_text(json.dumps({"noun": ["the film, at last"]}))
    assert read_values(path, ["good=fine, clever", "bad=a=b"]) == {
        "noun": ["the film, at last"],
        "good": ["fine", "clever"],
        "bad": ["a=b"],
    }
    for texts, found in ((["noun=x"], "'noun' twice"), (["noun"], "'noun'.*NAME=VALUE")):
        with pytest.raises(PairsError, match=found):
            read_values(path, texts)


@pytest.mark.parametrize(
    "text, noun", [("[1]", "object"), ('{"a": [1]}', "object"), ('{"a": "b"}', "object"), ("{", "JSON")]
)
def test_values_in_another_form(tmp_path, text, noun):
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(PairsError, match=rf"v.json.*{noun}"):
        read_values(tmp_path / "v.json")
    with pytest.raises(PairsError, match=r"none\.json: "):
        read_values(tmp_path / "none.json")
