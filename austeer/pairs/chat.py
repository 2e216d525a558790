"""Prompts in a tokenizer's chat template, and the options that it is given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from ..errors import PairsError

#: How prompts reach a model: as they are (False), through the chat template (True), or through it with these options:
#: ``system``, a system message before the prompt, and what ``apply_chat_template`` hands on to the template, such as
#: ``enable_thinking`` or ``tools``. Never an empty dictionary.
ChatForm = bool | dict[str, Any]

#: Variables of a template that the messages here decide.
OWN = ("messages", "add_generation_prompt")

_ANSWER = "THE-ANSWER-OF-THE-MODEL"


def chat_form(options: Mapping[str, Any]) -> ChatForm:
    """The form of prompts that went through a chat template with these options."""
    return dict(options) or True


def options_of(form: ChatForm) -> dict[str, Any]:
    return dict(form) if isinstance(form, Mapping) else {}


def check_chat_form(form: Any) -> None:
    """Raises ValueError unless it is a :data:`ChatForm` that JSON can hold."""
    if isinstance(form, bool):
        return
    if not isinstance(form, dict) or not form or not all(isinstance(name, str) for name in form):
        raise ValueError(f"chat_template: found {type(form).__name__}, expected bool, or options by name")
    json.dumps(form, allow_nan=False)


def describe_form(form: ChatForm) -> str:
    """In words, for messages: ``through a chat template with enable_thinking=false``."""
    if not form:
        return "without a chat template"
    values = (f"{name}={json.dumps(value, ensure_ascii=False):.60}" for name, value in options_of(form).items())
    return " with ".join(["through a chat template", *filter(None, [", ".join(values)])])


def chat_arguments(form: ChatForm) -> str:
    """The same on a command line, with a blank before it; nothing for prompts as they are."""
    # A backtick would end the code of a model card that this stands in.
    values = (f"{name}={json.dumps(value)}".replace("`", "\\u0060") for name, value in options_of(form).items())
    return "".join([" --chat" if form else "", *(f" --chat-option {shlex.quote(value)}" for value in values)])


def check_untemplated(form: ChatForm, source: str) -> None:
    """Raises PairsError if the prompts hold a chat template already."""
    if form:
        raise PairsError(f"{source}: these pairs have been put through a chat template already")


def check_chat(tokenizer, options: Mapping[str, Any]) -> None:
    """Raises PairsError: no chat template, one that does not take these options, or one that would ignore one."""
    if getattr(tokenizer, "chat_template", None):
        template = _template(tokenizer, options)
        for name in options:
            if name in OWN or not (name == "system" or re.search(rf"\b{re.escape(name)}\b", template)):
                raise PairsError(
                    f"chat option {name!r}: the tokenizer's chat template does not read it; expected a variable of it "
                    "(print(tokenizer.chat_template) shows them), or system"
                )
    system = options.get("system", "")
    if not isinstance(system, str) or system.strip() not in render_chat(tokenizer, "text", options):
        raise PairsError(
            f"system: found {system!r:.60}, which the tokenizer's chat template does not write; expected text, and a "
            "template that takes system messages. Put it before the prompts"
        )
    try:
        check_chat_form(chat_form(options))
    except (TypeError, ValueError) as error:
        raise PairsError(f"chat options: found what JSON cannot hold ({error}); expected plain values") from error


def render_chat(tokenizer, prompt: str, options: Mapping[str, Any] | None = None) -> str:
    """One user's message in the tokenizer's chat template, with the assistant's turn opened.

    Args:
        options: as in :data:`ChatForm`.

    Raises:
        PairsError: no chat template, or one that does not take these messages or options.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PairsError(
            "the tokenizer has no chat template; leave the chat option out, or use an instruction-tuned model's"
        )
    variables = dict(options or {})
    system = variables.pop("system", None)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        opens = OWN[1] in _template(tokenizer, variables)
        if not opens:  # the turn is opened as the template itself writes it before an answer
            answered = [*messages, {"role": "assistant", "content": _ANSWER}]
            head, found, _ = tokenizer.apply_chat_template(answered, tokenize=False, **variables).rpartition(_ANSWER)
            if found:
                return head.rstrip(" ")
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens, **variables)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise PairsError(f"the tokenizer's chat template does not take these messages or options: {error}") from error


def prompt_as_chat(tokenizer, prompt: str, lead: str, options: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """A prompt and its lead in the tokenizer's chat template.

    The prompt becomes a user's message, but for its lead, which begins the model's own turn without the blank or line
    breaks that set it off from a plain prompt.

    Raises:
        PairsError: as :func:`render_chat`.
    """
    asked, lead = render_chat(tokenizer, prompt.removesuffix(lead), options), lead.lstrip()
    return asked + lead, lead


def _template(tokenizer, options: Mapping[str, Any]) -> str:
    """The template's text; of several, the one that these options choose."""
    return str(tokenizer.get_chat_template(tools=options.get("tools")))
