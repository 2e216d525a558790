"""Activation momentum: mergeable counters, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..counters import Counters, counters_from, tensors_of
from ..errors import FileFormatError, SelectionError
from ..models.sites import Fingerprint, ascending
from ..pairs.chat import ChatForm, check_chat_form
from ..plans.plan import Plan
from ..utils import files
from .profile import Profile
from .report import MeasureReport

FORMAT, VERSION = "austeer-momentum", 3


def _without_half(header: dict[str, Any]) -> dict[str, Any]:
    if "half_pairs" in header:
        raise ValueError("found the field 'half_pairs' in version 1")
    return {**header, "half_pairs": None}


def _without_effects(header: dict[str, Any]) -> dict[str, Any]:
    if "effects" in header:
        raise ValueError("found the field 'effects' in version 2")
    return {**header, "effects": False}


#: For each older version, what makes its header one of the next version.
MIGRATIONS: dict[int, files.Migration] = {1: _without_half, 2: _without_effects}


@dataclass(frozen=True, eq=False)
class Momentum:
    """Activation momentum of every AU at one or more sites (paper: r_pos and r_neg, before the division).

    Attributes:
        sites: site name -> ``Counters``.
        pairs: the number of pairs counted.
        model: what it was measured on.
        chat_template: whether the prompts went through a chat template, with its options if it had any.
        cut: texts that were cut on the left to fit the model.
        identical: pairs whose two texts have the same tokens (they add to ``pairs`` only).
        sources: where the pairs come from.
        layers: which layer each row of the counters is; all of the model's where not given.
        half: the counters of one half of the pairs (:mod:`austeer.pairs.halves`), which are in ``sites``, too; None
            where they are not known. half_pairs: how many pairs that half has; pairs with equal sides are in the other.
        effects: the momentum of the effects of the same pairs, if they were measured: counted like activations is for
            each pair the gradient of log p(positive) - log p(negative) by a shift of the AU, nats a unit of the AU.
        report: how the measurement went (:class:`austeer.momentum.report.MeasureReport`), if this is a fresh one. Not
            saved.
    """

    sites: Mapping[str, Counters]
    pairs: int
    model: Fingerprint
    chat_template: ChatForm = False
    cut: int = 0
    identical: int = 0
    sources: tuple[str, ...] = field(default=())
    layers: tuple[int, ...] = ()
    half: Mapping[str, Counters] | None = None
    half_pairs: int = 0
    effects: Momentum | None = None
    report: MeasureReport | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers) or tuple(range(self.model.layers)))

    def counters(self, site: str) -> Counters:
        """Raises SelectionError if ``site`` was not measured."""
        if site not in self.sites:
            raise SelectionError(
                f"site {site!r} was not measured; found {', '.join(self.sites)}. Measure it: sites=[{site!r}]"
            )
        return self.sites[site]

    def effect(self, site: str) -> Tensor:
        """The mean effect of each AU, nats a unit of the AU: float64 [layers, width].

        Raises:
            SelectionError: effects were not measured, or not at this site.
        """
        if self.effects is None:
            raise SelectionError(
                "effects: found momentum without them, expected one of measure(..., effects=True); measure again "
                "(austeer measure --effects)"
            )
        return self.effects.counters(site).delta_sum / self.pairs

    def with_effects(self, sites: Mapping[str, Counters], half: Mapping[str, Counters] | None) -> Momentum:
        """The same with the counters of its effects, and those of the half."""
        found = replace(self, sites=sites, half=half, half_pairs=self.half_pairs if half else 0, report=None)
        return replace(self, effects=found)

    def halves(self) -> tuple[Momentum, Momentum]:
        """The momentum of each of two disjoint halves of the pairs, of nearly the same size where prompts are many.

        Raises:
            SelectionError: the halves are not known, or one of them is empty.
        """
        if self.half is None:
            raise SelectionError(
                "halves: found momentum without halves, from an older version or merged with such; expected the "
                "counters of two halves of the pairs. Measure again"
            )
        sizes = (self.half_pairs, self.pairs - self.half_pairs)
        if min(sizes) < 1:
            raise SelectionError(
                f"halves: found all {self.pairs} pairs in one half, expected some in each: pairs of one prompt stay "
                "together. Give pairs of more prompts"
            )
        rest = {site: counters - self.half[site] for site, counters in self.sites.items()}
        plain = replace(self, half=None, half_pairs=0, cut=0, report=None)
        effects = (None, None) if self.effects is None else self.effects.halves()
        return (
            replace(plain, sites=self.half, pairs=sizes[0], identical=0, effects=effects[0]),
            replace(plain, sites=rest, pairs=sizes[1], effects=effects[1]),
        )

    def in_layers(self, layers: Sequence[int]) -> Momentum:
        """The momentum of some of its layers, in ascending order.

        Raises:
            SelectionError: no layer, or one that was not measured.
        """
        chosen = sorted(set(layers))
        if not chosen or not set(chosen) <= set(self.layers):
            raise SelectionError(f"layers: found {list(layers)}, expected some of those measured: {list(self.layers)}")
        rows = [self.layers.index(layer) for layer in chosen]

        def some(sites: Mapping[str, Counters]) -> dict[str, Counters]:
            return {name: Counters(*(t[rows] for t in c.tensors().values())) for name, c in sites.items()}

        return replace(
            self,
            sites=some(self.sites),
            layers=tuple(chosen),
            half=None if self.half is None else some(self.half),
            effects=None if self.effects is None else self.effects.in_layers(chosen),
            report=None,
        )

    def select(
        self,
        site: str | Sequence[str],
        k: int | None = None,
        *,
        rank: str | None = None,
        step: str | None = None,
        profile: Profile | None = None,
        kl: float | None = None,
        max_fdr: float | None = None,
        min_stability: float | None = None,
        ties: str = "effect",
        operation: str | None = None,
        layers: Sequence[int] | None = None,
    ) -> Plan:
        """The best k AUs over all layers of a site together, as a plan.

        Without a profile the AUs of largest |beta| (paper, selection). With one, and with effects, those of the largest
        effect for their side effect, which can be of several sites (:mod:`austeer.momentum.by_effect`).

        Example:
            >>> plan = momentum.select("attention", k=10, operation="shift")
            >>> len(plan), plan.operation, plan.sites
            (10, 'shift', ('attention',))
            >>> strict = momentum.select("ffn", max_fdr=0.01)  # as many as stand out from chance
            >>> len(strict) > 0
            True
            >>> whole = momentum.select("ffn", layers=[1], operation="ablate")  # a direction of all AUs of a layer
            >>> len(whole) == momentum.model.widths["ffn"]
            True

        Args:
            site: a measured site. By effect also several, whose AUs are ranked together, or "auto": that of the largest
                predicted effect at equal side effect, or all of them, if together they have more.
            k: how many AUs.
            rank: "momentum", |beta|; "difference", |delta|; "effect". By default "effect" if there is a profile.
            step: of rank "effect", what a strength of 1 shifts by: "difference", delta; "newton" (the default), the
                shifts of the largest effect for their side effect, scaled so that alpha = 1 has a predicted KL of
                ``kl``, or 0.1.
            profile: of the model, for rank "effect"; with every rank it gives a plan of "shift" its dose.
            kl: by effect, instead of k, the KL on neutral text to steer with, nats a token (then steer with
                ``steer(model, plan, kl=...)``): as few AUs as have nearly the largest predicted effect at it.
            max_fdr: instead of k, all AUs that a two-sided sign test with Benjamini-Hochberg's correction over the site
                keeps at this false discovery rate.
            min_stability: instead of k, the largest k (ten to a factor of ten, from 10 to a tenth of the site) of
                which the two halves of the pairs agree on at least this share, corrected for chance: the score of
                :class:`austeer.statistics.Stability`. All pairs together agree on more than their halves do.
            ties: "effect" or "public", see :func:`austeer.statistics.ranking`.
            operation: what steering does with them: "scale" (the paper), "push", "shift" or "ablate"; by effect
                "shift".
            layers: choose among the AUs of these layers alone; of one site, and without k or what stands for it, all
                of them.

        Raises:
            SelectionError: k, kl, max_fdr or min_stability out of range, not exactly one of them given, a site that was
                not measured, no AU that passes (with the number of pairs that it takes), momentum without halves or
                effects, a profile of another model, or no k that is as stable (with the most stable one).
        """
        from .selection import Asked, selected  # brings scipy

        asked = Asked(site, k, kl, max_fdr, min_stability, rank, step, ties, operation, layers)
        return selected(self, asked, profile)

    def merge(self, other: Momentum) -> Momentum:
        """The momentum of both sets of pairs, in any order; with halves and effects if both have them.

        Raises:
            SelectionError: the two are of different models, sites, layers or prompt forms.
        """
        if set(self.sites) != set(other.sites):
            raise SelectionError(f"merge: found sites {sorted(other.sites)}, expected {sorted(self.sites)}")
        for what in ("model", "layers", "chat_template"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise SelectionError(f"merge: found {what} {theirs}, expected {mine}; only like momentum adds up")
        effects = None
        if self.effects is not None and other.effects is not None:
            effects = self.effects.merge(other.effects)
        half = None
        if self.half is not None and other.half is not None:
            half = {name: self.half[name] + other.half[name] for name in self.half}
        return replace(
            self,
            sites={name: self.sites[name] + other.sites[name] for name in self.sites},
            half=half,
            half_pairs=0 if half is None else self.half_pairs + other.half_pairs,
            pairs=self.pairs + other.pairs,
            cut=self.cut + other.cut,
            identical=self.identical + other.identical,
            sources=tuple(sorted({*self.sources, *other.sources})),
            effects=effects,
            report=None,
        )

    def save(self, path: str | Path) -> Path:
        """Writes a ``.safetensors`` file (counters, and a JSON header with the rest)."""
        header: dict[str, Any] = {name: getattr(self, name) for name in ("pairs", "chat_template", "cut", "identical")}
        header |= {"model": self.model.to_json(), "sites": list(self.sites)}
        header |= {"sources": list(self.sources), "layers": list(self.layers)}
        header["half_pairs"] = None if self.half is None else self.half_pairs
        header["effects"] = self.effects is not None
        tensors = tensors_of(self.sites, self.half)
        if self.effects is not None:
            tensors |= {f"effects.{name}": t for name, t in tensors_of(self.effects.sites, self.effects.half).items()}
        files.write(Path(path), FORMAT, VERSION, header, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Momentum:
        """Raises FileFormatError if the file is missing, truncated, foreign or inconsistent."""
        header, tensors = files.read(Path(path), FORMAT, VERSION, migrations=MIGRATIONS)
        try:
            model = Fingerprint.from_json(header.pop("model"))
            layers = header.pop("layers", None)  # older files have none, and all layers
            layers = tuple(range(model.layers)) if layers is None else ascending(layers, model.layers)
            check_chat_form(header["chat_template"])
            names, effects = header.pop("sites"), header.pop("effects")
            pairs, half_pairs = header["pairs"], header.pop("half_pairs")
            sizes = {site: (len(layers), model.widths[site]) for site in names}
            sites, half = _read_counters(tensors, sizes, pairs, half_pairs)
            found = cls(
                sites=sites,
                model=model,
                sources=tuple(header.pop("sources")),
                layers=layers,
                half=half,
                half_pairs=half_pairs or 0,
                **header,
            )
            if effects is not True:
                return found
            own = {name.removeprefix("effects."): t for name, t in tensors.items() if name.startswith("effects.")}
            return found.with_effects(*_read_counters(own, sizes, pairs, half_pairs))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: inconsistent content ({error}); measure again") from error


def _read_counters(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]], pairs: int, half_pairs: int | None
) -> tuple[dict[str, Counters], dict[str, Counters] | None]:
    """The counters of the sites and of their half, from a file; raises ValueError where they are no counters."""
    sites = counters_from(tensors, sizes)
    for site, counters in sites.items():
        _check_counters(counters, sizes[site], pairs)
    if half_pairs is None:
        return sites, None
    half = counters_from(tensors, sizes, half=True)
    for site, counters in half.items():
        _check_counters(counters, sizes[site], half_pairs)
        _check_counters(sites[site] - counters, sizes[site], pairs - half_pairs)
    return sites, half


def _check_counters(counters: Counters, shape: tuple[int, ...], pairs: int) -> None:
    for name, t in counters.tensors().items():
        expected = torch.int64 if name in ("positive", "negative") else torch.float64
        if tuple(t.shape) != shape or t.dtype != expected:
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, expected {expected} {list(shape)}")
    both = counters.positive + counters.negative
    if not isinstance(pairs, int) or both.max() > pairs or min(counters.positive.min(), counters.negative.min()) < 0:
        raise ValueError(f"counts do not fit {pairs} pairs")
