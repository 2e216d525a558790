"""The markers of an answer as a tokenizer writes them: strings given, or what its chat template is known to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import PairsError, SteeringError
from ..pairs.chat import render_chat
from .markers import Answer
from .spellings import Spelling, apart, encoded

#: What begins an answer where a model writes its thoughts, its calls and its answer into channels (gpt-oss); the second
#: where a format is asked for, of which templates do not tell.
STARTS = ("<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>")

#: What begins thoughts and calls of tools in the families that mark them, and what ends them.
PAUSES = (
    ("<think>", "</think>"),  # Qwen 3, DeepSeek-R1, GLM, SmolLM3, Hunyuan
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<tool_call>", "</tool_call>"),  # Hermes, Qwen, GLM
    ("<seed:tool_call>", "</seed:tool_call>"),
    ("<|START_ACTION|>", "<|END_ACTION|>"),
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # DeepSeek
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),  # Kimi
    ("<|python_tag|>", "<|eom_id|>"),  # Llama 3
)


def answer_scope(
    tokenizer: Any,
    start: str | Sequence[str] | None = None,
    pauses: Sequence[tuple[str, str]] | None = None,
) -> Answer:
    """The scope of a model's answer: without its thoughts and its calls of tools.

    Example:
        >>> scope = austeer.answer_scope(tokenizer, pauses=[("<think>", "</think>"), ("<tool_call>", "</tool_call>")])
        >>> print(scope)
        answer, but not between '<think>' and '</think>' or '<tool_call>' and '</tool_call>'
        >>> with austeer.steer(model, plan, alpha=8, scope=scope) as steering:
        ...     there = model.generate(**tokenizer("The soup was", return_tensors="pt"), max_new_tokens=8)

    What is marked is read in the prompt, too: a chat template that opens the thoughts itself, or closes them where
    thinking is off, counts as the model's own. A turn of the model, as the chat template opens it, begins anew.

    Args:
        tokenizer: the model's.
        start: what the answer begins after, one string or several of which any does. By default gpt-oss's final
            channel where the tokenizer has it, and otherwise nothing: the answer is all that is generated but pauses.
        pauses: what steering pauses between: (opening, closing) strings. By default the markers of thoughts and calls
            that the tokenizer has as tokens, or that stand in its chat template; () for none.

    Raises:
        SteeringError: a marker that is no text, or of which the tokenizer makes no token.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    starts = [start] if isinstance(start, str) else start
    if starts is None:
        starts = STARTS if any(_knows(tokenizer, template, text) for text in STARTS) else ()
    if pauses is None:
        pauses = [pause for pause in PAUSES if all(_knows(tokenizer, template, text) for text in pause)]
    pairs = [_pair(pause) for pause in pauses]
    begin, between, turns = _spelled(tokenizer, starts, pairs)
    told = [f"from {' or '.join(map(repr, starts))} on"] if starts else []
    told += ["but not between " + " or ".join(f"{opens!r} and {closes!r}" for opens, closes in pairs)] if pairs else []
    return Answer(begin, between, turns, ", ".join(told))


def _spelled(tokenizer: Any, starts: Sequence[str], pairs: Sequence[tuple[str, str]]):
    """The start, pauses and turn of an :class:`Answer` in tokens."""
    spelling = Spelling(tokenizer)
    for text in (*starts, *(text for pair in pairs for text in pair)):
        if not isinstance(text, str) or not text:
            raise SteeringError(f"answer: found {text!r:.80} as a marker, expected a text")
    begin = tuple(marker for text in starts for marker in spelling.of(text))
    opened, closed = [], []
    for opens, closes in pairs:
        both = spelling.of(opens, closes)
        edge = spelling.straddling(opens, closes)  # as nothing else could close what such a token opens
        opened.append(tuple(marker for marker in both if marker[-1] not in edge))
        closed.append(spelling.of(closes, opens))
    turn = _turn(tokenizer, [*starts, *(text for pair in pairs for text in pair)])
    turns, begin, *opened = apart(spelling.of(turn) if turn else (), begin, *opened)
    return begin, tuple((opens, apart(turns, closes)[1]) for opens, closes in zip(opened, closed)), turns


def _pair(pause: Any) -> tuple[str, str]:
    if isinstance(pause, str) or not isinstance(pause, Sequence) or len(pause) != 2:
        raise SteeringError(f"pauses: found {pause!r:.80}, expected pairs of strings (opening, closing)")
    return pause[0], pause[1]


def _knows(tokenizer: Any, template: str, marker: str) -> bool:
    """Whether a marker is used with this tokenizer: it is one token of its own, or the template writes it."""
    ids = encoded(tokenizer, marker)
    return getattr(tokenizer, "unk_token_id", None) not in ids and (marker in template or len(ids) == 1)


def _turn(tokenizer: Any, markers: Sequence[str]) -> str:
    """What the chat template opens the model's turn with, up to the first of the markers; empty if it does not."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        opened = render_chat(tokenizer, "text")
        closed = tokenizer.apply_chat_template(
            [{"role": "user", "content": "text"}], tokenize=False, add_generation_prompt=False
        )
    except (PairsError, TypeError, ValueError):
        return ""
    if not opened.startswith(closed):
        return ""
    turn = opened[len(closed) :]
    ends = [turn.index(marker) for marker in markers if marker in turn]
    return turn[: min(ends, default=len(turn))].strip()
