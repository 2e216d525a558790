"""What settings write: how texts are judged, what derails, and that it is set aside."""

from dataclasses import replace

import pytest
import torch

from austeer.baselines.arm import Arm, Candidate
from austeer.pairs.pairs import Pairs
from austeer.tuning import reader as reading
from austeer.tuning import writing
from austeer.tuning.budget import Budget
from austeer.tuning.calibrate import Limit
from austeer.tuning.reader import middle, read, train_reader
from austeer.tuning.record import Record
from austeer.tuning.schedule import Costs
from austeer.tuning.scorer import Scorer
from austeer.tuning.search import Standing
from austeer.tuning.writing import Text, Writer, Written, derailment, distinct_share, first_not_derailed
from searches import NEUTRAL, NOUNS, material_of, words

SIDES = [(f"The {noun} was", " a warm and good thing", " one cold hard stone") for noun in NOUNS]


@pytest.fixture(scope="module")
def small(one_lively, demo):
    return material_of(one_lively, demo[1], ("ffn",))


def scorer_of(small, record=None):
    return Scorer(small.model, small.tokenizer, words(), NEUTRAL, record)


def candidate_of(small, alpha, operation="shift"):
    return Candidate(Arm("momentum", small.momentum.select("ffn", k=8, operation=operation), 8), alpha)


def written(repeated=0.0, log_prob=-2.0, tokens=40, spread=0.0, count=10):
    texts = tuple(
        Text("task", "a", "b", tokens, repeated + spread * (i % 2), (1.0, 1.0, 1.0), log_prob, None)
        for i in range(count)
    )
    mean = sum(text.repeated for text in texts) / count
    return Written("a", 1.0, 1.0, tokens, mean, (1.0, 1.0, 1.0), log_prob, None, "", texts)


# --- judging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "n", "share"),
    [([1, 2, 1, 2, 1], 1, 2 / 5), ([1, 2, 1, 2, 1], 2, 2 / 4), ([1, 2, 1, 2, 1], 3, 2 / 3), ([1, 2], 3, 1), ([], 1, 1)],
)
def test_distinct_n_grams(tokens, n, share):
    assert distinct_share(tokens, n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("found", "unsteered", "reason"),
    [
        (written(), written(), ""),
        (written(repeated=0.09), written(), ""),  # every model repeats a few
        (written(repeated=0.3), written(), "repeats"),
        (written(repeated=0.3), written(spread=0.4), ""),  # as the unsteered model does
        (written(log_prob=-2.9), written(), ""),  # another style is less likely
        (written(log_prob=-3.1), written(), "unlikely"),
        (written(log_prob=float("nan")), written(), "unlikely"),
        (written(tokens=0, log_prob=None), written(), "writes nothing"),
        (written(tokens=0, log_prob=None), written(tokens=0, log_prob=None), ""),
    ],
)
def test_what_derails_is_measured_by_what_the_unsteered_model_writes(found, unsteered, reason):
    assert derailment(found, unsteered).startswith(reason) and bool(derailment(found, unsteered)) == bool(reason)


def test_texts_are_read_as_the_model_alone_would(one_lively):
    texts = [[5, 9, 30, 31], [7, 8, 40, 41, 42, 43]]
    starts = [2, 3]
    states, log_prob = read(one_lively, texts, starts, middle(one_lively), scored=True)
    for text, start, state, mean in zip(texts, starts, states, log_prob):
        output = one_lively(input_ids=torch.tensor([text]), output_hidden_states=True)
        layer = middle(one_lively).layer
        torch.testing.assert_close(state, output.hidden_states[layer + 1][0, start:].mean(0), rtol=1e-4, atol=1e-4)
        chance = output.logits[0].log_softmax(-1)
        expected = sum(chance[at - 1, text[at]].item() for at in range(start, len(text))) / (len(text) - start)
        assert mean.item() == pytest.approx(expected, abs=1e-4)
    without, nothing = read(one_lively, texts, starts, middle(one_lively))
    torch.testing.assert_close(without, states)  # the layers behind are not needed
    assert not nothing.any() and len(one_lively.model.layers) == 3


# --- the reader ------------------------------------------------------------------------------------------------------


def test_a_reader_tells_sides_apart_that_it_was_not_trained_on(one_lively, demo):
    found = train_reader(one_lively, demo[1], Pairs.of(SIDES))
    assert found.accuracy == 1 and found.is_trusted and found.texts == 2 * len(SIDES)
    ids = demo[1](["The pie was" + SIDES[0][side] for side in (1, 2)])["input_ids"]
    states, _ = read(one_lively, ids, [3, 3], middle(one_lively))
    logits = found.logit(states)
    assert logits[0] > 0 > logits[1]


