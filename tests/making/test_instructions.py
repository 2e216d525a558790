"""Pairs that a model writes itself: what is kept of its answers, sampling, interrupted runs, a real model."""

import json

import pytest

import austeer
from austeer import FileFormatError, PairsError
from austeer.making import check_pairs, instructions, pairs_from_instructions
from austeer.making.prompts import read_prompts
from austeer.making.unfinished_run import partial_path

TWO = ("Answer kindly.", "Answer rudely.")
PROMPTS = [f"Question {i}?" for i in range(7)]


@pytest.fixture
def answers(tiny, demo, monkeypatch):
    """Makes pairs with a model whose answers are given: a function of prompt and instruction."""

    def make(answer, out, prompts=PROMPTS, **options):
        def write(model, tokenizer, texts, *, special, **given):
            assert special and tokenizer is demo[1] and given["max_new_tokens"] == options.get("max_new_tokens", 32)
            return [answer(*reversed(text.split("\n\n"))) for text in texts]

        monkeypatch.setattr(instructions, "continue_prompts", write)
        return pairs_from_instructions(
            *(tiny, demo[1], prompts, *TWO, out), chat=False, batch_size=3, progress=False, **options
        )

    return make


def rows(path):
    return [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]


def test_the_prompt_is_kept_without_the_instruction(answers, tmp_path):
    out = tmp_path / "pairs.jsonl"
    made = answers(lambda prompt, instruction: f" {instruction.split()[1]} said {prompt}", out, same_length=False)
    assert rows(out) == [(prompt, f" kindly. said {prompt}", f" rudely. said {prompt}") for prompt in PROMPTS]
    assert [(p.prompt, p.positive, p.negative) for p in made.pairs] == rows(out)
    assert not made.dropped and "plain prompts" in made.notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert list(austeer.load_pairs(out)) == list(made.pairs)


def test_what_is_left_out_is_counted(answers, tmp_path):
    table = [
        (" good.", " bad."),
        ("\n\n same enough.", " same enough."),
        ("", " bad."),
        (" Donaudampfschifffahrtsgesellschaft", " bad"),
        (" good, well, fine", " good and so on and so on and so on"),
        (" fine words", " harsh words"),
        (" \n", " bad."),
    ]

    def answer(prompt, instruction):
        return table[int(prompt[9])][instruction == TWO[1]]

    made = answers(answer, tmp_path / "a.jsonl")
    assert [p.prompt for p in made.pairs] == ["Question 0?", "Question 4?", "Question 5?"]
    assert made.dropped == {"equal sides": 1, "empty side": 2, "no common length at a word's end": 1}
    made = answers(answer, tmp_path / "b.jsonl", same_length=False)
    assert len(made.pairs) == 4 and made.dropped == {"equal sides": 1, "empty side": 2}
    assert made.pairs[1].positive == " Donaudampfschifffahrtsgesellschaft"


