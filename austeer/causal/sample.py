"""Which AUs a causal check tries: top ones, random ones that match them, some of every |beta|, and groups of ten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SelectionError, check_count
from ..momentum.by_effect import DAMPING, Candidates
from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..statistics import ranking, signed_rate

#: A match is drawn among so many AUs of the layer that are nearest in scale: near enough to be alike, many enough to
#: be random.
NEAREST = 8

#: AUs of a group that is steered together.
GROUP = 10

#: Classes of |beta|, of equal width, from which as many AUs each are taken as there are.
CLASSES = 10


@dataclass(frozen=True)
class Scale:
    """How large the activations of a site are, at the last token of the held-out texts; float64 [layers, width].

    Attributes:
        size: the mean of |x|. deviation: the standard deviation of x.
    """

    size: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, activations: Tensor) -> Scale:
        """From activations [texts, layers, width]."""
        rows = [activations[:, row].double() for row in range(activations.shape[1])]
        return cls(torch.stack([x.abs().mean(0) for x in rows]), torch.stack([x.std(0, correction=0) for x in rows]))

    def features(self) -> Tensor:
        """float64 [layers, width, 2], in which AUs of like scale are near each other."""
        floor = torch.finfo(torch.float32).tiny  # of an AU that is never active
        return torch.stack([self.size, self.deviation], -1).clamp(min=floor).log()


@dataclass(frozen=True)
class Sample:
    """AUs as row * width + index in the site's counters, int64.

    Attributes:
        top: the best ones by momentum, best first. matched: for each of them a random one.
        spread: others, of every |beta|.
        effect: those of the largest predicted effect, up or down, of a shift by their mean difference; per_side_effect:
            those of the largest one for its side effect, by a shift of any size. Empty where that is not known.
    """

    top: Tensor
    matched: Tensor
    spread: Tensor
    effect: Tensor
    per_side_effect: Tensor

    def units(self) -> Tensor:
        """All of them, once each, ascending: layer by layer."""
        return torch.cat([*vars(self).values()]).unique()


def draw(
    momentum: Momentum, site: str, scale: Scale, n: int, spread: int, seed: int = 0, profile: Profile | None = None
) -> Sample:
    """
    Args:
        n: how many of the top AUs of each kind, and as many matched ones. spread: how many of every |beta|.
        profile: what side effects are known from.

    Raises:
        SelectionError: numbers that the site does not have AUs for, or a profile and no effects.
    """
    counters = momentum.counters(site)
    total = counters.positive.numel()
    n = check_count("n", n, total // 2, f"half of the AUs of {site!r}", SelectionError)
    spread = check_count("sample", spread, total, f"AUs of {site!r}", SelectionError)
    # Each with its own, so that a larger n or spread keeps what was drawn before, and a record of it is of use.
    first, second = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    top = ranking(momentum, site)[:n]
    strength = signed_rate(counters, momentum.pairs).abs().flatten()
    effect = efficient = torch.empty(0, dtype=torch.int64, device="cpu")
    if momentum.effects is not None:
        effect = gains(momentum, site).abs().argsort(descending=True, stable=True)[:n]
    if profile is not None:
        efficient = per_side_effect(momentum, site, profile).argsort(descending=True, stable=True)[:n]
    matched = match(top, scale.features(), first)
    return Sample(top, matched, stratified(strength, spread, second), effect, efficient)


def gains(momentum: Momentum, site: str) -> Tensor:
    """The predicted effect of shifting each AU by its mean difference, nats: float64 [layers * width]."""
    return (momentum.effect(site) * momentum.counters(site).delta_sum / momentum.pairs).flatten()


def per_side_effect(momentum: Momentum, site: str, profile: Profile) -> Tensor:
    """The predicted effect of shifting each AU alone as far as its KL is 1 nat a token: float64 [layers * width].

    Raises:
        SelectionError: no effects, no profile of the site, or one of another model.
    """
    found = Candidates.of(momentum, profile, [site])
    return found.g.abs() / (found.diagonal + DAMPING * found.diagonal.mean()).sqrt()


def draw_groups(
    momentum: Momentum, site: str, count: int, seed: int = 0, profile: Profile | None = None
) -> dict[str, Tensor]:
    """AUs that are steered together, for each way of choosing them: int64 [count, GROUP].

    The best ``count`` times ``GROUP`` AUs by momentum, by predicted effect, and (with a profile) by effect per side
    effect among those whose mean difference has the sign of the effect: the best ten, the next ten, and so on. And
    random ones.

    Raises:
        SelectionError: more groups than the site has AUs for, or no effects.
    """
    gain = gains(momentum, site)
    usable = int((gain > 0).sum())
    of = f"{usable} AUs of {site!r} have an effect of the sign of their mean difference"
    count = check_count("groups", count, usable // GROUP, of, SelectionError)
    most, generator = count * GROUP, torch.Generator().manual_seed(seed)
    found = {
        "random": torch.randperm(len(gain), generator=generator, device="cpu")[:most],
        "momentum": ranking(momentum, site)[:most],
        "effect": gain.argsort(descending=True, stable=True)[:most],
    }
    if profile is not None:
        score = torch.where(gain > 0, per_side_effect(momentum, site, profile), -1.0)
        found["per_side_effect"] = score.argsort(descending=True, stable=True)[:most]
    return {kind: units.reshape(count, GROUP) for kind, units in found.items()}


def match(top: Tensor, features: Tensor, generator: torch.Generator) -> Tensor:
    """For each AU of ``top`` another of its layer, not among them, of like scale; each is taken once.

    Args:
        features: [layers, width, 2], see :meth:`Scale.features`.

    Raises:
        SelectionError: a layer has too few AUs that are not among the top.
    """
    layers, width = features.shape[:2]
    free = torch.ones(layers * width, dtype=torch.bool, device="cpu")
    free[top] = False
    found = []
    for unit in top.tolist():
        row = unit // width
        there = free[row * width : (row + 1) * width].nonzero()[:, 0]
        if not len(there):
            raise SelectionError(
                f"n: found {len(top)} top AUs, more than half of the {width} AUs of a layer (row {row}) among them, so "
                "that none is left to match them; expected fewer"
            )
        distance = (features[row, there] - features[row, unit % width]).norm(dim=-1)
        near = there[torch.argsort(distance, stable=True)[:NEAREST]]
        chosen = row * width + int(near[torch.randint(len(near), (), generator=generator, device="cpu")])
        free[chosen] = False
        found.append(chosen)
    return torch.tensor(found, device="cpu")


def stratified(strength: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` places of ``strength``, equally many of each of ``CLASSES`` classes of its range, as far as there are.

    A sample of all AUs would have hardly any of a large |beta|, and one of the top hardly any other: neither shows
    whether an effect goes with it.
    """
    low, high = float(strength.min()), float(strength.max())
    width = (high - low) / CLASSES or 1.0
    label = ((strength - low) / width).long().clamp(max=CLASSES - 1)
    members = [(label == number).nonzero()[:, 0] for number in range(CLASSES)]
    members = [places[torch.randperm(len(places), generator=generator, device="cpu")] for places in members]
    turns = [(turn, number) for number, places in enumerate(members) for turn in range(len(places))]
    return torch.tensor([int(members[number][turn]) for turn, number in sorted(turns)[:count]], device="cpu")
