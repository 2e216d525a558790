"""A tokenizer's own markers: which are found, how they are spelled, and where the answer is in whole conversations."""

import copy
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import austeer
from austeer.demo.demo import load_data
from austeer.steering.markers import Automaton
from scripted import logits_by_formula, scripted_logits

#: As Qwen 3 writes conversations; without thoughts it opens and closes them itself.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if thinking is defined and thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
    "{# <tool_call> </tool_call> #}"
)
#: As DeepSeek-R1 does, which opens the thoughts for the model.
OPENED = QWEN.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")
#: As gpt-oss does.
CHANNELS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ADDED = {
    QWEN: ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    OPENED: ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    CHANNELS: ["<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|call|>", "<|constrain|>"],
}
TALK = [
    {"role": "user", "content": "Say </think> or <tool_call>, if you like."},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "And now?"},
]


@pytest.fixture
def tokenizer_with(demo):
    """Makes the demo's tokenizer write by another template; with the template's markers as tokens, or as text."""

    def make(template, added=True):
        tokenizer = copy.deepcopy(demo[1])
        tokenizer.chat_template = template
        if added:
            tokenizer.add_tokens(ADDED[template], special_tokens=True)
        return tokenizer

    return make


def answered(tokenizer, scope, prompt, text):
    """The part of a generated text that is in the answer, "~" wherever it breaks off."""
    automaton = Automaton(scope)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    inside = automaton.read([*before, *tokens])[len(before) :]
    pieces = [tokenizer.decode([token]) if keep else "~" for token, keep in zip(tokens, inside)]
    return "".join(p for i, p in enumerate(pieces) if p != "~" or i == 0 or pieces[i - 1] != "~")


def prompt_of(tokenizer, **options):
    return tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **options)


CASES = {
    "thoughts of the model's own": (QWEN, {}, "<think>\nHm.</think>\n\nYes.", "~</think>\n\nYes."),
    "no thoughts": (QWEN, {"thinking": False}, "Yes.", "Yes."),
    "thoughts left out by the model": (QWEN, {}, "Yes.", "Yes."),
    "thoughts opened by the template": (OPENED, {}, "Hm.</think>Yes.", "~</think>Yes."),
    "calls": (QWEN, {}, 'So <tool_call>\n{"a": "</think>"}\n</tool_call>\nGo', "So ~</tool_call>\nGo"),
    "channels": (
        CHANNELS,
        {},
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "~<|message|>Yes.",
    ),
    "a format in the final channel": (
        CHANNELS,
        {},
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}",
        "~<|message|>{}",
    ),
    "a call in a channel": (CHANNELS, {}, "<|channel|>commentary to=f<|message|>{}<|call|>", "~"),
}


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_conversations(tokenizer_with, case, added):
    """What the user says of markers, and earlier turns, do not count."""
    template, options, text, expected = CASES[case]
    tokenizer = tokenizer_with(template, added)
    found = answered(tokenizer, austeer.answer_scope(tokenizer), prompt_of(tokenizer, **options), text)
    if added:
        assert found.replace("> ", ">") == expected
    else:  # of a marker in several tokens the first ones of what begins a pause are in the answer, the last is not
        last = expected.rpartition("~")[2].rpartition(">")[2]
        assert found.endswith(last) and found.count("~") == expected.count("~")


