"""The report of a measurement: figures that add up, as JSON and in words."""

import json
import math
import re

import pytest

import austeer
from austeer.forward.packing import batches
from austeer.forward.tokens import tokenise
from austeer.momentum.report import MeasureReport, Seconds
from letter_tokens import Letters, letter_pairs
from tiny_models import tiny_model

PAIRS = austeer.Pairs.of([*letter_pairs(20), ("the same", " end", " end"), *letter_pairs(9)])


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def report(model, **options):
    return austeer.measure(model, Letters(), PAIRS, ["ffn"], **options).report


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("block_pairs, batch_tokens", [(128, None), (4, 32), (1, 1), (7, 200)])
def test_figures_of_a_real_run_add_up(model, share, block_pairs, batch_tokens):
    forwards = []
    handle = model.model.register_forward_hook(
        lambda module, args, kwargs, output: forwards.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = report(model, share_prompts=share, block_pairs=block_pairs, batch_tokens=batch_tokens)
    handle.remove()
    tokens = tokenise(Letters(), PAIRS, 128)
    texts = tokens.positive + tokens.negative
    probe = 2 if share else 0  # asking the model about shared prompts is not measuring
    assert (found.pairs, found.texts, found.strategy, found.processes, found.resumed) == (30, 58, "resident", 1, 0)
    assert found.tokens_texts == sum(map(len, texts))
    assert found.batches == len(forwards) - probe and found.tokens_padded == sum(forwards[probe:])
    assert found.tokens_run <= found.tokens_texts and found.tokens_run <= found.tokens_padded
    assert found.shared_prompts == share and (found.tokens_run < found.tokens_texts) == share
    assert 0 <= found.padding < 1 and math.isclose(found.tokens_padded * (1 - found.padding), found.tokens_run)
    assert found.batch_tokens == (batch_tokens or 1024)
    assert (found.shared_error < 1e-5) if share else found.shared_error is None
    if block_pairs == 128:
        assert found.tokens_run == sum(batch.tokens for batch in batches(texts, found.batch_tokens, share))
    s = found.seconds
    assert min(s.read, s.tokenise, s.pack, s.forward, s.count) > 0 and s.weights == s.load == 0
    assert s.wait + s.forward + s.count + s.reduce <= s.total
    assert math.isclose(found.pairs_per_second, 30 / s.total)
    assert math.isclose(found.tokens_per_second, found.tokens_run / s.total)


def test_json_holds_all_of_it(model):
    found = report(model)
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    rates = {name: read.pop(name) for name in ("padding", "pairs_per_second", "tokens_per_second")}
    assert rates == {name: getattr(found, name) for name in rates}
    assert MeasureReport(**read | {"seconds": Seconds(**read["seconds"])}) == found


def test_in_words_layer_by_layer_over_processes():
    seconds = Seconds(
        load=3, read=1, tokenise=2, pack=0.5, wait=0.1, weights=4, forward=5, count=0.2, reduce=0.3, total=10
    )
    found = MeasureReport(
        strategy="layerwise", pairs=20, tokens_run=100, tokens_padded=125, seconds=seconds, processes=3
    )
    first, second = found.lines()
    assert first == "2.0 pairs/s, 10 tokens/s, 20.0% padding"
    shown = "load 3.0 forward 5.0 weights 4.0 texts 0.1 counting 0.2 processes 0.3 read 1.0 tokenised 2.0 packed 0.5"
    assert " ".join(re.findall(r"(\w+ [\d.]+) s\b", second)) == shown and "3 processes" in second


def test_nothing_was_run():
    found = MeasureReport()
    assert (found.padding, found.pairs_per_second, found.tokens_per_second) == (0, 0, 0) and found.lines()


def test_other_processes_are_added(model):
    found, others = report(model), [report(model, block_pairs=3), report(model, block_pairs=5)]
    seconds = found.seconds
    expected = {
        name: getattr(found, name) + sum(getattr(other, name) for other in others)
        for name in ("pairs", "texts", "batches", "tokens_texts", "tokens_run", "tokens_padded", "resumed")
    }
    found.add(others)
    assert {name: getattr(found, name) for name in expected} == expected and found.pairs == 90
    assert found.seconds is seconds and found.batch_tokens == 1024


def test_only_a_fresh_momentum_has_one(model, tmp_path):
    fresh = austeer.measure(model, Letters(), PAIRS, ["ffn"])
    assert austeer.Momentum.load(fresh.save(tmp_path / "m.safetensors")).report is None
    assert fresh.merge(fresh).report is None and fresh.report is not None
    assert "report" not in repr(fresh)
