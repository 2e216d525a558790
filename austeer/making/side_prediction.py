"""How well something simple tells which side of a pair is the positive one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from scipy import stats

from ..pairs.halves import half_of

#: A side is told by something simple in so many pairs of a hundred: worth a warning, or grave. 50 is chance.
WARNING, GRAVE = 0.6, 0.75


@dataclass(frozen=True)
class Told:
    """How often the positive side was told, and how likely at least that is by chance.

    Attributes:
        share: of the pairs, where an even guess counts half. p: one-sided, exact.
    """

    share: float
    p: float

    @property
    def level(self) -> str:
        if self.share >= GRAVE and self.p < 0.01:
            return "grave"
        return "warning" if self.share >= WARNING and self.p < 0.05 else "ok"

    def to_json(self) -> dict[str, float]:
        return {"told": self.share, "told_p": self.p}


def sign_test(first: int, second: int) -> float:
    """Two-sided exact p-value of so many of one kind against so many of another; 1 if there are none."""
    return float(stats.binomtest(first, first + second).pvalue) if first + second else 1.0


def told_by_longer(longer: int, shorter: int, pairs: int) -> Told:
    """How often the rule "the longer side is the positive one", or its opposite if that does better, is right."""
    most = max(longer, shorter)
    guessed = pairs - longer - shorter
    return Told((most + guessed / 2) / pairs if pairs else 0.5, sign_test(longer, shorter))


def told_by(positive: Sequence[Hashable], negative: Sequence[Hashable], groups: Sequence[str]) -> Told:
    """How often one feature of each side (its last token, say) tells the positive one, on pairs it was not counted on.

    Of each value it is counted how often it was on a positive and on a negative side; of a new pair the side is taken
    whose value has the larger ratio of (count + 1). Counted on one half of the groups, asked of the other, and the
    other way round. (Leaving one pair out would, of balanced pairs, always leave the other answer in front.)
    """
    halves = [half_of(group) for group in groups]
    right = 0.0
    for half in (False, True):
        counts = [Counter(v for v, own in zip(side, halves) if own != half) for side in (positive, negative)]

        def ratio(value: Hashable, counts=counts) -> float:
            return (counts[0][value] + 1) / (counts[1][value] + 1)

        for p, n, own in zip(positive, negative, halves):
            if own == half:
                ahead = ratio(p) - ratio(n)
                right += 0.5 if ahead == 0 else float(ahead > 0)
    asked = len(halves)
    p_value = float(stats.binom.sf(int(right) - 1, asked, 0.5)) if asked else 1.0
    return Told(right / asked if asked else 0.5, p_value)
