"""Which token positions are steered: a scope, and where it begins and ends in a sequence.

Positions are counted in columns of the padded batch, cached tokens included: the first column of a forward pass is the
length of its cache. A range of tokens is counted from each row's own first token, after its padding.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor

from ..errors import SteeringError

SCOPES = ("all", "prompt", "generation", "last_prompt_token", "from_last_prompt_token")

#: A column after every sequence.
END = sys.maxsize // 4


@dataclass(frozen=True)
class Scope:
    """A half-open interval of each row's tokens.

    Attributes:
        name: one of ``SCOPES``, or "range".
        start, stop: of a range, in tokens of the row, padding not counted.
    """

    name: str
    start: int = 0
    stop: int = END

    def __str__(self) -> str:
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
        if self.name == "generation":
            return prompt, END
        if self.name == "last_prompt_token":
            end = prompt - padding_after
            return end - 1, end
        if self.name == "from_last_prompt_token":  # what pads a prompt on the right is in it, and no token sees it
            return prompt - padding_after - 1, END
        if self.name == "range":
            return padding + self.start, padding + self.stop
        return 0, END


def parse_scope(scope: str | tuple[int, int | None]) -> Scope:
    """A scope from its name, or from (start, stop): tokens start to stop - 1 of each row; stop may be None.

    Raises:
        SteeringError: neither.
    """
    if isinstance(scope, str) and scope in SCOPES:
        return Scope(scope)
    expected = f"expected one of {', '.join(SCOPES)} or a half-open range of tokens such as (0, 16) or (16, None)"
    if not isinstance(scope, (tuple, list)) or len(scope) != 2:
        raise SteeringError(f"scope: found {scope!r}, {expected}")
    start, stop = scope
    stop = END if stop is None else stop
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (start, stop)) or not 0 <= start < stop <= END:
        raise SteeringError(f"scope: found {scope!r}, {expected} with 0 <= start < stop")
    return Scope("range", start, stop)
