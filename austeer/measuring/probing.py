"""fit_probe: two sets of prompts -> a direction, its layer, and a threshold with a known rate of false positives."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from ..errors import CaptureError, PairsError, SelectionError, SteeringError, check_count
from ..forward.batch_size import automatic_batch_tokens
from ..forward.capture import LastTokens
from ..forward.causality import plain_batches
from ..forward.tokens import check_vocabulary, encode, length_limit
from ..models.sites import Layout, Site, find_sites, fingerprint, site_at
from ..models.structure import evaluating, input_device, is_steered, unwrap, vocabulary_size
from ..pairs.chat import ChatForm, check_chat, options_of, render_chat
from ..plans.probe import Probe, ProbeEvidence, Rate
from ..statistics.intervals import share_interval
from ..utils.progress import Progress

#: Wanted prompts, and unwanted ones, of which each part has something.
FEWEST = 8


@dataclass(frozen=True)
class _Parts:
    """Prompts by what they are for, as numbers of texts.

    Attributes:
        wanted, unwanted: for the direction and its layer. threshold: unwanted ones that it is chosen on.
        held_out, held_out_unwanted: for the rates that are reported.
    """

    wanted: list[int]
    unwanted: list[int]
    threshold: list[int]
    held_out: list[int]
    held_out_unwanted: list[int]


@torch.no_grad()
def fit_probe(
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    site: str = "layer",
    layer: int | None = None,
    false_positive_rate: float = 0.01,
    chat: ChatForm = False,
    batch_tokens: int | None = None,
    layout: Layout | None = None,
    progress: bool | None = False,
) -> Probe:
    """Finds what tells prompts that a plan is for from others, at the last token of one layer.

    Example:
        >>> wanted, others = [f"Is the {n} room nice?" for n in range(40)], [f"Add {n} and 7." for n in range(160)]
        >>> probe = austeer.fit_probe(model, tokenizer, wanted, others, false_positive_rate=0.02)
        >>> probe.site, probe.evidence.calibration, probe.evidence.false_positives.total
        ('layer', 80, 40)
        >>> with austeer.steer(model, plan, alpha=8, scope="generation", when=probe) as steering:
        ...     there = model.generate(**tokenizer("Add 9 and 7.", return_tensors="pt"), max_new_tokens=4)
        ...     steering.report().when.decided
        1

    The direction is the mean difference, as :func:`austeer.measure` has it, here between texts that need not be pairs.
    Half of the wanted prompts and a quarter of the others make it, and choose its layer by how far apart it holds the
    half of them that it was not made of. The threshold is chosen on half of the others: with n of them, it is the score
    that floor(rate * (n + 1)) of them reach, so that a new prompt of their kind scores higher at most at that rate,
    whatever the distribution. The rest is for the rates that are reported, and nothing else. Which prompt is for what
    is decided by its text; equal ones count once.

    Args:
        model, tokenizer: as for :func:`austeer.measure`; the model is run as it is, so not while it is steered.
        positive: prompts after which the plan is to run. negative: others, as they come.
        site: where activations are read, one of :data:`austeer.models.sites.SITE_NAMES`. layer: by default the best.
        false_positive_rate: the share of prompts like ``negative`` on which it may fire.
        chat: put the prompts through the chat template; with options if it is a dictionary.
        batch_tokens: tokens in a batch, with padding. layout: attribute paths of a family that is not known.
        progress: True (a bar), False (nothing), or None (a bar on a terminal, lines elsewhere).

    Returns:
        The probe, with its rates on held-out prompts in ``evidence``.

    Raises:
        PairsError: too few prompts, one in both sets, one without a token or too long.
        SelectionError: a rate that so few prompts cannot show, or a direction that is zero.
        SiteError: a site or layer that the model lacks. CaptureError: activations that are not finite.
        SteeringError: the model is steered.
    """
    if is_steered(model):
        raise SteeringError("the model is steered: its activations are not its own. Leave the steering context first")
    texts, wanted = _texts(positive, negative)
    parts = _parts(texts, wanted, false_positive_rate)
    model = unwrap(model)
    found = find_sites(model, site, layout)
    sites = found[site] if layer is None else [site_at(found[site], layer)]
    states = _last_tokens(model, tokenizer, texts, sites, chat, batch_tokens, progress)  # [texts, sites, width]
    number = 0 if len(sites) == 1 else _best(states, parts)
    at = states[:, number].double()
    direction = at[parts.wanted].mean(0) - at[parts.unwanted].mean(0)
    length = float(direction.norm())
    if not 0 < length < math.inf:
        raise SelectionError(
            f"site {site!r} of layer {sites[number].layer}: found a mean difference of length {length}, expected one "
            "that tells the prompts apart; give others, or another layer"
        )
    unit = (direction / length).float()
    scores = states[:, number] @ unit
    allowed = _allowed(false_positive_rate, len(parts.threshold))
    threshold = float(scores[parts.threshold].sort(descending=True).values[allowed - 1])
    return Probe(
        site=site,
        layer=sites[number].layer,
        direction=unit,
        threshold=threshold,
        model=fingerprint(model, {site: found[site]}),
        chat_template=chat,
        evidence=_evidence(scores, threshold, parts, allowed, false_positive_rate),
    )


def _texts(positive: Sequence[str], negative: Sequence[str]) -> tuple[list[str], int]:
    """All different prompts, the wanted ones first, and how many those are."""
    for name, given in (("positive", positive), ("negative", negative)):
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise PairsError(f"{name}: found {given!r:.80}, expected a list of texts")
    wanted, others = (list(dict.fromkeys(given)) for given in (positive, negative))
    if both := {*wanted} & {*others}:
        raise PairsError(f"positive: found {min(both)!r:.60} among negative, too, expected different prompts")
    for name, found in (("positive", wanted), ("negative", others)):
        if len(found) < FEWEST:
            raise PairsError(f"{name}: found {len(found)} different prompts, expected at least {FEWEST}")
    return wanted + others, len(wanted)


def _parts(texts: Sequence[str], wanted: int, rate: object) -> _Parts:
    """Which prompt is for what.

    Raises:
        SelectionError: no rate, or one that so few prompts cannot show.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < float(rate) < 1:
        raise SelectionError(f"false_positive_rate: found {rate!r}, expected a number between 0 and 1")
    ordered = sorted(range(len(texts)), key=lambda i: hashlib.blake2b(texts[i].encode(), digest_size=16).digest())
    yes, no = ([i for i in ordered if (i < wanted) is side] for side in (True, False))
    first, second = len(no) // 4, len(no) // 4 + len(no) // 2
    parts = _Parts(yes[: len(yes) // 2], no[:first], no[first:second], yes[len(yes) // 2 :], no[second:])
    if _allowed(float(rate), len(parts.threshold)) == 0:
        needed = math.ceil(1 / float(rate)) - 1
        raise SelectionError(
            f"false_positive_rate: found {rate:g} and {len(parts.threshold)} negative prompts to choose the threshold "
            f"on (half of {len(no)}), expected at least {needed} (of {2 * needed}), or a rate of at least "
            f"{1 / (len(parts.threshold) + 1):.3g}"
        )
    return parts


def _allowed(rate: float, count: int) -> int:
    """How many of the prompts that the threshold is chosen on may reach it."""
    return min(math.floor(rate * (count + 1) * (1 + 1e-12)), count)  # rounding may not make it more than there are


def _last_tokens(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    sites: Sequence[Site],
    chat: ChatForm,
    batch_tokens: int | None,
    progress: bool | None,
) -> Tensor:
    """float32 [texts, sites, width] of each prompt's last token, on the CPU."""
    if chat:
        check_chat(tokenizer, options_of(chat))
        texts = [render_chat(tokenizer, text, options_of(chat)) for text in texts]
    ids = encode(tokenizer, texts, add_special_tokens=not chat)
    limit = length_limit(model, None)
    for text, tokens in zip(texts, ids):
        if not 0 < len(tokens) <= limit:
            raise PairsError(f"found a prompt of {len(tokens)} tokens, {text!r:.60}, expected 1 to {limit}")
    check_vocabulary(vocabulary_size(model), ids)
    device = input_device(model)
    if batch_tokens is None:
        batch_tokens = automatic_batch_tokens(model, device)
    size = check_count("batch_tokens", batch_tokens, None, "tokens in a batch", PairsError)
    name = sites[0].name
    reader = LastTokens(model, {name: sites}, len(ids))
    with evaluating(model), reader.attached(), Progress("prompts", len(ids), "texts", progress) as bar:
        for batch in plain_batches(model, ids, size):
            reader.run(batch)
            bar.advance(len(batch.texts))
    states = reader.buffers[name].float().cpu()
    if not bool(states.isfinite().all()):
        text, number, _ = (~states.isfinite()).nonzero()[0].tolist()
        raise CaptureError(
            f"site {name!r} of layer {sites[number].layer}: found activations that are not finite at "
            f"{texts[text]!r:.60}, expected numbers; load the model in another dtype"
        )
    return states


def _best(states: Tensor, parts: _Parts) -> int:
    """The site at which a direction made of one half of the prompts tells the other half apart best."""
    gaps = torch.zeros(states.shape[1], dtype=torch.float64, device="cpu")
    for own, other in ((0, 1), (1, 0)):
        made = [states[part[own::2]].double().mean(0) for part in (parts.wanted, parts.unwanted)]
        direction = made[0] - made[1]  # [sites, width]
        wanted, unwanted = (
            (states[part[other::2]].double() * direction).sum(-1) for part in (parts.wanted, parts.unwanted)
        )
        spread = (wanted.var(0, correction=0) + unwanted.var(0, correction=0)).sqrt()
        gaps += (wanted.mean(0) - unwanted.mean(0)) / spread.clamp(min=1e-30)
    return int(gaps.argmax())


def _evidence(scores: Tensor, threshold: float, parts: _Parts, allowed: int, rate: float) -> ProbeEvidence:
    wanted, unwanted = scores[parts.held_out], scores[parts.held_out_unwanted]
    low, high = stats.beta(allowed, len(parts.threshold) + 1 - allowed).ppf([0.025, 0.975])
    higher = (wanted[:, None] > unwanted).double() + (wanted[:, None] == unwanted).double() / 2
    return ProbeEvidence(
        asked=float(rate),
        calibration=len(parts.threshold),
        expected_low=float(low),
        expected_high=float(high),
        false_positives=_rate(unwanted > threshold),
        true_positives=_rate(wanted > threshold),
        auc=float(higher.mean()),
    )


def _rate(fired: Tensor) -> Rate:
    hits, total = int(fired.sum()), len(fired)
    return Rate(hits, total, *share_interval(hits, total))
