"""Numeric answers: the number that a text gives, and whether it is the right one.

What counts is the last number of a text, up to where the answer ends. The rules, each of which has a test:

- The answer ends with the line in which a number follows ``####`` or "answer is" (the number is complete once that line
  is), or where the model begins a question of its own ("Question:" or "Q:" at the beginning of a line).
- A number is digits, which may have commas between thousands (1,234), a decimal point (0.5, .5) and a sign. A full stop
  behind it, a unit and a percent sign are no part of it: "12." is 12, "50%" is 50.
- A sign belongs to the number if it stands right before it, or before its currency sign, and not behind a digit, letter
  or bracket: "-3", "-$5" and "$-5" are negative; "5-3" and "10 - 3" are two numbers, both positive.
- Nothing is calculated: "1/2" is the numbers 1 and 2, "2e3" is 2 and 3, "10:30" is 10 and 30.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext

from torch import nn

from ..errors import TaskError
from ..forward.generation import continue_prompts
from ..models.structure import evaluating
from ..steering.steering import Steering
from .scoring import Names
from .task import Task

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.)\]])\.[0-9]+"
_NUMBER = re.compile(rf"((?<![\w.)\]])[-\u2212]?[$\u00a3\u20ac]?[-\u2212]?)?({_DIGITS})")
_END = re.compile(
    r"(?:####|[Aa]nswer is)[^\n0-9]*[0-9][^\n]*(?=\n)"  # the whole line, and known to be whole
    r"|(?=\n[ \t]*(?:Question|Q):)"
)

#: How far a number may be from the right one, as in the public evaluations of the paper's tasks.
TOLERANCE = 1e-3


def last_number(text: str) -> float | None:
    """The number that a text gives as its answer, by the rules above; None if it gives none."""
    found = list(_NUMBER.finditer(text[: answer_end(text)]))
    if not found:
        return None
    sign, digits = found[-1].groups()
    number = float(digits.replace(",", ""))
    negative = any(mark in (sign or "") for mark in "-\u2212")
    return (-number if negative else number) if math.isfinite(number) else None


def answer_end(text: str) -> int | None:
    """Where the answer ends within a text, in characters; None if more text may still belong to it."""
    found = _END.search(text)
    return found.end() if found else None


def is_answered(text: str) -> bool:
    """Whether no text that may follow can change :func:`last_number`."""
    return answer_end(text) is not None


def equal_numbers(found: float | None, wanted: float, tolerance: float = TOLERANCE) -> bool:
    """Whether a number is the right one, within an absolute tolerance; None never is."""
    return found is not None and math.isclose(found, wanted, rel_tol=1e-9, abs_tol=tolerance)


def parse_number(text: str) -> float | None:
    """The number that a text is as a whole, as a right answer must be; None if it is anything else."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))", "", text.strip())
    if not re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", text):
        return None
    return float(text) if math.isfinite(float(text)) else None


def numeric_answers(
    model: nn.Module,
    tokenizer,
    task: Task,
    steering: Steering | None = None,
    names: Names = (None,),
    *,
    max_new_tokens: int = 128,
    batch_rows: int = 32,
    on_items: Callable[[int], None] = lambda items: None,
) -> list[list[str]]:
    """What the model writes, greedily, for each item under each steering: [names][items].

    All steerings of an item are rows of one batch. A row stops where :func:`is_answered` says that it may.

    Args:
        task: of kind "numeric". steering, names: as of :func:`austeer.tasks.option_scores`.
        batch_rows: rows of a batch; at least one item under all steerings. on_items: told the items of each batch.

    Raises:
        TaskError: a task with options.
    """
    if task.kind != "numeric":
        raise TaskError(f"{task.name}: found a task of kind {task.kind!r}, expected numeric; see option_scores")
    texts = [[""] * len(task) for _ in names]
    order = sorted(range(len(task)), key=lambda i: len(task[i].prompt))  # of like lengths, so there is little padding
    step = max(1, batch_rows // len(names))
    for first in range(0, len(order), step):
        part = order[first : first + step]
        rows = nullcontext() if steering is None else steering.rows([name for name in names for _ in part])
        with evaluating(model), rows:
            written = continue_prompts(
                model,
                tokenizer,
                [task[i].prompt for i in part] * len(names),
                max_new_tokens=max_new_tokens,
                special=not task.chat_template,
                stop=is_answered,
            )
        for number, text in enumerate(written):
            texts[number // len(part)][part[number % len(part)]] = text
        on_items(len(part))
    return texts
