"""What texts tell of pairs, without tokens: sides that are blank or equal, prompts that come again."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse

from ..pairs.groups import groups_of
from ..pairs.pair import Pair
from .findings import PairsFinding, share

#: Prompts that are compared with each other, at most; more are drawn from.
COMPARED = 3000

#: Share of the words of two prompts that both have, from which on they are nearly the same.
ALIKE = 0.8


def with_sides(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """The pairs of which neither side is blank."""
    return tuple(p for p in pairs if p.positive.strip() and p.negative.strip())


def check_blank(pairs: Sequence[Pair]) -> PairsFinding:
    sides = {"positive": [p.positive for p in pairs], "negative": [p.negative for p in pairs]}
    blank = {side: sum(not text.strip() for text in texts) for side, texts in sides.items()}
    without = {side: [not re.search(r"\w", text) for text in texts] for side, texts in sides.items()}
    bare = {side: sum(hits) - blank[side] for side, hits in without.items()}
    pairs_hit = sum(map(any, zip(*without.values())))
    numbers = {"blank": blank, "without_words": bare, "pairs": pairs_hit}
    if not pairs_hit:
        return PairsFinding("blank sides", "ok", "every side has at least a word", numbers=numbers)
    level = "grave" if pairs_hit > 0.05 * len(pairs) else "warning"
    verdict = (
        f"{share(pairs_hit, len(pairs))} pairs have a side without a word (blank: {blank['positive']} positive, "
        f"{blank['negative']} negative): such pairs contrast something with nothing"
    )
    remedy = "write a wrong answer of the same form (austeer pairs make task does), or leave these pairs out"
    if any(blank.values()):
        remedy += "; austeer measure refuses blank sides"
    return PairsFinding("blank sides", level, verdict, remedy, numbers)


def check_identical(identical: int, pairs: int) -> PairsFinding:
    verdict = f"{share(identical, pairs)} pairs have the same tokens on both sides"
    numbers = {"identical": identical}
    level = "grave" if identical > 0.5 * pairs else "warning" if identical > 0.05 * pairs else "note"
    level = level if identical else "ok"
    return PairsFinding.of("equal sides", level, verdict, " and count for nothing", "leave them out", numbers)


def check_prompts(pairs: Sequence[Pair]) -> PairsFinding:
    counts = Counter(p.prompt for p in pairs)
    most = max(counts.values(), default=0)
    again = len(pairs) - len(set(pairs))
    similar, compared = near_duplicates(list(counts))
    numbers = {
        "distinct": len(counts),
        "most_pairs_of_one": most,
        "repeated_pairs": again,
        "nearly_the_same": similar,
        "compared": compared,
    }
    verdict = (
        f"{len(counts)} different prompts for {len(pairs)} pairs (one has {most}); {again} pairs are there again; "
        f"{share(similar, compared)} prompts are nearly the same as another"
    )
    groups, by = groups_of([p.prompt for p in pairs], [(p.positive, p.negative) for p in pairs])
    if by == "texts":
        verdict += ". A prompt that so many share tells nothing apart: what counts is the texts behind it"
    few, alike = len(set(groups)) < 0.5 * len(pairs), similar > 0.3 * compared
    return PairsFinding.of(
        "prompts",
        "warning" if again > 0.01 * len(pairs) or few or alike else "ok",
        verdict,
        ": pairs count as independent, and these are not",
        "remove what comes again; give more different prompts; keep variants of one prompt on one side of a split",
        numbers,
    )


def check_contradictions(pairs: Sequence[Pair]) -> PairsFinding:
    positive = {p.prompt + p.positive for p in pairs}
    both = sum(p.prompt + p.negative in positive for p in pairs if p.positive != p.negative)
    numbers = {"pairs": both}
    if not both:
        verdict = "no text is positive in one pair and negative in another"
        return PairsFinding("contradictions", "ok", verdict, numbers=numbers)
    return PairsFinding(
        "contradictions",
        "grave" if both > 0.05 * len(pairs) else "warning",
        f"the negative text of {share(both, len(pairs))} pairs is the positive one of another",
        "decide which side these texts belong to, and leave the other pair out",
        numbers,
    )


def near_duplicates(prompts: Sequence[str]) -> tuple[int, int]:
    """How many prompts share nearly all their words with another one, and among how many that was asked.

    Words that more than half of the prompts have (a template's) are left aside, numbers are taken as equal, and prompts
    of fewer than 3 other words are not asked.
    """
    if len(prompts) > COMPARED:
        prompts = random.Random(0).sample(prompts, COMPARED)
    sets = [set(re.findall(r"\w+", re.sub(r"\d+", "0", prompt.casefold()))) for prompt in prompts]
    frequent = {word for word, count in Counter(w for words in sets for w in words).items() if 2 * count > len(sets)}
    sets = [words for words in (words - frequent for words in sets) if len(words) >= 3]
    if len(sets) < 2:
        return 0, len(prompts)
    column = {word: i for i, word in enumerate(dict.fromkeys(w for words in sets for w in sorted(words)))}
    sizes = np.array([len(words) for words in sets])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.array([column[word] for words in sets for word in sorted(words)])
    table = sparse.csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(sets), len(column)))
    found = 0
    for start in range(0, len(sets), 256):  # a block of rows at a time: few MB
        common = (table[start : start + 256] @ table.T).toarray()
        either = sizes[start : start + 256, None] + sizes[None, :] - common
        near = common >= ALIKE * either
        near[np.arange(len(near)), start + np.arange(len(near))] = False  # itself
        found += int(near.any(1).sum())
    return found, len(prompts)
