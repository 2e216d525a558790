"""Words of others, models or servers, as a terminal may show them."""

from __future__ import annotations


def one_line(text: str) -> str:
    """A text in one line, single blanks between its words, with nothing that a terminal obeys."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
