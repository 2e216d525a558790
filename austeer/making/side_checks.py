"""What tokens tell of the sides of pairs: lengths, first and last ones, where prompt and side meet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from ..forward.tokens import begun, encode
from ..pairs.groups import groups_of
from ..pairs.pair import Pair
from .findings import PairsFinding, percent, share, worst
from .side_prediction import sign_test, told_by, told_by_longer

#: A first word of so many of the pairs is an answer word (yes, no, a letter).
ANSWER_WORD = 0.1

#: Tokens of a side up to which its last token is the answer itself.
SHORT = 2


@dataclass(frozen=True)
class Sides:
    """Pairs whose sides differ, and their token ids, uncut.

    Attributes:
        pairs: the pairs. prompts: ids of each prompt alone. positive, negative: ids of each pair's two texts.
    """

    pairs: Sequence[Pair]
    prompts: Sequence[list[int]]
    positive: Sequence[list[int]]
    negative: Sequence[list[int]]

    @classmethod
    def of(cls, tokenizer, pairs: Sequence[Pair], special: bool) -> Sides:
        """Those of the pairs whose two texts have different tokens."""
        sides = [("", p.positive, p.negative) for p in pairs]
        prompts, positive, negative = (
            encode(tokenizer, [p.prompt + own[i] for p, own in zip(pairs, sides)], add_special_tokens=special)
            for i in range(3)
        )
        kept = [i for i in range(len(pairs)) if positive[i] != negative[i]]
        prompts, positive, negative = ([ids[i] for i in kept] for ids in (prompts, positive, negative))
        return cls([pairs[i] for i in kept], prompts, positive, negative)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def differences(self) -> list[int]:
        """Tokens of the positive text less those of the negative one."""
        return [len(p) - len(n) for p, n in zip(self.positive, self.negative)]

    @property
    def groups(self) -> list[str]:
        """The group of each pair."""
        return groups_of([p.prompt for p in self.pairs], [(p.positive, p.negative) for p in self.pairs])[0]

    @property
    def short(self) -> bool:
        """Whether sides are mostly a token or two."""
        own = [len(ids) - len(q) for q, p, n in zip(self.prompts, self.positive, self.negative) for ids in (p, n)]
        return bool(own) and median(own) <= SHORT


def check_length(sides: Sides) -> PairsFinding:
    differences = sides.differences
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    told = told_by_longer(longer, shorter, len(sides))
    average = mean(differences) if differences else 0.0
    numbers = {
        "positive_longer": longer,
        "negative_longer": shorter,
        "equal": len(sides) - longer - shorter,
        "mean_difference": average,
        "p": sign_test(longer, shorter),
        **told.to_json(),
    }
    verdict = (
        f"the positive side is longer in {share(longer, len(sides))} pairs, the negative one in {shorter} (by "
        f"{average:+.1f} tokens on average, p = {told.p:.2g})"
    )
    return PairsFinding.of(
        "length",
        told.level,
        verdict,
        f": whoever takes the {'longer' if longer >= shorter else 'shorter'} side for the positive one is right in "
        f"{percent(told.share)}",
        "cut or write both sides to one length (austeer pairs make instructions does); see how many AUs react to "
        "length alone (--control)",
        numbers,
    )


def check_last_token(tokenizer, sides: Sides) -> PairsFinding:
    positive, negative = ([ids[-1] for ids in texts] for texts in (sides.positive, sides.negative))
    told = told_by(positive, negative, sides.groups)
    same = sum(a == b for a, b in zip(positive, negative))
    most = {
        side: [(tokenizer.decode([token]), count) for token, count in Counter(ids).most_common(5)]
        for side, ids in (("positive", positive), ("negative", negative))
    }
    numbers = {"same": same, **told.to_json(), "most_frequent": most, "short_sides": sides.short}
    verdict = (
        f"both sides end in the same token in {share(same, len(sides))} pairs; the last token alone, at which "
        f"activations are read, tells the side in {percent(told.share)} (50 % is chance, p = {told.p:.2g})"
    )
    listed = "; ".join(f"{side} {', '.join(f'{t!r} {n}' for t, n in found[:3])}" for side, found in most.items())
    level, why = told.level, f". Most frequent: {listed}"
    remedy = "end both sides alike (the same mark, or none), or cut both in the same way"
    if sides.short and level != "ok":  # the last token is the answer: it should tell the side
        level, why = "note", f"; sides are a token or two, so this is the contrast itself{why}"
        remedy = "see that many different words make up each side, so that no AU is chosen for one word"
    return PairsFinding.of("last token", level, verdict, why, remedy, numbers)


def check_answer_words(sides: Sides) -> PairsFinding:
    """Words that many sides begin with: each should be as often right as wrong."""
    first = [(_first_word(p.positive), _first_word(p.negative)) for p in sides.pairs]
    used = Counter(word for words in first for word in set(words) if word)
    words = []
    for word, count in used.most_common():
        if count < max(2, ANSWER_WORD * len(sides)):
            break
        right, wrong = (sum(w[i] == word != w[1 - i] for w in first) for i in (0, 1))
        words.append((word, right, wrong, told_by_longer(right, wrong, len(sides))))
    told = told_by([p for p, _ in first], [n for _, n in first], sides.groups)
    numbers = {**told.to_json(), "words": [{"word": w, "positive": r, "negative": n, "p": t.p} for w, r, n, t in words]}
    uneven = [entry for entry in words if entry[3].level != "ok"]
    if uneven:
        listed = "; ".join(
            f"{w!r} begins the positive side {r} times, the negative one {n}" for w, r, n, _ in uneven[:4]
        )
        return PairsFinding(
            "answer words",
            worst(*(entry[3].level for entry in uneven)),
            f"{listed}: AUs that react to the word count as if they knew the answer",
            "have each answer right as often as wrong (austeer pairs make task --balance), or use more different words",
            numbers,
        )
    shown = "; ".join(f"{w!r} positive {r}, negative {n}" for w, r, n, _ in words[:4])
    return PairsFinding.of(
        "answer words",
        "ok" if sides.short or told.level == "ok" else "note",  # of short sides the last token tells the same
        shown or f"no word begins the sides of {percent(ANSWER_WORD)} of the pairs or more",
        f"; the first word alone tells the side in {percent(told.share)}",
        "if that is not what the sides differ in, have them begin alike",
        numbers,
    )


def check_beginning(tokenizer, sides: Sides, special: bool) -> PairsFinding:
    """Texts that begin as the tokenizer would begin them, such as those of a chat template rendered elsewhere."""
    texts = [p.prompt + p.positive for p in sides.pairs]
    already = begun(tokenizer, texts) if special else 0
    return PairsFinding.of(
        "beginning of text",
        "note" if already else "ok",
        f"{share(already, len(texts))} texts begin with the token that the tokenizer puts before every text",
        "; they get no second one",
        "if they come from a chat template, measure and steer with prompts in the same form",
        {"begun": already},
    )


def check_boundary(sides: Sides) -> PairsFinding:
    joined = sum(
        ids[: len(prompt)] != prompt
        for prompt, p, n in zip(sides.prompts, sides.positive, sides.negative)
        for ids in (p, n)
    )
    texts = 2 * len(sides)
    return PairsFinding.of(
        "prompt boundary",
        "warning" if joined > 0.2 * texts else "note" if joined > 0.02 * texts else "ok",
        f"in {share(joined, texts)} texts a token reaches across the end of the prompt",
        ", so its sides do not go on from the same tokens",
        "end prompts without a blank, and begin continuations with the one that belongs there",
        {"joined": joined, "texts": texts},
    )


def check_truncation(sides: Sides, limit: int | None) -> PairsFinding:
    if limit is None:
        verdict = "not looked at: the context's length is not known"
        return PairsFinding("context", "ok", verdict, numbers={"limit": None})
    lengths = [len(ids) for ids in (*sides.positive, *sides.negative)]
    cut, longest = sum(length > limit for length in lengths), max(lengths, default=0)
    return PairsFinding.of(
        "context",
        "warning" if cut else "ok",
        f"{share(cut, len(lengths))} texts have more than {limit} tokens (the longest {longest})",
        "",
        "shorten these prompts: they lose their beginning, and a chat template its header",
        {"limit": limit, "cut": cut, "longest": longest},
    )


def _first_word(text: str) -> str:
    found = re.search(r"\w+", text)
    return found.group().casefold() if found else text.strip()
