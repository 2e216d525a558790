"""One contrastive pair: its fields, what makes it valid, and its prompt in a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PairsError, count_of
from .chat import prompt_as_chat

FIELDS = ("prompt", "positive", "negative")

#: A field that a row of pairs may have besides.
LEAD = "lead"


@dataclass(frozen=True)
class Pair:
    """A prompt with a desired and an undesired continuation.

    Attributes:
        lead: the end of the prompt that begins the answer, such as "Answer: (" before a letter: in a chat template it
            is in the model's turn (:func:`austeer.pairs.chat.prompt_as_chat`). Part of ``prompt``.
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
        where: the row's place, for messages. blank: whether sides may be blank, as a prompt
            always may.

    Raises:
        PairsError: a field is missing, null, no text or an empty side; or a lead that the prompt does not end with.
    """
    values = {}
    for field, name in names.items():
        value = row.get(name)
        if name not in row:
            raise PairsError(
                f"{where}: field {name!r} is missing; found {', '.join(map(str, row)) or 'no field'} "
                f"(name the {field} field with {field}=... or --{field}-field)"
            )
        if value is None:
            raise PairsError(f"{where}: field {name!r} is null, expected text; fill it, or leave the row out")
        if not isinstance(value, str):
            raise PairsError(f"{where}: field {name!r} is {type(value).__name__}, expected text")
        if field != "prompt" and not value.strip() and not blank:
            raise PairsError(f"{where}: field {name!r} is empty, expected text; fill it, or leave the row out")
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
        raise PairsError(f"{source}: found {count_of(pairs, 'pair')}, expected at least 2")
    if identical == pairs:
        raise PairsError(f"{source}: in all {pairs} pairs positive and negative are equal; nothing to contrast")


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a character, as JSON and a command line can; no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def pair_as_chat(tokenizer, pair: Pair, options: Mapping[str, Any] | None = None) -> Pair:
    """A pair in the tokenizer's chat template (:func:`austeer.pairs.chat.prompt_as_chat`)."""
    prompt, lead = prompt_as_chat(tokenizer, pair.prompt, pair.lead, options)
    return replace(pair, prompt=prompt, lead=lead)
