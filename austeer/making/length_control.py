"""How many AUs react to length alone: momentum on a control set, and signs by the longer side.

A pair of the control set has one of the pairs' own continuations on both sides, and on one of them neutral words in
parentheses before it. Both texts end alike, with the same last token and the same meaning; the one is longer by about
as many tokens as the sides of the pairs differ. Which words stand there changes from pair to pair, so no single one of
them is measured. What the control cannot take away is that there are words in parentheses at all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

import torch
from torch import nn

from ..errors import PairsError, SelectionError, check_count
from ..forward.tokens import encode, length_limit, tokenise
from ..measuring.measure import measure
from ..models.sites import find_sites, fingerprint
from ..momentum.momentum import Momentum
from ..pairs.chat import describe_form
from ..pairs.pairs import Pairs
from ..statistics import discoveries, ranking, signed_rate
from .momentum_signs import following, momentum_signs
from .side_checks import Sides
from .side_prediction import sign_test
from .text_checks import with_sides

#: Neutral in tone, and true of anything.
FILLERS = (
    "as noted above",
    "at this point",
    "as it happens",
    "for what it is",
    "in this case",
    "as the text goes on",
    "in other words",
    "to put it this way",
    "at the time",
    "in the present form",
    "as things stand",
    "with that in place",
)

#: Tokens that the sides of the control differ in, at least: one filler in parentheses.
LEAST = 5

#: Pairs with the longer side positive, and as many with it negative, of which signs are looked at, at least.
FEWEST = 10


@dataclass(frozen=True)
class Reacting:
    """One of the top AUs that react to length alone with their plan's sign. beta: in the pairs; control: there."""

    layer: int
    index: int
    beta: float
    control: float


@dataclass(frozen=True)
class SiteControl:
    """The top AUs of a site.

    Attributes:
        site: its name. k: how many AUs were looked at.
        significant: how many of them react to length alone, with either sign, at 5 % false discoveries.
        same_sign: how many of these as in the pairs. expected: how many would, were AUs of the same layers and signs
            drawn at random.
        share_of_site: share of all the site's AUs that react to length alone.
        reacting: those of the same sign, in the order of the plan.
        longer, shorter: pairs with the positive (negative) side longer whose signs were looked at; 0 if too few.
        depends: AUs whose sign depends on which side is longer; None if too few pairs. turns: of these, how many have
            the plan's sign mostly where the one side is longer and mostly not where the other is.
    """

    site: str
    k: int
    significant: int
    same_sign: int
    expected: float
    share_of_site: float
    reacting: tuple[Reacting, ...]
    longer: int = 0
    shorter: int = 0
    depends: int | None = None
    turns: int | None = None

    @property
    def excess(self) -> float:
        """How many more than expected, as a share of k."""
        return (self.same_sign - self.expected) / self.k

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "excess": self.excess, "reacting": [vars(unit) for unit in self.reacting]}


@dataclass(frozen=True)
class LengthControl:
    """What :func:`length_control` found.

    Attributes:
        pairs: of the control set. tokens: how many more the longer side has there, on average.
        longer_is: the side of the pairs that tends to be longer, which is the longer one in the control, too.
        balanced: whether in the pairs neither side tends to be longer (sign test, 5 %).
        sites: for each site.
    """

    pairs: int
    tokens: float
    longer_is: str
    balanced: bool
    sites: Mapping[str, SiteControl]

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "sites": {name: site.to_json() for name, site in self.sites.items()}}


def control_pairs(pairs: Pairs, tokenizer, *, count: int = 200, seed: int = 0) -> Pairs:
    """The control set of some pairs, which differ in length only; at most ``count`` of them, drawn with the seed.

    Raises:
        PairsError: fewer than 2 pairs whose sides differ.
    """
    check_count("count", count, 2**20, "pairs of the control", PairsError)
    return _control(pairs, Sides.of(tokenizer, with_sides(pairs), not pairs.chat_template), tokenizer, count, seed)


def length_control(
    model: nn.Module,
    tokenizer,
    pairs: Pairs,
    momentum: Momentum,
    *,
    k: int = 100,
    count: int = 200,
    seed: int = 0,
    max_length: int | None = None,
    progress: bool | None = None,
) -> LengthControl:
    """Which of each site's top k AUs react to length alone.

    Args:
        model: on which ``momentum`` was measured, with these pairs. k: how many AUs, at most all of a site.
        count: at most so many pairs are run, for the control and again for signs.

    Raises:
        SelectionError: momentum of another model, or of other forms of prompts.
        PairsError: fewer than 2 pairs whose sides differ.
    """
    _check_same(model, pairs, momentum)
    check_count("k", k, 2**40, "AUs", SelectionError)
    sides = Sides.of(tokenizer, with_sides(pairs), not pairs.chat_template)
    control = _control(pairs, sides, tokenizer, count, seed)
    sites, layers = list(momentum.sites), momentum.layers
    found = measure(model, tokenizer, control, sites, layers=layers, max_length=max_length, progress=progress)
    differences = sides.differences
    longer, shorter = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    lengths = Sides.of(tokenizer, tuple(control), not pairs.chat_template).differences
    asked = _unequal(differences, count, seed)
    some, limit = [sides.pairs[i] for i in asked], length_limit(model, max_length)
    texts = tokenise(tokenizer, some, limit, special=not pairs.chat_template)
    results = {}
    for name in momentum.sites:
        results[name], rows, columns, beta = _of_site(momentum, found, name, k)
        if asked:
            units = rows.tolist(), columns.tolist()
            signs = momentum_signs(model, texts.positive, texts.negative, name, *units, progress)
            seen = following(signs, beta.numpy(), [differences[asked[i]] for i in texts.number])
            told = {"depends": int(seen.depends.sum()), "turns": int(seen.turns.sum())}
            results[name] = replace(results[name], longer=seen.longer, shorter=seen.shorter, **told)
    return LengthControl(
        pairs=len(control),
        tokens=abs(mean(lengths)),
        longer_is="positive" if longer >= shorter else "negative",
        balanced=sign_test(longer, shorter) >= 0.05,
        sites=results,
    )


