"""Where an instruction goes: a system message, the user's text, or plain text before the prompt."""

import copy

import pytest

from austeer import PairsError
from austeer.making.instruction_forms import drops_blank, instructed, instruction_form, join

WORDS = ("one", "two")
TWO = ("Answer kindly.", "Answer rudely.")
BODY = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
FORMS = {
    "system": BODY,
    "refused": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BODY,
    "ignored": BODY.replace(" in messages", " in messages if m['role'] == 'user'"),
}


@pytest.fixture
def with_template(demo):
    def build(template):
        tokenizer = copy.deepcopy(demo[1])
        tokenizer.chat_template = template
        return tokenizer

    return build


def written(tokenizer, instruction="Answer kindly."):
    form = instruction_form(tokenizer, TWO)
    return form, *instructed(tokenizer, form, instruction, ["Hello?"])


@pytest.mark.parametrize(
    "name, form, text",
    [
        ("system", "system", "<system>Answer kindly.<user>Hello?<assistant>"),
        ("refused", "user", "<user>Answer kindly.\n\nHello?<assistant>"),
        ("ignored", "user", "<user>Answer kindly.\n\nHello?<assistant>"),
    ],
)
def test_templates_with_and_without_a_system_message(with_template, name, form, text):
    assert written(with_template(FORMS[name])) == (form, text)


def test_no_template_gives_a_plain_prefix(with_template):
    tokenizer = with_template(None)
    assert written(tokenizer) == ("plain", "Answer kindly.\n\nHello?")
    with pytest.raises(PairsError, match=r"tokenizer.*chat template"):
        instruction_form(tokenizer, TWO, chat=True)


def test_a_template_may_be_left_aside(demo):
    assert instruction_form(demo[1], TWO) == "system"
    assert instruction_form(demo[1], TWO, chat=False) == "plain"


@pytest.mark.parametrize(
    "two, found",
    [
        (("Answer kindly.", " "), "instruction: .*' '"),
        (("", "Answer rudely."), "instruction: .*''"),
        (("Answer kindly.\udc80", "b"), r"instruction: .*\\udc80"),
        (("Answer kindly.", "Answer kindly. "), "instructions: .*'Answer kindly.'.*both"),
    ],
)
def test_instructions_that_cannot_be(demo, two, found):
    with pytest.raises(PairsError, match=found):
        instruction_form(demo[1], two)


def test_a_blank_that_decoding_loses_is_put_back(demo):
    assert not drops_blank(demo[1])

    class Sentence:
        """Words are pieces that begin with a blank, which decoding takes from the first one."""

        eos_token_id, eos_token = 99, "</s>"

        def __call__(self, texts, **options):
            return {"input_ids": [[1 + WORDS.index(w) for w in text.split()] for text in texts]}

        def decode(self, ids):
            return " ".join(WORDS[i - 1] for i in ids)

    assert drops_blank(Sentence())
    assert join("The film was", "good") == " good"
    assert join("The film was", ", in the end,") == ", in the end,"
    assert join("The film was ", "good") == "good"