def test_sides_that_differ_behind_the_cut_only_are_left_out(answers, tmp_path):
    table = {TWO[0]: " good. And so on, and so on.", TWO[1]: " good."}
    with pytest.raises(PairsError, match=r"pairs.jsonl: .* 0 pairs.* 2 .*7 equal sides"):
        answers(lambda prompt, instruction: table[instruction], tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_last_word_that_broke_off_is_cut(answers, tmp_path):
    def answer(prompt, instruction):
        return f" {instruction.split()[1]} one two three four five six sev"

    made = answers(answer, tmp_path / "a.jsonl", max_new_tokens=10, same_length=False)
    assert made.pairs[0].positive == " kindly. one two three four five six"
    made = answers(answer, tmp_path / "b.jsonl", max_new_tokens=40, same_length=False)
    assert made.pairs[0].positive.endswith(" sev"), "it ended by itself: that is all it said"


def test_repeated_samples_are_left_out(answers, tmp_path):
    made = answers(lambda prompt, instruction: f" {instruction}", tmp_path / "p.jsonl", samples=3, temperature=1.0)
    assert len(made.pairs) == 7 and made.dropped == {"repeated": 14}


@pytest.fixture
def write(lively, demo, tmp_path):
    """Makes pairs with a small random model: the file's bytes."""

    def make(name, prompts=PROMPTS, **options):
        options = {"max_new_tokens": 8, "batch_size": 3, "progress": False, "temperature": 1.0} | options
        pairs_from_instructions(lively, demo[1], prompts, *TWO, tmp_path / f"{name}.jsonl", **options)
        return (tmp_path / f"{name}.jsonl").read_bytes()

    return make


def test_samples_depend_on_the_seed(write):
    first = write("a", samples=2, seed=1, same_length=False)
    assert write("b", samples=2, seed=1, same_length=False) == first
    assert write("c", samples=2, seed=2, same_length=False) != first
    found = [json.loads(line) for line in first.splitlines()]
    assert len({row["positive"] for row in found}) == len(found) > 7, "each sample is another text"


@pytest.mark.parametrize("stop", [1, 4])
def test_an_interrupted_run_goes_on_where_it_stopped(write, lively, tmp_path, monkeypatch, stop):
    whole = write("whole", same_length=False)
    plain, calls = instructions.continue_prompts, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) > stop:  # two calls a batch
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(instructions, "continue_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt, match=rf"{stop // 2} of 3 .*part.jsonl.partial.*--resume"):
        write("part", same_length=False)
    partial = partial_path(tmp_path / "part.jsonl")
    assert partial.exists() and not (tmp_path / "part.jsonl").exists()
    with pytest.raises(PairsError, match=r"'\.partial'"):
        austeer.load_pairs(partial)
    monkeypatch.setattr(instructions, "continue_prompts", plain)
    if stop == 1:  # nothing is kept, so nothing is in the way
        assert write("part", same_length=False) == whole and not partial.exists()
        return
    with pytest.raises(PairsError, match=r"part.jsonl.partial: .*--resume.*--force"):
        write("part", same_length=False)
    for other, name in (
        ({"seed": 9}, "seed"),
        ({"max_new_tokens": 11}, "max_new_tokens"),
        ({"same_length": True}, "same_length"),
        ({"prompts": PROMPTS[:-1]}, "prompts"),
        ({"batch_size": 2}, "batch_size"),
        ({"temperature": None}, "temperature"),
    ):
        with pytest.raises(FileFormatError, match=rf"part.jsonl.partial: .* {name} .*--force"):
            write("part", resume=True, **({"same_length": False} | other))
    weight = next(lively.parameters()).data
    weight.mul_(2)
    with pytest.raises(FileFormatError, match=r"part.jsonl.partial: .* weights .*--force"):
        write("part", resume=True, same_length=False)
    weight.mul_(0.5)
    again = []
    monkeypatch.setattr(instructions, "continue_prompts", lambda *a, **o: again.append(a) or plain(*a, **o))
    assert write("part", resume=True, same_length=False) == whole
    assert len(again) == 6 - 2 * (stop // 2), "batches that are there are not made again"
    assert not partial.exists()


@pytest.mark.parametrize(
    "given, found",
    [
        ({"negative": "Answer kindly."}, "instructions: .*'Answer kindly.'"),
        ({"positive": " "}, "instruction: .*' '"),
        ({"prompts": []}, "prompts: .*none"),
        ({"prompts": ["a", " "]}, "prompts: .*empty"),
        ({"out": "pairs.csv"}, "'.csv'.*.jsonl"),
        ({"samples": 3}, "samples: .*3.*temperature"),
        ({"samples": 0}, "samples: .* 0,"),
        ({"max_new_tokens": 0}, "max_new_tokens: .* 0,"),
        ({"batch_size": 0}, "batch_size: .* 0,"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tiny, demo, tmp_path, given, found):
    options = {"prompts": PROMPTS, "positive": TWO[0], "negative": TWO[1], "out": "pairs.jsonl"} | given
    options["out"] = tmp_path / options["out"]
    with pytest.raises(PairsError, match=found):
        pairs_from_instructions(tiny, demo[1], **options)
    assert not list(tmp_path.iterdir())


def test_a_real_model_writes_pairs_that_length_does_not_tell_apart(demo, tmp_path):
    model, tokenizer = demo
    two = ("Answer with enthusiasm and joy.", "Answer in a bored and gloomy way.")
    made = pairs_from_instructions(
        model, tokenizer, read_prompts(limit=8), *two, tmp_path / "p.jsonl", max_new_tokens=10, progress=False
    )
    assert len(made.pairs) + sum(made.dropped.values()) == 8 and len(made.pairs) >= 5
    assert "--chat" in made.notes[0]
    for pair in made.pairs:
        assert not any(instruction in vars(pair).values() for instruction in two)
        assert "<|im_" not in pair.prompt + pair.positive + pair.negative
    report = check_pairs(made.pairs.with_chat_template(tokenizer), tokenizer)
    assert report["length"].numbers["equal"] == report.usable == len(made.pairs)
    # Greedy answers to the system message, as the library itself would render it.
    from austeer.forward.generation import continue_prompts
    from austeer.pairs.chat import render_chat

    pair = made.pairs[0]
    text = render_chat(tokenizer, pair.prompt, {"system": two[0]}).removeprefix(tokenizer.bos_token or "")
    text = (tokenizer.bos_token or "") + text
    assert continue_prompts(model, tokenizer, [text], max_new_tokens=10)[0].startswith(pair.positive)
