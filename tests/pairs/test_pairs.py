"""Contrastive pairs: reading with every complaint, splitting, chat templates."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from austeer import Pair, Pairs, PairsError, load_pairs
from austeer.tasks import Task
from places import SHARED_DATA as DATA

EXPECTED = [
    Pair("The soup was", " good", " bad"),
    Pair("Der Käse war", " köstlich 🧀", " übel"),
    Pair('He said, "it is', ' fine"\nand left', ' awful"'),
]
ROWS = [{"prompt": pair.prompt, "positive": pair.positive, "negative": pair.negative} for pair in EXPECTED]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets lie beside the repository, not in it")
@pytest.mark.parametrize("name", ["persona_openness.jsonl", "caa_sycophancy_generate.jsonl"])
def test_real_data_by_field_mapping(name):
    fields = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    pairs = load_pairs(DATA / name, **dict(zip(("prompt", "positive", "negative"), fields)))
    with (DATA / name).open(encoding="utf-8") as file:
        assert [tuple(json.loads(line)[f] for f in fields) for line in file] == [
            (p.prompt, p.positive, p.negative) for p in pairs
        ]
    assert len(pairs) == 1000


# --- from memory -----------------------------------------------------------------------------------------------------


def test_of_takes_pairs_mappings_and_triples():
    expected = Pairs(tuple(EXPECTED))
    triples = [(p.prompt, p.positive, p.negative) for p in EXPECTED]
    for entries in (EXPECTED, ROWS, triples, map(list, triples)):
        assert Pairs.of(entries) == expected
    assert Pairs.of(expected) is expected


@pytest.mark.parametrize(
    "entries, found",
    [
        (None, "NoneType"),
        ([], "memory: .*0 pairs"),
        ([("a", "b", "c")], "memory: .*1 pair,"),
        ([("a", "b", "c"), ("a", "b")], r"memory, pair 1: .*\('a', 'b'\).*\(prompt, positive, negative\)"),
        ([("a", "b", "c"), "abc"], "memory, pair 1: .*'abc'"),
        ([("a", "b", "c"), None], "memory, pair 1: .*None"),
        ([("a", "b", "c"), ("a", "b", None)], "memory, pair 1: .*'negative' is null"),
        ([("a", "b", "c"), ("a", 1, "c")], "memory, pair 1: .*'positive' is int"),
        ([("a", "b", "c"), Pair("a", "b", " ")], "memory, pair 1: .*'negative' is empty"),
        ([("a", "b", "c"), ("a\ud800", "b", "c")], "memory, pair 1: .*'prompt'.*half"),
        ([{"prompt": "a", "positive": "b"}], "memory, pair 0: .*'negative'.*prompt, positive.*--negative-field"),
        ([("a", "b", "b"), ("c", "d", "d")], "memory: .*2 pairs .*equal"),
    ],
)
def test_of_complains(entries, found):
    with pytest.raises(PairsError, match=found):
        Pairs.of(entries)


def test_index_and_slice_keep_what_is_known():
    pairs = Pairs(tuple(EXPECTED), "origin", chat_template=True)
    assert pairs[1] == EXPECTED[1] and pairs[-1] == EXPECTED[-1]
    assert pairs[1:3] == Pairs(tuple(EXPECTED[1:3]), "origin", chat_template=True)


# --- split -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.floats(0, 1), st.integers(0, 2**32))
def test_split_is_a_partition_and_repeats(count, fraction, seed):
    pairs = Pairs.of([(f"p{i}", "a", "b") for i in range(count)])
    size = round(len(pairs) * fraction)
    if min(size, len(pairs) - size) < 2:
        with pytest.raises(PairsError, match=f" {size} and {len(pairs) - size}"):
            pairs.split(fraction, seed)
        return
    first, second = pairs.split(fraction, seed)
    assert len(first) == size
    assert sorted(map(repr, [*first, *second])) == sorted(map(repr, pairs)), "a pair was lost or doubled"
    assert (first, second) == pairs.split(fraction, seed)


def test_split_depends_on_the_seed():
    pairs = Pairs.of([(f"p{i}", "a", "b") for i in range(40)])
    assert pairs.split(0.5, seed=1) != pairs.split(0.5, seed=2)


# --- chat templates --------------------------------------------------------------------------------------------------


def test_chat_template_wraps_the_prompt_and_opens_the_answer_once(demo):
    pairs = Pairs.of(EXPECTED).with_chat_template(demo[1], system="Be brief.")
    assert pairs.chat_template
    for before, after in zip(EXPECTED, pairs, strict=True):
        assert after.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert after.prompt.endswith(f"<|im_start|>user\n{before.prompt}<|im_end|>\n<|im_start|>assistant\n")
        assert (after.positive, after.negative) == (before.positive, before.negative)
    with pytest.raises(PairsError, match="chat template already"):
        pairs.with_chat_template(demo[1])


@pytest.mark.parametrize("lead", ["\n\nAnswer: (", " Answer:"])
def test_pairs_and_the_task_of_them_read_the_same_in_a_chat_template(demo, lead):
    pairs = Pairs.of([Pair(f"Q{i}?{lead}", " a\n", " b", lead) for i in range(3)])
    made = Task.of_pairs(pairs)
    assert made.pairs() == pairs
    assert made.with_chat_template(demo[1]).pairs() == pairs.with_chat_template(demo[1])
    text = pairs.with_chat_template(demo[1])[0]
    assert (text.prompt + text.positive).endswith(f"user\nQ0?<|im_end|>\n<|im_start|>assistant\n{lead.strip()} a\n")


@pytest.mark.parametrize("lead", ["A:", 3, ["?"]])
def test_a_lead_that_is_not_the_prompts_end(lead):
    rows = [{"prompt": "Q0?", "positive": "a", "negative": "b", "lead": lead}] * 2
    with pytest.raises(PairsError, match=rf"memory, pair 0: .*{re.escape(repr(lead))}.*'lead'.*'Q0\?'"):
        Pairs.of(rows)
