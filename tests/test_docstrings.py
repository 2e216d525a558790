"""The public verbs explain themselves: each has an example in its docstring, which runs as it stands there."""

import doctest
import inspect
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import austeer
from searches import NOUNS
from tiny_models import tiny_model

VERBS = {
    "load_pairs": austeer.load_pairs,
    "stream_pairs": austeer.stream_pairs,
    "find_sites": austeer.find_sites,
    "measure": austeer.measure,
    "momentum_from_activations": austeer.momentum_from_activations,
    "estimate": austeer.estimate,
    "Momentum.select": austeer.Momentum.select,
    "Plan.save_pretrained": austeer.Plan.save_pretrained,
    "Plan.from_pretrained": austeer.Plan.from_pretrained,
    "steer": austeer.steer,
    "tune": austeer.tune,
    "compare": austeer.compare,
    "export_lora": austeer.export_lora,
    "export_checkpoint": austeer.export_checkpoint,
    "export_gguf": austeer.export_gguf,
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character of ASCII."""
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", pad_token="\0", eos_token="\2")


@pytest.fixture(scope="module")
def pairs():
    answers = [(" good", " bad"), (" lovely", " dull")]
    rows = [(f"The {noun} was", *answers[i % 2]) for i, noun in enumerate([*NOUNS, *NOUNS[:8]])]
    return austeer.Pairs.of(rows, "pairs.jsonl")


@pytest.fixture(scope="module")
def momentum(tokenizer, pairs):
    return austeer.measure(tiny_model(vocab_size=128), tokenizer, pairs)


@pytest.fixture
def names(tokenizer, pairs, momentum, tmp_path, monkeypatch):
    """What the examples find: a model, files in the current folder, and what was made of them."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(vocab_size=128, max_position_embeddings=2048)
    for part in (model, tokenizer):
        part.save_pretrained("models/tiny")
    with open("pairs.jsonl", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.writelines(
            json.dumps({"prompt": p.prompt, "positive": p.positive, "negative": p.negative}) + "\n" for p in pairs
        )
    plan = momentum.select("attention", k=10)
    return {
        "austeer": austeer,
        "model": model,
        "tokenizer": tokenizer,
        "pairs": pairs,
        "momentum": momentum,
        "plan": plan,
    }


@pytest.mark.parametrize("name", VERBS)
def test_an_example_runs_as_it_stands(name, names, capsys):
    found = doctest.DocTestFinder(recurse=False).find(VERBS[name], name, module=False, globs=names)
    assert sum(len(test.examples) for test in found) >= 1, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_is_told(name):
    text = inspect.getdoc(VERBS[name])
    assert "\nExample:\n    >>> " in text and "\nRaises:\n" in text
    wanted = [name for name in inspect.signature(VERBS[name]).parameters if name not in ("self", "cls")]
    told = text.partition("\nArgs:\n")[2].partition("\nRaises:\n")[0]
    if "Args:" in text or len(wanted) > 1:
        assert [word for word in wanted if word not in told] == []


def test_every_public_verb_is_here():
    public = {name for name in austeer.__all__ if inspect.isfunction(getattr(austeer, name))}
    assert public - {"is_steered"} <= set(VERBS)
