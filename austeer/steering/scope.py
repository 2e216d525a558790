"""Which token positions are steered: a scope, and where it begins and ends in a sequence.

Positions are counted in columns of the padded batch, cached tokens included: the first column of a forward pass is the
length of its cache. A range of tokens is counted from each row's own first token, after its padding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor

from ..errors import SteeringError
from .markers import Answer

SCOPES = ("all", "prompt", "generation", "last_prompt_token", "from_last_prompt_token")

#: Those that leave the prompt as it is, which a probe may judge.
JUDGED = ("generation", "answer")

#: A column after every sequence.
END = sys.maxsize // 4


@dataclass(frozen=True)
class Scope:
    """A half-open interval of each row's tokens.

    Attributes:
        name: one of ``SCOPES``, or "range", or "answer".
        start, stop: of a range, in tokens of the row, padding not counted.
        answer: of an answer, its markers; its interval is that of "generation", of which they take tokens away.
    """

    name: str
    start: int = 0
    stop: int = END
    answer: Answer | None = None

    def __str__(self) -> str:
        if self.answer is not None:
            return str(self.answer)
        if self.name != "range":
            return self.name
        return f"tokens {self.start} to {'the end' if self.stop == END else self.stop - 1}"

    def interval(
        self, prompt: int | Tensor, padding: int | Tensor, padding_after: int | Tensor
    ) -> tuple[int | Tensor, int | Tensor]:
        """The first column of the scope and the one after its last.

        Args:
            prompt: the prompt's length in columns, its padding included.
            padding: how many columns of padding stand before each row's prompt, an integer or [batch].
            padding_after: the same after it (0 for left-padded batches).

        Returns:
            two of integers and [batch]; where nothing is an integer tensor nothing becomes one.
        """
        if self.name == "prompt":
            return 0, prompt
        if self.name in ("generation", "answer"):
            return prompt, END
        if self.name == "last_prompt_token":
            end = prompt - padding_after
            return end - 1, end
        if self.name == "from_last_prompt_token":  # what pads a prompt on the right is in it, and no token sees it
            return prompt - padding_after - 1, END
        if self.name == "range":
            return padding + self.start, padding + self.stop
        return 0, END


#: What a scope may be given as.
ScopeLike = str | tuple[int, int | None] | Answer


def parse_scope(scope: ScopeLike) -> Scope:
    """A scope from its name, from (start, stop): tokens start to stop - 1 of each row, or from an answer's markers.

    ``stop`` may be None.

    Raises:
        SteeringError: none of these.
    """
    if isinstance(scope, Answer):
        return Scope("answer", answer=scope)
    if isinstance(scope, str) and scope in SCOPES:
        return Scope(scope)
    expected = (
        f"expected one of {', '.join(SCOPES)}, a half-open range of tokens such as (0, 16) or (16, None), or "
        "austeer.answer_scope(tokenizer)"
    )
    if not isinstance(scope, (tuple, list)) or len(scope) != 2:
        raise SteeringError(f"scope: found {scope!r}, {expected}")
    start, stop = scope
    stop = END if stop is None else stop
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (start, stop)) or not 0 <= start < stop <= END:
        raise SteeringError(f"scope: found {scope!r}, {expected} with 0 <= start < stop")
    return Scope("range", start, stop)
