"""check_pairs(): what tells the sides of pairs apart besides their meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn

from ..errors import PairsError
from ..forward.tokens import length_limit, within
from ..measuring.measure import measure
from ..models.structure import text_config
from ..momentum.momentum import Momentum
from ..pairs.chat import ChatForm
from ..pairs.pair import FIELDS, Pair, optional_fields, pair_of
from ..pairs.pairs import Pairs
from ..pairs.readers import open_source
from ..pairs.stream import PairStream
from ..statistics import smallest_pairs
from .findings import PairsFinding, worst
from .length_control import LengthControl, SiteControl, length_control
from .side_checks import (
    Sides,
    check_answer_words,
    check_beginning,
    check_boundary,
    check_last_token,
    check_length,
    check_truncation,
)
from .text_checks import check_blank, check_contradictions, check_identical, check_prompts, with_sides

#: More of the top AUs than expected that react to length alone, as a share of k; and share of k that follow length.
WARNING, GRAVE = 0.1, 0.3

#: A context that a tokenizer names if it knows none is larger than this.
NO_LIMIT = 10**9


def check_pairs(
    pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str]],
    tokenizer,
    model: nn.Module | None = None,
    momentum: Momentum | None = None,
    *,
    config: Any = None,
    k: int = 100,
    control_count: int = 200,
    max_length: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> PairsReport:
    """Looks for artefacts: lengths, last tokens, answer words, prompts that come again, blank and equal sides.

    Only the tokenizer is needed. With a model, a control measurement tells how many AUs react to length alone.

    Args:
        pairs: also such with blank sides, which :func:`austeer.load_pairs` refuses (:func:`read_unchecked`).
        model: measures the control (:mod:`austeer.making.length_control`).
        momentum: of these pairs on the model; measured here if a model is given without.
        config: the model's, for its context and the number of its AUs; by default the model's own.
        k: how many of each site's top AUs are looked at. control_count: how many pairs are run for the control.
        max_length: texts are cut to so many tokens.

    Raises:
        PairsError: fewer than 2 pairs, or momentum without a model.
        SelectionError: momentum of another model.
    """
    if momentum is not None and model is None:
        raise PairsError("momentum: found it without a model, expected the model on which it was measured")
    pairs = _as_pairs(pairs)
    if len(pairs) < 2:
        raise PairsError(f"{pairs.source}: found {len(pairs)} pairs, expected at least 2")
    config = text_config(model) if config is None and model is not None else config
    limit = within(max_length, _context(config, tokenizer)) if model is None else length_limit(model, max_length)
    findings, sides = _texts(pairs, tokenizer, limit)
    findings += _enough(len(sides), config, momentum)
    control = None
    if model is not None and len(sides) >= 2:
        kept = replace(pairs, items=with_sides(pairs))
        if momentum is None:
            momentum = measure(model, tokenizer, kept, max_length=max_length, progress=progress)
        control = length_control(
            model,
            tokenizer,
            kept,
            momentum,
            k=k,
            count=control_count,
            seed=seed,
            max_length=max_length,
            progress=progress,
        )
        findings += [_of_control(control, site) for site in control.sites.values()]
    return PairsReport(pairs.source, len(pairs), len(sides), tuple(findings), control)


def grave_note(pairs: Iterable[Pair], tokenizer, *, chat_template: ChatForm = False, limit: int = 1000) -> str | None:
    """One line on what is grave in the first pairs, by their texts and tokens alone; None if nothing is.

    Args:
        chat_template: whether the prompts hold a chat template.
    """
    read: list[Pair] = []
    with suppress(PairsError):  # a row that cannot be read is for the measurement to tell
        read.extend(islice(pairs, limit))
    some = Pairs(tuple(read), chat_template=chat_template)
    if len(some) < 2:
        return None
    grave = [finding for finding in _texts(some, tokenizer, None)[0] if finding.level == "grave"]
    if not grave:
        return None
    names = ", ".join(finding.name for finding in grave)
    return f"pairs have grave artefacts ({names}): {grave[0].verdict}; see austeer pairs check"


def read_unchecked(source: Any, names: Mapping[str, str] | None = None, limit: int | None = None) -> Pairs:
    """Pairs as they stand in a source, with blank sides too; arguments as of :func:`austeer.load_pairs`.

    Args:
        names: what the fields prompt, positive and negative are called.

    Raises:
        PairsError: no such source, a damaged row, or a field that is missing or no text.
    """
    names = dict(zip(FIELDS, FIELDS)) | dict(names or {})
    opened = open_source(source)
    with closing(opened.read(set(names.values()), optional_fields(names))) as rows:
        found = tuple(pair_of(row, names, place, blank=True) for place, row in islice(rows, limit))
    return Pairs(found, opened.name)


def _texts(pairs: Pairs, tokenizer, limit: int | None) -> tuple[list[PairsFinding], Sides]:
    whole = with_sides(pairs)
    sides = Sides.of(tokenizer, whole, not pairs.chat_template)
    findings = [
        check_blank(pairs),
        check_identical(len(whole) - len(sides), len(pairs)),
        check_prompts(pairs),
        check_contradictions(whole),
    ]
    if len(sides):
        findings += [
            check_length(sides),
            check_last_token(tokenizer, sides),
            check_answer_words(sides),
            check_beginning(tokenizer, sides, not pairs.chat_template),
            check_boundary(sides),
            check_truncation(sides, limit),
        ]
    return findings, sides


def _as_pairs(pairs: Pairs | PairStream | Iterable[Pair | Mapping[str, str]]) -> Pairs:
    if isinstance(pairs, (Pairs, PairStream)):
        return Pairs.of(pairs)
    listed = list(pairs)
    made = tuple(pair for pair in listed if isinstance(pair, Pair))
    return Pairs(made) if len(made) == len(listed) else Pairs.of(listed)


def _context(config: Any, tokenizer) -> int | None:
    found = getattr(config, "max_position_embeddings", None) or getattr(tokenizer, "model_max_length", None)
    return found if found is not None and found < NO_LIMIT else None


def _enough(usable: int, config: Any, momentum: Momentum | None) -> list[PairsFinding]:
    """Whether one unanimous AU could pass at 5 % false discoveries."""
    if momentum is not None:
        size = max(counters.positive.numel() for counters in momentum.sites.values())
    elif all(getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers")):
        size = config.hidden_size * config.num_hidden_layers
    else:
        return []
    needed = smallest_pairs(size, 0.05)
    numbers = {"usable": usable, "needed": needed, "aus": size}
    if usable >= needed:
        verdict = (
            f"{usable} pairs; {needed} are the fewest on which one of {size} AUs can pass at 5 % false discoveries"
        )
        return [PairsFinding("number of pairs", "ok", verdict, numbers=numbers)]
    verdict = (
        f"with {usable} pairs no AU can pass at 5 % false discoveries, not even one that all of them agree on: among "
        f"{size} AUs that takes {needed}"
    )
    remedy = f"give {needed} pairs or more (austeer inspect tells how many a weaker signal takes)"
    return [PairsFinding("number of pairs", "grave", verdict, remedy, numbers)]


def _of_control(control: LengthControl, site: SiteControl) -> PairsFinding:
    verdict = (
        f"{site.same_sign} of the top {site.k} AUs react to length alone (a filler of {control.tokens:.0f} tokens) "
        f"with the sign that they have in the pairs; by chance {site.expected:.0f} would"
    )
    level = "grave" if site.excess >= GRAVE else "warning" if site.excess >= WARNING else "ok"
    if control.balanced and level != "ok":
        level = "note"
        verdict += ". Neither side of the pairs tends to be longer, so length has not chosen them"
    if site.turns is not None:
        verdict += (
            f". The signs of {site.depends} depend on which side is longer ({site.longer} pairs with the positive one, "
            f"{site.shorter} with the negative), and {site.turns} turn with it"
        )
        share = site.turns / site.k
        level = worst(level, "grave" if share >= GRAVE else "warning" if share >= WARNING else "ok")
    remedy = "" if level == "ok" else "make both sides equally long, measure again, and compare the two plans"
    numbers = {name: value for name, value in site.to_json().items() if name != "reacting"}
    return PairsFinding(f"length alone, {site.site}", level, verdict, remedy, numbers)


@dataclass(frozen=True)
class PairsReport:
    """What :func:`austeer.making.check_pairs` found.

    Attributes:
        source: where the pairs are from. pairs: how many. usable: how many of them have two sides that differ.
        findings: one for each thing that was looked at.
        control: what the AUs do with length alone, if the model was asked.
    """

    source: str
    pairs: int
    usable: int
    findings: tuple[PairsFinding, ...]
    control: LengthControl | None = None

    def of(self, level: str) -> tuple[PairsFinding, ...]:
        """The findings of a level."""
        return tuple(found for found in self.findings if found.level == level)

    def __getitem__(self, name: str) -> PairsFinding:
        """The finding of a name; raises KeyError if that was not looked at."""
        found = next((finding for finding in self.findings if finding.name == name), None)
        if found is None:
            raise KeyError(f"{name!r}; found {', '.join(finding.name for finding in self.findings)}")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "pairs": self.pairs,
            "usable": self.usable,
            "findings": [finding.to_json() for finding in self.findings],
            "length_control": None if self.control is None else self.control.to_json(),
        }
