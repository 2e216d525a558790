"""The public verbs explain themselves: each has an example in its docstring, which runs as it stands there."""

import doctest
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import austeer
from austeer.forward.neutral import neutral_texts
from searches import NOUNS
from tiny_models import tiny_model

VERBS = {
    "load_pairs": austeer.load_pairs,
    "stream_pairs": austeer.stream_pairs,
    "find_sites": austeer.find_sites,
    "measure": austeer.measure,
    "momentum_from_activations": austeer.momentum_from_activations,
    "estimate": austeer.estimate,
    "profile": austeer.profile,
    "estimate_kl": austeer.estimate_kl,
    "Profile.kl": austeer.Profile.kl,
    "Profile.alpha": austeer.Profile.alpha,
    "Momentum.select": austeer.Momentum.select,
    "Plan.save_pretrained": austeer.Plan.save_pretrained,
    "Plan.from_pretrained": austeer.Plan.from_pretrained,
    "steer": austeer.steer,
    "fit_probe": austeer.fit_probe,
    "answer_scope": austeer.answer_scope,
    "tune": austeer.tune,
    "compare": austeer.compare,
    "export_lora": austeer.export_lora,
    "record_replay": austeer.record_replay,
    "verify": austeer.verify,
    "export_checkpoint": austeer.export_checkpoint,
    "export_gguf": austeer.export_gguf,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny random Llama and a tokenizer of a few English syllables."""
    folder = tmp_path_factory.mktemp("checkpoint")
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]  # 0, 1 and 2, as the tiny models have them
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bytewise.train_from_iterator([*neutral_texts(), *neutral_texts("heldout")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", eos_token="</s>")
    for part in (tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def names(checkpoint, tmp_path, monkeypatch):
    """What the examples find: a model and pairs, in the current folder and loaded, and what was made of them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "models/tiny")
    answers = [(" good", " bad"), (" lovely", " dull")]
    rows = [(f"The {noun} was", *answers[i % 2]) for i, noun in enumerate([*NOUNS, *NOUNS[:8]])]
    lines = [json.dumps(dict(zip(("prompt", "positive", "negative"), row))) for row in rows]
    Path("pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = {
        "austeer": austeer,
        "model": AutoModelForCausalLM.from_pretrained("models/tiny"),
        "tokenizer": AutoTokenizer.from_pretrained("models/tiny"),
        "pairs": austeer.Pairs.of(rows, "pairs.jsonl"),
    }
    momentum = austeer.measure(found["model"], found["tokenizer"], found["pairs"])
    profile = austeer.profile(found["model"], found["tokenizer"], draws=24)
    return found | {"momentum": momentum, "plan": momentum.select("attention", k=10), "profile": profile}


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
    wanted = [argument for argument in inspect.signature(VERBS[name]).parameters if argument not in ("self", "cls")]
    told = re.findall(r"\w+", text.partition("\nArgs:\n")[2].partition("\nRaises:\n")[0])
    if len(wanted) > 1:
        assert set(wanted) <= set(told)


def test_every_public_verb_is_here():
    public = {name for name in austeer.__all__ if inspect.isfunction(getattr(austeer, name))}
    assert public - {"is_steered"} <= set(VERBS)
