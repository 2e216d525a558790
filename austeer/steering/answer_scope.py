"""The markers of an answer as a tokenizer writes them: strings given, or what its chat template is known to use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import PairsError, SteeringError
from ..pairs.chat import render_chat
from .markers import Answer, Marker

#: What begins an answer where a model writes its thoughts, its calls and its answer into channels (gpt-oss).
STARTS = ("<|channel|>final<|message|>",)

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

#: What may stand around a marker that is no token of its own, and be made one token with its end.
_BEFORE = ("", " ", "\n", ".", ">")
_AFTER = ("", " ", "\n", "\n\n", "{", "<")


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
        starts = [text for text in STARTS if _knows(tokenizer, template, text)]
    if pauses is None:
        pauses = [pause for pause in PAUSES if all(_knows(tokenizer, template, text) for text in pause)]
    pairs = [_pair(pause) for pause in pauses]
    begin = tuple(marker for text in starts for marker in _spellings(tokenizer, text))
    between = tuple((_spellings(tokenizer, opens), _spellings(tokenizer, closes)) for opens, closes in pairs)
    turn = _turn(tokenizer, [*starts, *(text for pair in pairs for text in pair)])
    told = [f"from {' or '.join(map(repr, starts))} on"] if starts else []
    told += ["but not between " + " or ".join(f"{opens!r} and {closes!r}" for opens, closes in pairs)] if pairs else []
    return Answer(begin, between, _spellings(tokenizer, turn) if turn else (), ", ".join(told))


def _pair(pause: Any) -> tuple[str, str]:
    if isinstance(pause, str) or not isinstance(pause, Sequence) or len(pause) != 2:
        raise SteeringError(f"pauses: found {pause!r:.80}, expected pairs of strings (opening, closing)")
    return pause[0], pause[1]


def _knows(tokenizer: Any, template: str, marker: str) -> bool:
    """Whether a marker is used with this tokenizer: it is one token, or the template writes it."""
    return marker in template or len(_encoded(tokenizer, marker)) == 1


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _spellings(tokenizer: Any, text: str) -> tuple[Marker, ...]:
    """The token sequences of a marker: as it stands alone, and as its ends may be one token with what is around it."""
    if not isinstance(text, str) or not text:
        raise SteeringError(f"answer: found {text!r:.80} as a marker, expected a text")
    alone = _encoded(tokenizer, text)
    if not alone:
        raise SteeringError(
            f"answer: found {text!r:.80}, of which the tokenizer makes no token; expected another marker"
        )
    found = [tuple(alone)]
    if len(alone) > 1 and getattr(tokenizer, "is_fast", False):
        for before in _BEFORE:
            for after in _AFTER:
                given = tokenizer(before + text + after, add_special_tokens=False, return_offsets_mapping=True)
                first, stop = len(before), len(before) + len(text)
                placed = zip(given["input_ids"], given["offset_mapping"])
                found.append(tuple(i for i, (begin, end) in placed if end > first and begin < stop))
    return tuple(marker for marker in dict.fromkeys(found) if marker)


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
