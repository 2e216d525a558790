"""How a tokenizer spells a marker in a text, where it may make one token of the marker's end and what is around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import SteeringError
from .markers import Marker

#: What may stand around a marker and change its tokens without being in one of them.
_BEFORE = ("", " ", "\n", ".", ">")
_AFTER = ("", " ", "\n", "\n\n", "{", "<")

#: Of so many spellings of a marker's beginning, and as many of its end, each pair is one of the whole.
_PAIRED = 64


class Spelling:
    """The token sequences of markers, by a tokenizer and its vocabulary."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added = set(getattr(tokenizer, "get_added_vocab", dict)().values())
        self._anchor = encoded(tokenizer, "a")  # tokens are decoded behind it, as at a text's start some lose a blank
        self._tokens: list[str] | None = None

    def of(self, text: str, undone: str | None = None) -> tuple[Marker, ...]:
        """A marker as it stands alone, which is the first, and as its ends may be one token with what is around it.

        Tokens that are made so are looked for in the vocabulary: all that end with the marker's beginning, or begin
        with its end. A marker that begins or ends with a letter is one where no word goes on there.

        Args:
            undone: what undoes the marker, in a token that holds both; None: nothing does.

        Raises:
            SteeringError: a marker of which the tokenizer makes no token.
        """
        alone = tuple(encoded(self._tokenizer, text))
        if not alone:
            raise SteeringError(
                f"answer: found {text!r:.80}, of which the tokenizer makes no token; expected another marker"
            )
        if (len(alone) == 1 and alone[0] in self._added) or not getattr(self._tokenizer, "is_fast", False):
            return (alone,)
        cuts = self._cuts(text, alone)
        before, after = list(_BEFORE), list(_AFTER)
        begun: list[tuple[Marker, int]] = []  # tokens that stand for so many of the first
        ended: list[tuple[int, Marker]] = []  # of so many of the first, what follows those
        whole: list[Marker] = []
        for token, piece in self._pieces(text):
            for size in range(1, min(len(text) + 1, len(piece))):
                if piece.endswith(text[:size]) and _word_ends(piece[-size - 1], text[0]):
                    before.append(piece[:-size])
                    begun += [((token,), cuts[size])] if size in cuts else []
                if piece.startswith(text[-size:]) and _word_ends(text[-1], piece[size]):
                    if undone and undone in piece[size:]:
                        continue
                    after.append(piece[size:])
                    ended += [(cuts[len(text) - size], (token,))] if len(text) - size in cuts else []
            at = piece.find(text, 1)
            if 0 < at < len(piece) - len(text) and not (undone and undone in piece[at:]):
                alike = _word_ends(piece[at - 1], text[0]) and _word_ends(text[-1], piece[at + len(text)])
                whole += [(token,)] if alike else []
        heads: dict[tuple[Marker, int], str | None] = {((), 0): ""}  # and what is before the marker, if that is known
        for around, ids in self._placed(text, [(around, "") for around in dict.fromkeys(before)]):
            kept = _common(ids[::-1], alone[::-1])
            heads.setdefault((ids[: len(ids) - kept], len(alone) - kept), around[0])
        tails: dict[tuple[int, Marker], str | None] = {(len(alone), ()): ""}
        for around, ids in self._placed(text, [("", around) for around in dict.fromkeys(after)]):
            kept = _common(ids, alone)
            tails.setdefault((kept, ids[kept:]), around[1])
        for more in begun:  # the tokenizer's own come first
            heads.setdefault(more, None)
        for rest in ended:
            tails.setdefault(rest, None)
        found, both = [alone], []
        for number, ((head, first), front) in enumerate(heads.items()):
            for other, ((stop, tail), back) in enumerate(tails.items()):
                if number and other and not number < _PAIRED > other:
                    continue
                if first <= stop:
                    found.append((*head, *alone[first:stop], *tail))
                elif front is not None and back is not None:  # they share tokens
                    both.append((front, back))
        found += [ids for _, ids in self._placed(text, both)]
        return tuple(dict.fromkeys(found + whole))

    def straddling(self, first: str, second: str) -> set[int]:
        """The tokens that a text of one marker right before another has parts of both in."""
        if not getattr(self._tokenizer, "is_fast", False):
            return set()
        given = self._tokenizer(first + second, add_special_tokens=False, return_offsets_mapping=True)
        return {i for i, (begin, end) in zip(given["input_ids"], given["offset_mapping"]) if begin < len(first) < end}

    def _placed(self, text: str, around: Sequence[tuple[str, str]]) -> Iterable[tuple[tuple[str, str], Marker]]:
        """What is around a marker, and the tokens that the marker then has a part in."""
        texts = [before + text + after for before, after in around]
        if not texts:
            return
        given = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for pair, ids, offsets in zip(around, given["input_ids"], given["offset_mapping"]):
            first, stop = len(pair[0]), len(pair[0]) + len(text)
            found = tuple(i for i, (begin, end) in zip(ids, offsets) if end > first and begin < stop)
            if found:
                yield pair, found

    def _pieces(self, text: str) -> Iterable[tuple[int, str]]:
        """The vocabulary's tokens that may have an end of a marker in them, and more; as they read inside a text."""
        if self._tokens is None:
            self._tokens = self._tokenizer.convert_ids_to_tokens(list(range(len(self._tokenizer))))
        plain = all("!" <= letter <= "~" for letter in (text[0], text[-1]))  # written as they are in any vocabulary
        numbers = [
            number
            for number, token in enumerate(self._tokens)
            if token and number not in self._added and (not plain or text[0] in token or text[-1] in token)
        ]
        return zip(numbers, self._read(numbers))

    def _read(self, numbers: Sequence[int]) -> list[str]:
        """The text of each token, as it reads inside a text."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        skipped = len(self._tokenizer.decode(self._anchor, **options))
        read = self._tokenizer.batch_decode([[*self._anchor, number] for number in numbers], **options)
        return [text[skipped:] for text in read]

    def _cuts(self, text: str, alone: Marker) -> dict[int, int]:
        """characters of a marker -> the tokens that they are, wherever one ends; empty where these read otherwise."""
        pieces = self._read(alone)
        start = "".join(pieces).find(text)
        if start < 0:
            return {}
        ends = [sum(map(len, pieces[:number])) - start for number in range(1, len(pieces) + 1)]
        return {0: 0} | {end: number for number, end in enumerate(ends, 1)}


def encoded(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, without special ones."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def apart(*groups: tuple[Marker, ...]) -> list[tuple[Marker, ...]]:
    """Markers' spellings, each as one of the first marker that has it; the first spelling of each stays its own."""
    taken = {group[0] for group in groups if group}
    found = []
    for group in groups:
        found.append(tuple(marker for number, marker in enumerate(group) if number == 0 or marker not in taken))
        taken |= {*found[-1]}
    return found


def _word_ends(left: str, right: str) -> bool:
    """Whether no word goes on from one character to the next."""
    return not (left.isalnum() and right.isalnum())


def _common(a: Marker, b: Marker) -> int:
    """How many of the first tokens are equal."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