def test_a_reader_of_sides_without_a_difference_is_not_trusted(one_lively, demo):
    pairs = Pairs.of([(p, *sides[:: 1 if i % 2 else -1]) for i, (p, *sides) in enumerate(SIDES)])
    assert not train_reader(one_lively, demo[1], pairs).is_trusted
    assert train_reader(one_lively, demo[1], Pairs.of(2 * SIDES[:1])) is None


def test_the_fit_in_the_span_of_the_texts_is_the_fit(monkeypatch):
    torch.manual_seed(0)
    x, positive = torch.randn(9, 20).double(), torch.arange(9) % 2 == 0
    found = reading._fitted(0, x, positive, 0.0)
    plain = reading.fit(((x - x.mean(0)) / x.std(0))[None], positive)
    torch.testing.assert_close(found.probe.weight, plain.weight, rtol=1e-6, atol=1e-8)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_strength_that_breaks_the_model_is_set_aside_for_the_next_best(small):
    task = words()
    effects = [3.0, 2.0, 1.0]
    standings = [
        Standing(candidate_of(small, alpha), "", 1.0, Limit(alpha), (0, 1), torch.full((2,), effect).double())
        for alpha, effect in zip((3000.0, 1e-3, 1e-4), effects)
    ]
    writer = Writer(scorer_of(small), small.pairs, Budget())
    best, aside = first_not_derailed(writer, standings)
    assert best is standings[1] and [w.alpha for w in aside] == [3000.0] and aside[0].derailed
    found = writer.writing([best.candidate], aside)
    assert found.settings[0].derailed == "" and [w.part for w in found.others] == [0.5, 1.5]
    assert [w.alpha for w in found.others] == pytest.approx([0.5e-3, 1.5e-3])
    kinds = [text.kind for text in found.settings[0].texts]
    assert kinds == ["neutral", "task"] * 2 and len(found.unsteered.texts) == 3 * 4
    prompts = {text.prompt for text in found.settings[0].texts if text.kind == "task"}
    assert prompts <= {item.prompt for item in task}
    assert all(0 < text.tokens <= 6 and text.log_prob < 0 for text in found.unsteered.texts)


def test_where_all_derail_the_best_stays_and_says_so(small):
    change = torch.ones(2).double()
    standings = [Standing(candidate_of(small, a), "", 1.0, Limit(a), (0, 1), change) for a in (3000.0, 4000.0)]
    writer = Writer(scorer_of(small), small.pairs, Budget())
    best, aside = first_not_derailed(writer, standings)
    assert best is standings[0] and not aside and writer.writing([best.candidate]).settings[0].derailed


def test_what_was_written_is_read_from_the_record(small, monkeypatch, tmp_path):
    def write():
        record = Record(tmp_path / "search.jsonl", {})
        return Writer(scorer_of(small, record), small.pairs, Budget()).writing([candidate_of(small, 1.0)])

    first = write()
    monkeypatch.setattr(writing, "continue_ids", None)  # nothing may be run any more
    monkeypatch.setattr(writing, "train_reader", None)
    assert write() == first


def test_texts_repeat_with_the_seed(small):
    def texts(seed):
        found = Writer(scorer_of(small), small.pairs, Budget(), seed).write([candidate_of(small, 1.0)])
        return [text.text for text in found[0].texts]

    assert texts(1) == texts(1) != texts(2)


def test_without_time_nothing_is_written_and_that_is_said(small, monkeypatch):
    monkeypatch.setattr(Scorer, "costs", Costs(0.0, 0.0, 1.0))
    budget = Budget(100.0)
    writer = Writer(scorer_of(small), small.pairs, budget)
    assert writer.write([candidate_of(small, 1.0)]) == [] and writer.writing([candidate_of(small, 1.0)]) is None
    assert budget.left_out == ["settings that write: 0 of 1"]


def test_a_text_that_the_model_ends_at_once_is_empty(small, monkeypatch):
    def ended(model, tokenizer, ids, **options):
        writing_ids(model, tokenizer, ids, **options)
        return [[] for _ in ids]

    writing_ids = writing.continue_ids
    monkeypatch.setattr(writing, "continue_ids", ended)
    writer = Writer(scorer_of(small), small.pairs, Budget())
    (found,) = writer.write([candidate_of(small, 1.0)])
    assert found.log_prob is None and found.tokens == 0 and found.derailed == ""
    assert derailment(found, replace(found, texts=written().texts)).startswith("writes nothing")
