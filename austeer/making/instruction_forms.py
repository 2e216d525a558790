"""How an instruction is put to a model: as a system message, before the user's text, or before plain text."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import PairsError
from ..forward.tokens import encode
from ..pairs.chat import render_chat
from ..pairs.pair import has_lone_surrogate


def check_instructions(instructions: Sequence[str]) -> None:
    """Raises PairsError if an instruction is empty or no text, or if two are equal."""
    for instruction in instructions:
        if not instruction.strip() or has_lone_surrogate(instruction):
            raise PairsError(f"instruction: found {instruction!r}, expected text that tells the model how to answer")
    if len({instruction.strip() for instruction in instructions}) < len(instructions):
        raise PairsError(f"instructions: found {instructions[0]!r} for both sides, expected two different ones")


def instruction_form(tokenizer, instructions: Sequence[str], chat: bool | None = None) -> str:
    """Where these instructions go: "system", "user" (before the user's text) or "plain" (before a plain prompt).

    Args:
        chat: whether to use the tokenizer's chat template; by default if it has one.

    Raises:
        PairsError: an empty instruction, two equal ones, or no chat template where one is wanted.
    """
    check_instructions(instructions)
    if chat is False or (chat is None and not getattr(tokenizer, "chat_template", None)):
        return "plain"
    render_chat(tokenizer, "text")
    try:
        heard = all(part.strip() in render_chat(tokenizer, "text", {"system": part}) for part in instructions)
    except PairsError:  # no system messages in this template
        return "user"
    return "system" if heard else "user"


def instructed(tokenizer, form: str, instruction: str, prompts: Sequence[str]) -> list[str]:
    """What a model reads to answer prompts under an instruction; in the chat template unless the form is "plain"."""
    if form == "system":
        return [render_chat(tokenizer, prompt, {"system": instruction}) for prompt in prompts]
    texts = [f"{instruction.strip()}\n\n{prompt}" for prompt in prompts]
    return texts if form == "plain" else [render_chat(tokenizer, text) for text in texts]


def drops_blank(tokenizer) -> bool:
    """Whether decoding a continuation loses the blank that it begins with, as tokenizers of SentencePiece do."""
    ids = encode(tokenizer, ["one two"], add_special_tokens=False)[0]
    before = encode(tokenizer, ["one"], add_special_tokens=False)[0]
    return ids[: len(before)] == before and not tokenizer.decode(ids[len(before) :])[:1].isspace()


def join(prompt: str, continuation: str) -> str:
    """A continuation whose first blank was lost, with it again where it goes on behind a word or mark with a word."""
    return f" {continuation}" if continuation[:1].isalnum() and not prompt[-1].isspace() else continuation
