"""Which pairs or items are no independent evidence of each other, and so stay together: those of one group.

Pairs of one prompt are answers to one question. But where a prompt is a frame that most of the texts share
("Sentence:", or none at all), it tells nothing apart, and what counts is the texts behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

#: What groups are made by, as results name it, and what that means.
BY = {
    "prompt": "a group is the items of one prompt",
    "texts": "prompts do not tell the items apart, so a group is the items of equal texts",
    "own": "groups are the data's own",
}


def groups_of(prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[list[str], str]:
    """The group of each item, and what groups are made by: "prompt" or "texts" (``BY``).

    By texts where one prompt is that of a third of the items or more: such a group is too large for any part of a
    split to hold it whole and leave something for the others, however many items there are.

    Args:
        prompts: of the items. texts: of each item, the continuations that it contrasts.
    """
    by = by_of(prompts)
    return [group_of(prompt, each, by) for prompt, each in zip(prompts, texts)], by


def by_of(prompts: Sequence[str]) -> str:
    """What groups are made by, where these are the prompts, or the first of them."""
    most = max(Counter(prompts).values(), default=0)
    return "prompt" if most == 1 or 3 * most < len(prompts) else "texts"


def group_of(prompt: str, texts: Sequence[str], by: str) -> str:
    return prompt if by == "prompt" else "\n".join((prompt, *texts))