def _check_same(model: nn.Module, pairs: Pairs, momentum: Momentum) -> None:
    here = fingerprint(model, find_sites(model, list(momentum.sites)))
    for what in ("model_type", "layers", "widths"):
        if getattr(here, what) != getattr(momentum.model, what):
            raise SelectionError(
                f"momentum: found {what} {getattr(momentum.model, what)} (of {momentum.model.name}), and the model has "
                f"{getattr(here, what)}; expected momentum of this model"
            )
    if momentum.chat_template != pairs.chat_template:
        raise SelectionError(
            f"momentum: was measured {describe_form(momentum.chat_template)}, and these pairs go "
            f"{describe_form(pairs.chat_template)}; give both in one form (--chat, --chat-option)"
        )


def _control(pairs: Pairs, sides: Sides, tokenizer, count: int, seed: int) -> Pairs:
    usable, differences = sides.pairs, sides.differences
    apart = [abs(d) for d in differences if d]
    tokens = max(LEAST, round(median(apart)) if apart else LEAST)
    long_first = sum(d > 0 for d in differences) >= sum(d < 0 for d in differences)
    rng = random.Random(seed)
    chosen = sorted(rng.sample(range(len(usable)), min(count, len(usable))))
    made = []
    for pair in (usable[number] for number in chosen):
        side = rng.choice((pair.positive, pair.negative))
        long = _with_filler(tokenizer, side, tokens, rng)
        first, second = (long, side) if long_first else (side, long)
        made.append(replace(pair, positive=first, negative=second))
    control = Pairs.of(made, f"length control of {pairs.source}")
    return replace(control, chat_template=pairs.chat_template)


def _with_filler(tokenizer, side: str, tokens: int, rng: random.Random) -> str:
    """A continuation behind words in parentheses, of which there are enough to add so many tokens (or all)."""
    words = rng.sample(FILLERS, len(FILLERS))
    blank = side[: len(side) - len(side.lstrip())]
    rest = side[len(blank) :]
    texts = [f"{blank}({', '.join(words[: n + 1])}) {rest}" for n in range(len(words))]
    before, *after = map(len, encode(tokenizer, [side, *texts], add_special_tokens=False))
    return next((text for text, length in zip(texts, after) if length - before >= tokens), texts[-1])


def _of_site(momentum: Momentum, control: Momentum, site: str, k: int):
    """What the control says of a site's top AUs; their layers, columns and betas."""
    counters, width = control.counters(site), momentum.model.widths[site]
    order = ranking(momentum, site)[:k]
    beta = signed_rate(momentum.counters(site), momentum.pairs).flatten()[order]
    reacts = discoveries(counters, 0.05)  # [layers, width]
    up = counters.positive > counters.negative
    rows, columns = order // width, order % width
    same = reacts[rows, columns] & (up[rows, columns] == (beta >= 0))
    # The chance of an AU of the same layer and sign, were the control blind to the plan.
    rates = torch.stack([(reacts & ~up).double().mean(1), (reacts & up).double().mean(1)])  # [2, layers]
    expected = float(rates[(beta >= 0).long(), rows].sum())
    control_beta = signed_rate(counters, control.pairs).flatten()[order]
    layers = torch.tensor(momentum.layers, device="cpu")[rows]
    reacting = tuple(
        Reacting(int(layers[i]), int(columns[i]), float(beta[i]), float(control_beta[i]))
        for i in same.nonzero().flatten().tolist()
    )
    result = SiteControl(
        site=site,
        k=len(order),
        significant=int(reacts[rows, columns].sum()),
        same_sign=len(reacting),
        expected=expected,
        share_of_site=float(reacts.double().mean()),
        reacting=reacting,
    )
    return result, layers, columns, beta


def _unequal(differences: Sequence[int], count: int, seed: int) -> list[int]:
    """Pairs of unlike length, as many with the one side longer as there are, up to half of ``count`` of either kind."""
    kinds = [[i for i, d in enumerate(differences) if sign * d > 0] for sign in (1, -1)]
    if min(map(len, kinds)) < FEWEST:
        return []
    rng = random.Random(seed)
    return sorted(i for kind in kinds for i in rng.sample(kind, min(len(kind), max(FEWEST, count // 2))))
