"""One contrastive pair: its fields, what makes it valid, and its prompt in a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from ..errors import PairsError

FIELDS = ("prompt", "positive", "negative")

#: A field that a row of pairs may have besides.
LEAD = "lead"


@dataclass(frozen=True)
class Pair:
    """A prompt with a desired and an undesired continuation.

    Attributes:
        lead: the end of the prompt that begins the answer, such as "Answer: (" before a letter: in a chat template it
            is in the model's turn (:func:`prompt_as_chat`). Part of ``prompt``.
    """

    prompt: str
    positive: str
    negative: str
    lead: str = ""


def pair_of(row: Mapping[str, Any], names: Mapping[str, str], where: str, blank: bool = False) -> Pair:
    """The pair that a row holds.

    Args:
        row: field name -> value.
        names: for each of ``FIELDS`` its name in the row. Where they have names of their own, a field ``lead`` is not
            a pair's, and is left alone.
        where: the row's place, for messages. blank: whether sides may be blank.

    Raises:
        PairsError: a field is missing, empty or no text; or a lead that the prompt does not end with.
    """
    values = {}
    for field, name in names.items():
        value = row.get(name)
        if value is None:
            raise PairsError(
                f"{where}: field {name!r} is missing; found {', '.join(map(str, row)) or 'no field'} "
                f"(name the {field} field with {field}=... or --{field}-field)"
            )
        if not isinstance(value, str):
            raise PairsError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
        if not value.strip() and not (blank and field != "prompt"):
            raise PairsError(f"{where}: field {name!r} is empty, expected text")
        if has_lone_surrogate(value):
            raise PairsError(f"{where}: field {name!r} has half of a surrogate pair, expected text that UTF-8 can hold")
        values[field] = value
    for name in optional_fields(names):
        lead, prompt = row.get(name), values["prompt"]
        if lead is not None and not (isinstance(lead, str) and prompt.endswith(lead)):
            raise PairsError(
                f"{where}: found {lead!r:.40} in the field {name!r}, expected that end of the prompt which begins the "
                f"answer, of {prompt[-40:]!r}; correct it, or give a field of another meaning another name"
            )
        values[name] = lead or ""
    return Pair(**values)


def optional_fields(names: Mapping[str, str]) -> tuple[str, ...]:
    """What rows whose fields have these names may have besides: a lead, in pairs' own form only."""
    return (LEAD,) if all(names[field] == field for field in FIELDS) else ()


def check_enough(pairs: int, identical: int, source: str) -> None:
    """Raises PairsError if there are fewer than 2 pairs, or if in all of them both sides are the same text."""
    if pairs < 2:
        raise PairsError(f"{source}: found {pairs} pair{'' if pairs == 1 else 's'}, expected at least 2")
    if identical == pairs:
        raise PairsError(f"{source}: in all {pairs} pairs positive and negative are equal; nothing to contrast")


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a character, as JSON and a command line can; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_untemplated(chat_template: bool, source: str) -> None:
    """Raises PairsError if the prompts hold a chat template already."""
    if chat_template:
        raise PairsError(f"{source}: these pairs have been put through a chat template already")


def render_chat(tokenizer, prompt: str, system: str | None = None) -> str:
    """One user's message in the tokenizer's chat template, with the assistant's turn opened."""
    if not getattr(tokenizer, "chat_template", None):
        raise PairsError(
            "the tokenizer has no chat template; leave the chat option out, or use an instruction-tuned model's"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise PairsError(f"the tokenizer's chat template does not take these messages: {error}") from error


def prompt_as_chat(tokenizer, prompt: str, lead: str, system: str | None = None) -> tuple[str, str]:
    """A prompt and its lead in the tokenizer's chat template.

    The prompt becomes a user's message, but for its lead, which begins the model's own turn without the blank or line
    breaks that set it off from a plain prompt.

    Raises:
        PairsError: as :func:`render_chat`.
    """
    asked, lead = render_chat(tokenizer, prompt.removesuffix(lead), system), lead.lstrip()
    return asked + lead, lead


def pair_as_chat(tokenizer, pair: Pair, system: str | None = None) -> Pair:
    """A pair in the tokenizer's chat template (:func:`prompt_as_chat`)."""
    prompt, lead = prompt_as_chat(tokenizer, pair.prompt, pair.lead, system)
    return replace(pair, prompt=prompt, lead=lead)
