"""Pairs from a labelled task: the right option against a wrong one, or a right number against another row's."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PairsError
from ..pairs.pair import Pair
from ..pairs.pairs import Pairs
from .made_pairs import Made

if TYPE_CHECKING:
    from ..tasks.task import Task


def pairs_from_task(task: Task, *, seed: int = 0, balance: bool = False, ending: str = "") -> Made:
    """The wanted option of each item against each other one; of a numeric task, the right number against a wrong one.

    Wrong numbers are right ones of other rows: two rows of the same written form (sign, digits before and after the
    point) and of different answers exchange theirs. So every number is on each side equally often, and whatever depends
    on the number alone (its size, its digits, its length, the token that it ends in) is the same on both sides over the
    whole set.

    Args:
        seed: for the rows that exchange their numbers, and for those that ``balance`` leaves out.
        balance: leave out pairs until, of two continuations that occur as right and wrong both ways, each is right
            equally often (for example yes and no).
        ending: text put behind both sides, for example "." to have both end in the same token.

    Raises:
        PairsError: no wrong answer can be found, or fewer than 2 pairs.
    """
    dropped: dict[str, int] = {}
    notes: tuple[str, ...] = ()
    if task.kind == "numeric":
        found, dropped["no other row's number fits"] = _numeric(task, seed)
        notes = ("wrong numbers are other rows' right ones; two rows of the same written form exchange theirs",)
    else:
        found = list(task.pairs())
    if balance:
        kept = balanced(found, seed)
        dropped["left out to balance"] = len(found) - len(kept)
        found = kept
    found = [replace(p, positive=p.positive + ending, negative=p.negative + ending) for p in found]
    pairs = replace(Pairs.of(found, task.source), chat_template=task.chat_template)
    return Made(pairs, {reason: count for reason, count in dropped.items() if count}, notes)


def written(number: float) -> str:
    """A number as people write it: 51, -3, 0.25; no exponent, no trailing zeros."""
    return np.format_float_positional(number, trim="-")


def _numeric(task: Task, seed: int) -> tuple[list[Pair], int]:
    texts = [written(item.answer) for item in task.items if item.answer is not None]
    partner = partners(texts, seed)
    if not partner:
        raise PairsError(
            f"{task.source}: found no two rows with different answers, expected some: a wrong number is another row's "
            "right one. Give more rows"
        )
    pairs = []
    for number, other in sorted(partner.items()):
        prompt, lead = task.items[number].prompt, task.items[number].lead
        opened = task.chat_template and not lead  # by the turn's header
        blank = "" if opened or prompt[-1].isspace() else " "
        pairs.append(Pair(prompt, blank + texts[number], blank + texts[other], lead))
    return pairs, len(texts) - len(partner)


def partners(texts: Sequence[str], seed: int) -> dict[int, int]:
    """For each row the row with which it exchanges its text: a different one, of the same form where there is one.

    Rows for which no partner is left are not in it.
    """
    rng = random.Random(seed)
    forms: dict[str, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        forms[re.sub(r"\d", "0", text)].append(i)
    found: dict[int, int] = {}
    rest: list[int] = []
    for form in sorted(forms):
        rest += _match(forms[form], texts, rng, found)
    _match(rest, texts, rng, found)
    return found


def _match(rows: Sequence[int], texts: Sequence[str], rng: random.Random, found: dict[int, int]) -> list[int]:
    """Puts partners into ``found``; returns the rows that have none."""
    blocks: dict[str, list[int]] = defaultdict(list)
    for i in rows:
        blocks[texts[i]].append(i)
    order = sorted(blocks.values(), key=len)
    for block in order:
        rng.shuffle(block)
    if order and 2 * len(order[-1]) > len(rows):  # one text is in more rows than all others together
        others = [i for block in order[:-1] for i in block]
        matched, left = list(zip(others, order[-1])), order[-1][len(others) :]
    else:
        # Equal texts stand together in a random order, so half the rows further on is always another text.
        rng.shuffle(order)
        line, half = [i for block in order for i in block], len(rows) // 2
        matched, left = list(zip(line[:half], line[half:])), line[2 * half :]
    for a, b in matched:
        found[a], found[b] = b, a
    return left


def balanced(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs without as many as must go so that two sides that occur both ways occur equally often either way."""
    ways: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        ways[pair.positive, pair.negative].append(i)
    kept = []
    rng = random.Random(seed)
    for (positive, negative), numbers in ways.items():
        reverse = ways.get((negative, positive))
        kept += numbers if reverse is None else rng.sample(numbers, min(len(numbers), len(reverse)))
    return [pairs[i] for i in sorted(kept)]
