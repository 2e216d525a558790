"""Where a model's answer is among its tokens: what begins it, and between which markers it pauses.

Tokens are read from the first of the prompt on. At each moment a text is in one phase: it waits for the answer to
start, is in the answer, or in one of the pauses. A phase ends when a marker that it waits for has been read, which is
then read anew from the next token on: the tokens of one marker are no part of another. A token is in the answer if the
text is, once that token has been read: the last token of what starts the answer or ends a pause is in it, the last of
what begins a pause is not. Of several markers that end at one token the longest counts.

Nothing here knows of a model: plain Python, for whatever runs one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import SteeringError

#: A sequence of token ids.
Marker = tuple[int, ...]

#: States of an automaton: tables of them are on the device, and a prompt's tokens are composed over all of them.
MOST_STATES = 1024


@dataclass(frozen=True)
class Answer:
    """A scope: the answer's tokens among those that are generated, by the token ids of its markers.

    :func:`austeer.answer_scope` makes one of strings, or of what a tokenizer's chat template writes. Wherever several
    sequences are given, they are spellings of one marker: any of them counts.

    Attributes:
        start: what the answer begins with; empty: it begins at once.
        pauses: what begins each pause, and what ends it.
        turn: what a turn of the model begins with: from there on all is as at the first token, in any phase.
        text: how the markers read, for messages.
    """

    start: tuple[Marker, ...] = ()
    pauses: tuple[tuple[tuple[Marker, ...], tuple[Marker, ...]], ...] = ()
    turn: tuple[Marker, ...] = ()
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("start", "turn"):
            object.__setattr__(self, name, _markers(name, getattr(self, name)))
        try:
            pauses = [(opens, closes) for opens, closes in self.pauses]
        except (TypeError, ValueError):
            raise SteeringError(
                f"answer: pauses: found {self.pauses!r:.80}, expected pairs of what begins a pause and what ends it"
            ) from None
        both = [tuple(_markers("pauses", markers) for markers in pause) for pause in pauses]
        object.__setattr__(self, "pauses", tuple(both))
        if not all(opens and closes for opens, closes in both):
            raise SteeringError("answer: pauses: found one without a marker, expected what begins it and what ends it")
        _expect_apart(self.turn, self.start, *(opens for opens, _ in both))
        for _, closes in both:
            _expect_apart(self.turn, closes)

    def __str__(self) -> str:
        return f"answer{self.text and f', {self.text}'}"

    def phases(self) -> list[dict[Marker, int]]:
        """What each phase waits for, with the number of the phase that follows; a text begins in the first."""
        on = self.on
        phases = [dict.fromkeys(self.start, on)] if self.start else []
        phases.append({marker: on + 1 + i for i, (opens, _) in enumerate(self.pauses) for marker in opens})
        phases += [dict.fromkeys(closes, on) for _, closes in self.pauses]
        return [{**waited, **dict.fromkeys(self.turn, 0)} for waited in phases]

    @property
    def on(self) -> int:
        """The number of the phase in which a text is in the answer."""
        return 1 if self.start else 0

    def tokens(self) -> set[int]:
        """All tokens of its markers."""
        return {token for waited in self.phases() for marker in waited for token in marker}


class Automaton:
    """Reads tokens one by one: a state and a token make the next state. State 0 is that of a text without a token.

    Attributes:
        classes: the number of each token that stands in a marker, equal for those that do the same; all others are
            class 0.
        next: for each class, for each state, the state that follows.
        on: for each state, whether the text is in the answer.
    """

    def __init__(self, answer: Answer):
        phases = answer.phases()
        # In a phase, of what was read only so much tells as a marker could begin with.
        heads = [{marker[:n] for marker in waited for n in range(len(marker))} | {()} for waited in phases]
        states = {(phase, read): 0 for phase, found in enumerate(heads) for read in sorted(found)}
        states = {state: number for number, state in enumerate(states)}
        _expect_few(max((len(marker) for waited in phases for marker in waited), default=0), MOST_STATES)
        _expect_few(len(states), 16 * MOST_STATES)
        tokens = sorted(answer.tokens())
        rows: list[dict[int, int]] = []  # for each state, which other than its phase's first one follows a token
        for phase, (waited, found) in enumerate(zip(phases, heads)):
            follows = _followers(phase, waited, found)
            rows += [{token: states[to] for token, to in follows[read].items()} for read in sorted(found)]
        roots = [states[phase, ()] for phase, _ in states]
        following = [
            [root if token is None else row.get(token, root) for row, root in zip(rows, roots)]
            for token in (None, *tokens)
        ]
        self.on, self.next, classes = _merged([phase == answer.on for phase, _ in states], following)
        self.classes = dict(zip(tokens, classes[1:]))

    def step(self, state: int, token: int) -> int:
        """The state after one more token."""
        return self.next[self.classes.get(token, 0)][state]

    def read(self, tokens: Iterable[int], state: int = 0) -> list[bool]:
        """For each of the tokens that follow a state, whether it is in the answer."""
        found = []
        for token in tokens:
            state = self.step(state, token)
            found.append(self.on[state])
        return found


def _followers(
    phase: int, waited: dict[Marker, int], heads: set[Marker]
) -> dict[Marker, dict[int, tuple[int, Marker]]]:
    """For each of the texts that a phase's markers begin with: token -> the phase that follows, and what counts there.

    A token that is not named leads to the phase's empty text.
    """
    children: dict[Marker, list[int]] = {}
    for text in dict.fromkeys([*waited, *heads - {()}]):
        children.setdefault(text[:-1], []).append(text[-1])
    found: dict[Marker, dict[int, tuple[int, Marker]]] = {}
    for read in sorted(heads, key=len):
        # Its longest ending that a marker could begin with has been seen to, as it is shorter.
        row = dict(found[next(read[i:] for i in range(1, len(read) + 1) if read[i:] in heads)]) if read else {}
        for token in children.get(read, ()):
            text = (*read, token)
            if text in waited:
                row[token] = waited[text], ()
            elif row.get(token, (phase, text))[1]:  # a marker that ends here counts before one that goes on
                row[token] = phase, text
        found[read] = row
    return found


def _merged(on: list[bool], following: list[list[int]]) -> tuple[list[bool], list[list[int]], list[int]]:
    """The same automaton with as few states and classes as tell its texts apart, and each class's number there.

    Spellings of one marker differ in their first tokens and go on alike.
    """
    blocks: list[int] = [int(inside) for inside in on]
    count = 0
    while count < (count := len(set(blocks))):
        signatures = list(zip(blocks, *([blocks[state] for state in row] for row in following)))
        numbers = {signature: number for number, signature in enumerate(dict.fromkeys(signatures))}
        _expect_few(len(numbers), MOST_STATES)
        blocks = [numbers[signature] for signature in signatures]
    first = [blocks.index(block) for block in range(count)]  # state 0 stays that
    merged = [tuple(blocks[row[state]] for state in first) for row in following]
    rows = {row: number for number, row in enumerate(dict.fromkeys(merged))}
    return [on[state] for state in first], [list(row) for row in rows], [rows[row] for row in merged]


def _expect_few(states: int, most: int) -> None:
    if states > most:
        raise SteeringError(
            f"answer: found markers that take {states} states to tell, expected at most {most}; give fewer or shorter "
            "ones"
        )


def _markers(name: str, given: object) -> tuple[Marker, ...]:
    expected = "expected sequences of token ids, such as ((5, 7),)"
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SteeringError(f"answer: {name}: found {given!r:.80}, {expected}")
    found = []
    for marker in given:
        if not isinstance(marker, Sequence) or isinstance(marker, str) or not marker:
            raise SteeringError(f"answer: {name}: found {marker!r:.80}, {expected}")
        if not all(type(token) is int and token >= 0 for token in marker):
            raise SteeringError(f"answer: {name}: found {marker!r:.80}, {expected}")
        found.append(tuple(marker))
    return tuple(dict.fromkeys(found))


def _expect_apart(*given: Sequence[Marker]) -> None:
    """Raises SteeringError where one phase waits for a sequence as two different markers."""
    seen: set[Marker] = set()
    for markers in given:
        if common := seen & {*markers}:
            raise SteeringError(f"answer: found the tokens {list(min(common))} as two markers, expected different ones")
        seen |= {*markers}
