"""Chat templates and their options: what is written, what a template would ignore, and how a form is kept and said."""

import copy
import shlex

import pytest

from austeer import Pairs, PairsError
from austeer.cli.common import chat_form as form_of_options
from austeer.pairs.chat import chat_arguments, check_chat, check_chat_form, describe_form, render_chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = CHATML.replace(
    "assistant\n{% endif", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif"
)
NO_TURN = CHATML[: CHATML.index("{% if add")]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DEAF = CHATML.replace("messages %}", "messages if m['role'] != 'system' %}")
TRIPLES = [("a", " b", " c"), ("d", " e", " f")]


@pytest.fixture
def tokenizer(demo):
    return copy.deepcopy(demo[1])


def test_options_reach_the_template_and_are_kept_with_the_pairs(tokenizer):
    tokenizer.chat_template = THINK
    plain, quiet = (Pairs.of(TRIPLES).with_chat_template(tokenizer, **o) for o in ({}, {"enable_thinking": False}))
    assert quiet[0].prompt == plain[0].prompt + "<think></think>"
    assert plain.chat_template is True and quiet.chat_template == {"enable_thinking": False}
    asked = Pairs.of(TRIPLES).with_chat_template(tokenizer, system="Be brief.", enable_thinking=False)
    assert asked[0].prompt == "<|im_start|>system\nBe brief.<|im_end|>\n" + quiet[0].prompt


@pytest.mark.parametrize(
    ("template", "options", "found"),
    [
        (CHATML, {"enable_thinking": False}, "'enable_thinking'.*does not read"),
        (THINK, {"messages": []}, "'messages'.*does not read"),
        (NO_SYSTEM, {"system": "Be brief."}, "no system"),
        (DEAF, {"system": "Be brief."}, "system: .*'Be brief.'"),
        (CHATML, {"system": 3}, "system: .*3"),
        (THINK, {"enable_thinking": {1}}, "JSON"),
    ],
)
def test_what_a_template_would_ignore_is_refused(tokenizer, template, options, found):
    tokenizer.chat_template = template
    with pytest.raises(PairsError, match=found):
        Pairs.of(TRIPLES).with_chat_template(tokenizer, **options)


def test_a_template_that_opens_no_turn_is_asked_where_an_answer_stands(tokenizer):
    tokenizer.chat_template = NO_TURN
    assert render_chat(tokenizer, "Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    tokenizer.chat_template += "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    assert render_chat(tokenizer, "Hi") == "[INST] Hi [/INST]"


def test_the_command_line_says_the_same(tokenizer):
    given = ["enable_thinking=False", "effort=low", "n=3", 'tools=["a b"]']
    form = form_of_options(False, given, "It's `brief`.")
    assert form == {"system": "It's `brief`.", "enable_thinking": False, "effort": "low", "n": 3, "tools": ["a b"]}
    words = shlex.split(chat_arguments(form))
    assert words[0] == "--chat" and "`" not in chat_arguments(form)
    assert form_of_options(True, words[2::2], None) == form
    assert form_of_options(True, None, None) is True and form_of_options(False, [], None) is False
    assert chat_arguments(True) == " --chat" and chat_arguments(False) == ""
    assert describe_form(False) != describe_form(True) != describe_form(form) and "effort" in describe_form(form)


@pytest.mark.parametrize("form", [{}, 1, None, {1: 2}, {"a": float("nan")}, "chat"])
def test_what_is_no_form(form):
    with pytest.raises(ValueError):
        check_chat_form(form)


def test_no_template_at_all(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(PairsError, match="no chat template"):
        check_chat(tokenizer, {})
