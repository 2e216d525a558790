"""Continuations cut to whole words, and both of a pair to one number of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..forward.tokens import encode

#: A word with what may be inside it, or one mark.
_PIECE = re.compile(r"\w+(?:['’.,-]\w+)*|[^\w\s]")


def ends(text: str) -> list[int]:
    """Where a text may be cut: behind each of its words and marks."""
    return [piece.end() for piece in _PIECE.finditer(text)]


def whole_words(text: str) -> str:
    """A text that broke off, without the last word, of which nobody knows whether it is whole."""
    if not text or not (text[-1].isalnum() or text[-1] == "_"):
        return text.rstrip()
    return text[: ([0, *ends(text)])[-2]]


def even(tokenizer, texts: Sequence[tuple[str, str, str]], special: bool = True) -> list[tuple[str, str] | None]:
    """Both sides of each pair cut to the largest number of tokens at which each of them ends with a whole word.

    Tokens are counted in the whole text, as momentum is measured on it: of a pair's two texts neither is longer.

    Args:
        texts: prompt, positive and negative of each pair; the prompt as the model reads it.
        special: whether the tokenizer adds its special tokens.

    Returns:
        The sides, or None for a pair that has no such length.
    """
    beginnings = [[[side[:end] for end in ends(side)] for side in sides] for _, *sides in texts]
    flat = [
        prompt + beginning
        for (prompt, *_), sides in zip(texts, beginnings)
        for beginning in ["", *(b for side in sides for b in side)]
    ]
    counts = iter(map(len, encode(tokenizer, flat, add_special_tokens=special)))
    found: list[tuple[str, str] | None] = []
    for sides in beginnings:
        least = next(counts)
        first, second = ({next(counts): beginning for beginning in side} for side in sides)
        common = [count for count in first.keys() & second.keys() if count > least]
        found.append((first[max(common)], second[max(common)]) if common else None)
    return found
