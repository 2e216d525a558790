"""What do AUs cause? Few are steered, alone or together, and the change of held-out log-odds is measured."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..baselines.pair_activations import pair_activations
from ..errors import SelectionError, TaskError
from ..forward.causality import expect_causal
from ..models.sites import find_sites, fingerprint
from ..models.structure import floating_dtype
from ..models.weights import signature
from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..pairs.chat import describe_form
from ..plans.fit import check_plan_fits
from ..statistics import signed_rate
from ..tasks import Task
from ..tuning.record import Record
from ..utils.environment import environment
from ..utils.progress import Progress
from .runner import Runner, alone
from .sample import Sample, Scale, draw, draw_groups
from .statistics import Findings, findings, verdict
from .together import ALPHAS, Together, jobs_of, together

#: How an AU is steered alone: each way has two sides, and half of their difference is the effect.
WAYS = {
    "scale": "x doubled, against x set to 0",
    "shift": "x plus its mean difference, against x minus it",
    "deviation": "x plus its standard deviation, against x minus it",
}


@dataclass(frozen=True)
class Unit:
    """One AU and what steering it alone did.

    Attributes:
        size, deviation: mean |x| and standard deviation at the last token of the held-out texts.
        groups: those that it is in, of the names of :class:`austeer.causal.sample.Sample`. match: of a top AU, which
            one is its match.
        predicted: what its gradient predicts of ``raised``, nats: the mean effect of a unit of shift on the measured
            pairs, times the shift. Without "scale", whose shifts differ from token to token; empty without effects.
        raised: for each way half the difference of the log-odds between its two sides, mean over items, nats: the
            effect of raising the AU (of amplifying it, under "scale"). For "shift" the side that raises it counts.
    """

    layer: int
    index: int
    beta: float
    delta: float
    size: float
    deviation: float
    groups: tuple[str, ...]
    match: tuple[int, int] | None
    predicted: dict[str, float]
    raised: dict[str, float]

    def wanted(self, way: str) -> float:
        """The effect in the direction that momentum predicts: of raising where beta (shift: delta) is positive."""
        value = self.delta if way == "shift" else self.beta
        return self.raised[way] * (1 if value >= 0 else -1)


@dataclass(frozen=True)
class CausalResult:
    """Attributes:
    items: held-out items. log_odds: their mean, unsteered, nats. pairs: that were measured.
    findings, verdict: for each way. together: of groups of AUs; None without effects, or with none of them.
    """

    model: str
    dtype: str
    site: str
    task: str
    items: int
    log_odds: float
    pairs: int
    n: int
    seed: int
    units: list[Unit]
    findings: dict[str, Findings]
    verdict: dict[str, list[str]]
    together: Together | None
    notes: list[str]
    seconds: float
    environment: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def causal_check(
    model: nn.Module,
    tokenizer,
    task: Task,
    momentum: Momentum,
    site: str,
    *,
    n: int = 25,
    sample: int = 75,
    ways: Sequence[str] = tuple(WAYS),
    profile: Profile | None = None,
    groups: int = 8,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
    batch_tokens: int = 2048,
    record: str | Path | None = None,
    progress: bool | None = None,
) -> CausalResult:
    """Steers the top AUs, matched random AUs, and AUs of every |beta|, each alone, and compares what that does.

    Where momentum has effects, the top AUs by predicted effect are steered, too, and groups of AUs together, and what
    the gradient predicts is compared with what is measured.

    Args:
        task: held-out items, that momentum was not measured on, of kind "choice" or "continuation".
        site: a measured site. n: top AUs, each with a match. sample: AUs over the whole range of |beta|.
        ways: of ``WAYS``.
        profile: the model's, for the top AUs by effect per side effect, and the KL of groups.
        groups: of ten AUs each, of each kind that :func:`austeer.causal.sample.draw_groups` names; 0 for none. alphas:
            the strengths, in mean differences, with which they are steered.
        seed: of what is drawn.
        batch_tokens: tokens in a batch; candidates are its rows.
        record: a file in which finished AUs are kept; with the same model, task and momentum it is gone on with, also
            for other numbers of AUs or other strengths.
        progress: on standard error; by default a bar on a terminal, and elsewhere a line now and then.

    Raises:
        SelectionError: a site that was not measured, an unknown way, a strength that is not positive, more AUs than the
            site has, or a profile with momentum that has no effects, or of another model.
        TaskError: a numeric task, options that cannot be scored, or a model whose attention is not causal.
        PlanError: the momentum is of another model.
        FileFormatError: the record is of another check.
    """
    start = time.perf_counter()
    ways = tuple(dict.fromkeys(ways))
    if not ways or not set(ways) <= set(WAYS):
        raise SelectionError(f"ways: found {list(ways)}, expected some of {', '.join(WAYS)}")
    alphas = tuple(sorted({float(alpha) for alpha in alphas}))
    if not alphas or not all(0 < alpha < math.inf for alpha in alphas):
        raise SelectionError(f"alphas: found {list(alphas)}, expected positive numbers: both signs are steered")
    if task.kind == "numeric":
        raise TaskError(f"{task.name}: found a numeric task, expected options, whose log-odds can change")
    momentum.counters(site)  # refuses a site that was not measured
    expect_causal(model)
    found = find_sites(model, [site])
    check_plan_fits(momentum.select(site, k=1), model, found)
    _check_profile(profile, model)
    sites = [place for place in found[site] if place.layer in momentum.layers]
    grouped = {}
    if momentum.effects is not None and groups != 0:
        grouped = draw_groups(momentum, site, groups, seed, profile)
    held_out = pair_activations(model, tokenizer, task.pairs(), sites)
    scale = Scale.of(torch.cat([held_out.positive, held_out.negative]))
    chosen = draw(momentum, site, scale, n, sample, seed, profile)
    settings = {
        "check": "causal",
        "site": site,
        "model": fingerprint(model, found).to_json(),
        "weights": signature(model),
        "dtype": str(floating_dtype(model)),
        "task": task.digest(),
        "momentum": _digest(momentum, site),
    }
    runner = Runner(model, tokenizer, task, Record(record, settings), batch_tokens)
    units = chosen.units()
    jobs = [alone(momentum, site, scale, unit, way) for way in ways for unit in units.tolist()]
    with_others = jobs_of(momentum, site, grouped, alphas)
    with Progress("steering few AUs", len(jobs) + len(with_others), "effects", progress) as bar:
        raised = dict(zip(ways, runner.run(jobs, bar).reshape(len(ways), len(units), len(task))))
        others = runner.run(with_others, bar)
    known, items = _known(momentum, site, scale, units), [item.group for item in task]
    results = {way: _findings(way, raised[way], known, chosen, items, seed) for way in ways}
    return CausalResult(
        model=momentum.model.name,
        dtype=str(floating_dtype(model)).removeprefix("torch."),
        site=site,
        task=task.name,
        items=len(task),
        log_odds=runner.unsteered(),
        pairs=momentum.pairs,
        n=n,
        seed=seed,
        units=_rows(raised, known, chosen),
        findings=results,
        verdict={way: verdict(found) for way, found in results.items()},
        together=together(momentum, site, grouped, alphas, others, items, profile, seed) if grouped else None,
        notes=notes(model, task, momentum),
        seconds=time.perf_counter() - start,
        environment=environment(),
    )


def _check_profile(profile: Profile | None, model: nn.Module) -> None:
    if profile is not None and profile.weights != (own := signature(model)):
        raise SelectionError(
            f"profile: found one of {profile.model.name} with other weights ({profile.weights}), expected those of the "
            f"model ({own}); make it anew: austeer profile"
        )


def _known(momentum: Momentum, site: str, scale: Scale, units: Tensor) -> dict[str, np.ndarray]:
    """What is known of AUs before they are steered, as of :class:`Unit`, and their effects: [AUs] each."""
    counters = momentum.counters(site)
    row, index = np.divmod(units.numpy(), counters.positive.shape[1])
    found = {
        "layer": np.array(momentum.layers)[row],
        "index": index,
        "beta": signed_rate(counters, momentum.pairs).flatten()[units].numpy(),
        "delta": (counters.delta_sum.flatten()[units] / momentum.pairs).numpy(),
        "size": scale.size.flatten()[units].numpy(),
        "deviation": scale.deviation.flatten()[units].numpy(),
    }
    if momentum.effects is not None:
        found["effect"] = momentum.effect(site).flatten()[units].numpy()
    return found


def _predicted(way: str, known: dict[str, np.ndarray]) -> np.ndarray | None:
    """The predicted effect of raising each AU, nats: [AUs]; None where it is not known."""
    if "effect" not in known or way == "scale":
        return None
    return known["effect"] * (np.abs(known["delta"]) if way == "shift" else known["deviation"])


def _findings(
    way: str, raised: np.ndarray, known: dict[str, np.ndarray], chosen: Sample, groups: Sequence[str], seed: int
) -> Findings:
    """What one way of steering shows; ``raised``: [AUs, items], nats."""
    places = {name: torch.searchsorted(chosen.units(), units).numpy() for name, units in vars(chosen).items()}
    by_effect, predicted = (places.pop("effect"), places.pop("per_side_effect")), _predicted(way, known)
    ranked = {"beta": known["beta"], "delta": known["delta"]}
    return findings(
        raised=raised,
        sign=np.where(known["delta" if way == "shift" else "beta"] >= 0, 1.0, -1.0),
        known=ranked if predicted is None else ranked | {"predicted": predicted},
        given=np.column_stack([known["layer"], known["size"], known["deviation"]]),
        mixed=np.unique(np.concatenate([places["spread"], *by_effect])) if len(by_effect[0]) else None,
        groups=groups,
        seed=seed,
        **places,
    )


def _rows(raised: dict[str, np.ndarray], known: dict[str, np.ndarray], chosen: Sample) -> list[Unit]:
    """A row for each AU, with what steering it did."""
    names = [name for name in known if name != "effect"]
    columns = zip(*(known[name].tolist() for name in names))
    rows = {unit: dict(zip(names, values)) for unit, values in zip(chosen.units().tolist(), columns)}
    members = {name: set(units.tolist()) for name, units in vars(chosen).items()}
    matched = {top: rows[other] for top, other in zip(chosen.top.tolist(), chosen.matched.tolist())}
    predicted = {way: values for way in raised if (values := _predicted(way, known)) is not None}
    return [
        Unit(
            **row,
            groups=tuple(name for name, units in members.items() if unit in units),
            match=(matched[unit]["layer"], matched[unit]["index"]) if unit in matched else None,
            predicted={way: float(values[i]) for way, values in predicted.items()},
            raised={way: float(values[i].mean()) for way, values in raised.items()},
        )
        for i, (unit, row) in enumerate(rows.items())
    ]


def notes(model: nn.Module, task: Task, momentum: Momentum) -> list[str]:
    """What can be seen to weaken the check."""
    found, dtype = [], floating_dtype(model)
    if task.source in momentum.sources:
        found.append(
            f"the items come from {task.source}, which the momentum was also measured on; unless they are other rows "
            "of it, nothing here is held out"
        )
    if task.chat_template != momentum.chat_template:
        found.append(
            f"the items' prompts are run {describe_form(task.chat_template)}, and the measured pairs' were "
            f"{describe_form(momentum.chat_template)}"
        )
    if dtype.itemsize < 4:
        found.append(
            f"the model runs in {str(dtype).removeprefix('torch.')}, in which the effects of single AUs may be lost "
            "in rounding; float32 shows them"
        )
    if momentum.effects is None:
        found.append(
            "the momentum has no effects, so nothing is said of what the gradient predicts; measure with effects=True "
            "(austeer measure --effects)"
        )
    return found


def _digest(momentum: Momentum, site: str) -> str:
    """Tells momenta apart whose AUs would be steered or ranked differently."""
    digest = hashlib.sha256(f"{momentum.pairs} {momentum.layers}".encode())
    for tensor in momentum.counters(site).tensors().values():
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