def test_a_tokenizer_without_markers_of_its_own(demo):
    scope = austeer.answer_scope(demo[1])
    assert (scope.start, scope.pauses, str(scope)) == ((), (), "answer")
    assert scope.turn[0] == tuple(demo[1]("<|im_start|>assistant", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("around", ["{}", " {} ", "x{}y", "x\n{}\n\n", ".{}{{", "\n\n{} <"])
def test_a_marker_is_found_as_it_is_written_in_a_text(demo, around):
    scope = austeer.answer_scope(demo[1], start="</think>", pauses=[("<tool_call>", "</tool_call>")])
    text = "A" + around.format("</think>") + "B" + around.format("<tool_call>") + "C" + around.format("</tool_call>")
    found = answered(demo[1], scope, "", text + "D")
    assert found.startswith("~") and found.count("~") == 2 and found.endswith("D") and "B" in found and "C" not in found


#: What a model may write right before a marker, or right after it.
AROUND = (
    "",
    *"\"'`.,;:!?()[]{}<>|*#_-=/\\~&%@+",
    "```",
    "**",
    '("',
    '")',
    "“",
    "”",
    "...",
    ">>",
    "<<",
    ". ",
    " (",
    "\n\t",
)


@pytest.fixture(scope="module")
def with_blanks():
    """A tokenizer that writes blanks as a part of words, at a text's start too, and made tokens of much punctuation."""
    words = ["think", "tool_call", "a", "Answer", "so"]
    pieces = [
        before + mark + after for before in AROUND for after in AROUND for mark in ("<", "</", ">", "[", "]", ":")
    ]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], show_progress=False)
    inner.train_from_iterator([f"{word} {piece}{word}{piece}" for word in words for piece in pieces], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("marker", ["</think>", "<tool_call>", "[", "]", "Answer:"])
@pytest.mark.parametrize("which", ["demo", "with blanks"])
def test_a_marker_is_found_whatever_stands_around_it(demo, with_blanks, which, marker):
    """From the token on that holds the marker's last character, as the tokenizer's offsets tell it."""
    tokenizer = demo[1] if which == "demo" else with_blanks
    automaton = Automaton(austeer.answer_scope(tokenizer, start=marker, pauses=()))
    missed = []
    for before in AROUND:
        for after in AROUND:
            text = f"so{before}{marker}{after}so"
            if marker in text.replace(marker, "", 1) or (before == "" and marker[0].isalnum()):
                continue
            given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            last = len("so" + before + marker) - 1
            expected = [end > last for _, end in given["offset_mapping"]]
            if automaton.read(given["input_ids"]) != expected:
                missed.append(text)
    assert not missed


def test_pauses_that_open_and_close_in_one_token(demo):
    scope = austeer.answer_scope(demo[1], pauses=[("<think>", "</think>"), ("[", "]"), ("(", ")")])
    assert answered(demo[1], scope, "", "a<think></think>b") == "a<think></think>b"
    assert answered(demo[1], scope, "", "a []b") == "a []b"
    assert answered(demo[1], scope, "", "a ([b)c]d") == "a~]d", "a token of two openings is the first that was given"


def test_a_token_for_what_is_unknown_is_no_marker():
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "so": 1, "<think>": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    tokenizer.chat_template = "{# <tool_call> </tool_call> #}"
    assert (scope := austeer.answer_scope(tokenizer)).pauses == () and scope.start == ()


def test_given_markers_take_the_place_of_known_ones(tokenizer_with):
    tokenizer = tokenizer_with(QWEN)
    known, none = austeer.answer_scope(tokenizer), austeer.answer_scope(tokenizer, pauses=())
    assert len(known.pauses) == 2 and not known.start and not none.pauses
    given = austeer.answer_scope(tokenizer, start=["</think>", "Answer:"], pauses=[("[", "]")])
    assert str(given) == "answer, from '</think>' or 'Answer:' on, but not between '[' and ']'"
    assert answered(tokenizer, given, "", "a</think>b[c]d") == "~</think>b~]d"
    assert answered(tokenizer, given, "", "a. Answer: b") == "~: b"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"start": ""}, "''"),
        ({"start": [3]}, "3"),
        ({"pauses": ["ab"]}, "'ab'"),
        ({"pauses": [("a",)]}, r"\('a',\)"),
        ({"pauses": [("a", None)]}, "None"),
    ],
)
def test_what_is_no_marker(demo, arguments, named):
    with pytest.raises(austeer.SteeringError, match=f"found {named}"):
        austeer.answer_scope(demo[1], **arguments)


def test_smollm2_is_steered_in_its_answer(demo, demo_momentum):
    model, tokenizer = demo
    plan = demo_momentum.select("attention", k=10, operation="shift")
    scope = austeer.answer_scope(tokenizer, start="</think>", pauses=[("<tool_call>", "</tool_call>")])
    data = load_data()
    prompt = tokenizer(data.tuning[0].prompt, return_tensors="pt")
    text = 'I think.\n</think>\n\nIt was <tool_call>\n{"name": "f"}\n</tool_call>\n\ngood.'
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    inside = Automaton(scope).read([*prompt["input_ids"][0].tolist(), *tokens])
    written = [tokenizer.decode([t]) if keep else "|" for t, keep in zip(tokens, inside[-len(tokens) :])]
    assert re.sub(r"\|+", "|", "".join(written)) == "|>\n\nIt was <tool_call|>\n\ngood."
    where = torch.tensor([[False] * prompt["input_ids"].shape[1] + inside[-len(tokens) :]])
    expected = logits_by_formula(model, prompt, [tokens], plan, 8.0, where)
    with austeer.steer(model, plan, 8.0, scope=scope) as steering:
        found = scripted_logits(model, prompt, [tokens], pad_token_id=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert {row.tokens for row in steering.report()} == {int(where[:, :-1].sum())}
