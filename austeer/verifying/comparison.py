"""How far two answers are from each other, as far as they can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..plans.replay import Answer

#: A token's id, or its text where a server gives no more.
Token = int | str


@dataclass(frozen=True)
class Written:
    """What was written after one prompt: the tokens, and at each of them log p of the likeliest."""

    tokens: tuple[Token, ...]
    likely: tuple[Mapping[Token, float], ...]


def of_answer(answer: Answer) -> Written:
    """A recorded answer."""
    return Written(tuple(step[0][0] for step in answer), tuple(dict(step) for step in answer))


def difference(found: Sequence[Written], expected: Sequence[Written]) -> float:
    """The largest difference of a log-probability, of all prompts: nats.

    After the first token that differs the two have read different texts, so nothing more is compared.
    """
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        for a, b, mine, theirs in zip(one.tokens, other.tokens, one.likely, other.likely):
            worst = max(worst, _apart(mine, theirs))
            if a != b:
                break
    return worst


def agreeing(found: Sequence[Written], expected: Sequence[Written]) -> int:
    """How many tokens are the same, from the beginning of each."""
    count = 0
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one.tokens, other.tokens):
            if a != b:
                break
            count += 1
    return count


def _apart(mine: Mapping[Token, float], theirs: Mapping[Token, float]) -> float:
    """Of tokens that one of the two lists alone, at least so much: in the other they are no likelier than its last."""
    mine_least, theirs_least = min(mine.values()), min(theirs.values())
    apart = [0.0]
    for token in mine.keys() | theirs.keys():
        if token in mine and token in theirs:
            apart.append(abs(mine[token] - theirs[token]))
        elif token in mine:
            apart.append(mine[token] - theirs_least)
        else:
            apart.append(theirs[token] - mine_least)
    return max(apart)
