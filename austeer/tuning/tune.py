"""tune(): from pairs or a labelled task to a plan with its strength, and what it does to data that was not used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import arms as arms_of
from ..baselines.arm import Arm, Candidate
from ..errors import SelectionError, TaskError
from ..models.sites import available
from ..momentum.momentum import Momentum
from ..momentum.profile import Profile
from ..pairs.pairs import Pairs
from ..plans.dose import Point
from ..plans.evidence import Evidence, Outcome
from ..plans.plan import Plan
from ..plans.table import BY_UNIT
from ..tasks.task import Task
from ..utils.environment import environment
from .budget import MIXED, Budget
from .calibrate import calibrate
from .data import Most, Parts
from .held_out import HeldOut, Unsteered, hold_out
from .options import SearchOptions
from .preparation import prepare
from .promising import promising_arms
from .scorer import Scorer, ignore
from .search import SearchResult, Standing, Step, judged, no_bars, outcome_of, search
from .writing import Writer, Writing, first_not_derailed

SITES = ("attention", "ffn")
#: By effect the first two of these that a model has.
BY_EFFECT = ("attention", "neuron", "ffn")
KS = (3, 10, 30, 100, 300)
MAX_KL = 0.1


@dataclass(frozen=True)
class Trial:
    """One setting as it stood when it was last judged, on the tuning part.

    Attributes:
        alpha: the strength; one a site where they differ. fraction: of the alpha at which the limit is reached.
        items: by how many items it was judged. effect: mean change of the log-odds, nats, with its 95 % interval.
        share: share of items that moved the wanted way.
        kl: at the limit, of this setting's arm; a fraction of alpha has about its square of it.
    """

    method: str
    detail: str
    site: str
    operation: str
    k: int
    alpha: float | dict[str, float]
    fraction: float
    items: int
    effect: float
    low: float | None
    high: float | None
    share: float
    kl: float


@dataclass(frozen=True)
class TuneResult:
    """What a search found.

    Attributes:
        plan: the chosen AUs, with the evidence. alpha: the strength to steer with.
        settings: all that the search depended on, the split in it. schedule: how much of what was run.
        trials: every setting, best first among those judged by as many items. chosen: the best of all.
        unsteered, held_out: on the test part: the chosen setting first, then the best of each other operation.
        writing: what these write, and which better settings were set aside for it; None where there was no time.
        left_out: what a time budget was too short for, in words.
        seconds: of this run. environment: of the machine.
    """

    plan: Plan
    alpha: float | dict[str, float]
    settings: dict[str, Any]
    schedule: dict[str, Any]
    trials: list[Trial]
    chosen: Trial
    unsteered: Unsteered
    held_out: list[HeldOut]
    writing: Writing | None
    left_out: list[str]
    seconds: float
    environment: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        """All but the plan, which has a file of its own."""
        found = asdict(self)
        del found["plan"]
        return found


def tune(
    model: nn.Module,
    tokenizer,
    data: Task | Pairs | Parts,
    *,
    momentum: Momentum | None = None,
    sites: Sequence[str] | None = None,
    operations: Sequence[str] | None = None,
    ks: Iterable[int] = KS,
    max_kl: float = MAX_KL,
    budget: float | None = None,
    neutral: Sequence[str] | None = None,
    mix: bool = True,
    rank: str | None = None,
    profile: Profile | None = None,
    most: Most = (400, 200, 400),
    seed: int = 0,
    folder: str | Path | None = None,
    step: Step = no_bars,
    progress: bool | None = False,
) -> TuneResult:
    """Chooses site, operation, k and alpha on data that was not measured, under a limit on the side effect.

    A part of the data is measured, a part is tuned on, and a part is looked at once, in the end. Every setting is first
    brought to the limit on the side effect (KL divergence from the unsteered model on neutral text), so that settings
    compare at equal side effect; then successive halving finds the best. All settings of a batch run as its rows, and
    rankings are nested, so one momentum serves every k.

    Example:
        >>> result = austeer.tune(model, tokenizer, pairs, sites=["attention"], ks=[3, 10], max_kl=0.05)
        >>> result.plan.sites, result.chosen.k == len(result.plan)
        (('attention',), True)
        >>> with austeer.steer(model, result.plan, result.alpha):
        ...     steered = model.generate(**tokenizer("The soup was", return_tensors="pt"), max_new_tokens=8)

    Args:
        model: a Transformers decoder. tokenizer: its own.
        data: pairs, or a task with options (:func:`austeer.tasks.load_task`); or parts of them, split elsewhere.
        momentum: of other pairs than ``data``'s; by default counted on a part of the data.
        sites, operations, ks: what is searched. By default by effect "shift" at attention and neuron, where the model
            has it; by momentum "scale", "push" and "shift" at attention and ffn. "ablate" has to be named.
        max_kl: the limit on KL(unsteered || steered), nats a token.
        budget: seconds for all of it, but for a profile that has to be made; by default as long as it takes.
        neutral: texts that should stay as they are; half for tuning, half for the report. By default packaged ones.
        mix: also try the best two sites together, each with its own strength; by effect, all ranked together.
        rank: "effect", AUs by effect per side effect (:mod:`austeer.momentum.by_effect`), of "shift", of which those
            settings are tried whose predicted effect is largest; or "momentum", the paper's. By default "effect",
            unless other operations are asked for, or ``momentum`` has no effects.
        profile: of the model, for rank "effect"; by default made, and kept in the user's cache.
        most: at most so many items to measure, tune and test.
        seed: of the split and of all that is random.
        folder: where ``momentum.safetensors`` and ``search.jsonl`` are kept; an interrupted search goes on from them.
        step: opens progress bars. progress: as of :func:`austeer.measure`.

    Raises:
        TaskError: a numeric task, too little data or budget, or no setting within the limit.
        SelectionError: a site that ``momentum`` lacks, or a k that does not fit.
        GradientError: by effect, a model without a backward pass.
        FileFormatError: ``folder`` holds another search.
    """
    clock, by_effect = Budget(budget), _is_by_effect(rank, profile, operations, momentum)
    sites = sites if sites is not None else _sites_by_effect(model, momentum, profile) if by_effect else SITES
    operations = operations if operations is not None else ("shift",) if by_effect else BY_UNIT
    options = SearchOptions(
        *(momentum, sites, operations, ks, max_kl, budget, neutral, most, seed), folder=folder, progress=progress
    )
    settings = {**options.settings("sites", "operations", "ks", "max_kl", "budget"), "mix": mix, "by_effect": by_effect}
    prepared = prepare(
        *(model, tokenizer, data, options),
        sites=options.sites,
        profiled=options.sites if by_effect else (),
        profile=profile,
        instead="without gradients: rank='momentum' (--rank momentum)",
        settings=settings,
        budget=clock,
    )
    parts, scorer, material = prepared.parts, prepared.tune_scorer, prepared.material
    ks = options.ks_of(material.momentum)
    if by_effect:
        arms = promising_arms(material, options.sites, ks, mix)
    else:
        arms = arms_of("momentum", material, sites=options.sites, operations=options.operations, ks=ks)
    found = search(scorer, arms, group=_group, max_kl=max_kl, budget=clock, step=step)
    if mix and len(options.sites) > 1 and not by_effect:
        found = replace(found, standings=[*_mixed_sites(scorer, found, max_kl, clock, step), *found.standings])
    writer = Writer(scorer, material.pairs, clock, options.seed, step)
    others = [s for s in (found.best_of(operation=o) for o in options.operations) if s is not None]
    writer.write([s.candidate for s in others])
    best, set_aside = first_not_derailed(writer, found.ranked())
    rows = [best, *(s for s in others if s.candidate.arm.operation != best.candidate.arm.operation)]
    writing = writer.writing([s.candidate for s in rows], set_aside)
    unsteered, held_out = hold_out(prepared.test_scorer, [s.candidate for s in rows], step, clock, writing)
    trials = trials_of(found, parts.tune)
    chosen = _trial(best, parts.tune)
    plan = best.candidate.arm.plan.top(best.candidate.arm.k)
    if plan.dose is not None and best.limit.alpha is not None and neutral is None:  # on the texts of the dose
        plan = plan.with_dose(plan.dose.with_measured([Point(len(plan), best.limit.alpha, best.limit.kl)]))
    return TuneResult(
        plan=plan.with_evidence(
            evidence_of(
                chosen,
                trials,
                held_out[0],
                f"tuning items of {parts.name}",
                f"{unsteered.items} held-out items of {parts.test.name}",
            )
        ),
        alpha=chosen.alpha,
        settings=prepared.settings,
        schedule=found.schedule.to_json(),
        trials=trials,
        chosen=chosen,
        unsteered=unsteered,
        held_out=held_out,
        writing=writing,
        left_out=clock.left_out,
        seconds=clock.total,
        environment=environment(),
    )


def _is_by_effect(
    rank: str | None, profile: Profile | None, operations: Sequence[str] | None, momentum: Momentum | None
) -> bool:
    shifts = operations is None or {*operations} == {"shift"}
    if rank is None:
        known = momentum is None or momentum.effects is not None
        rank = "effect" if profile is not None or (shifts and known) else "momentum"
    if rank not in ("momentum", "effect"):
        raise TaskError(f"rank: found {rank!r}, expected 'momentum' or 'effect'")
    if rank == "momentum" and profile is not None:
        raise TaskError("profile: found one with rank 'momentum', which takes none; expected rank 'effect', or none")
    if rank == "effect" and not shifts:
        raise TaskError(
            f"operations: found {', '.join(operations or ())} by effect, expected 'shift' alone, whose effects are "
            "known; or rank='momentum', which takes no profile"
        )
    return rank == "effect"


def _sites_by_effect(model: nn.Module, momentum: Momentum | None, profile: Profile | None) -> tuple[str, ...]:
    """The first two sites of ``BY_EFFECT`` that the model has, and what was measured of it before.

    Raises:
        SelectionError: there is none.
    """
    found = available(model, BY_EFFECT)
    measured = {} if momentum is None else {"momentum": tuple(momentum.sites)}
    measured |= {} if profile is None else {"profile": tuple(profile.rows)}
    for what, known in measured.items():
        left = tuple(site for site in found if site in known)
        if not left:
            raise SelectionError(
                f"{what}: found one of {', '.join(known)}, expected one of {', '.join(found)}; give the sites to "
                "search, or rank='momentum'"
            )
        found = left
    return found[:2]


def _group(arm: Arm) -> str:
    return f"{arm.operation} at {arm.site}"


def _mixed_sites(scorer: Scorer, found: SearchResult, max_kl: float, budget: Budget, step: Step) -> list[Standing]:
    """The best of each site, two sites together: their strengths keep the ratio that each has alone at the limit."""
    best: list[Standing] = []
    for operation in dict.fromkeys(s.candidate.arm.operation for s in found.standings):
        by_site = [
            found.best_of(operation=operation, site=site)
            for site in dict.fromkeys(s.candidate.arm.site for s in found.standings)
        ]
        members = sorted((s for s in by_site if s is not None and s.effect > 0), key=lambda s: -s.effect)
        if len(members) > 1:
            best += members[:2]
    arms = [_joined_arm(first, second) for first, second in zip(best[::2], best[1::2])]
    if not arms or budget.is_over(MIXED):
        budget.note("pairs of sites together", 0, len(arms))
        return []
    with step("two sites together", len(arms)) as advance:
        limits = calibrate(
            *(scorer, arms, max_kl, found.schedule.final_texts),
            on_arm=lambda: advance(1),
            is_over=lambda: budget.is_over(MIXED),
        )
    items = max((s.items for s in found.standings), key=len)
    within = [arm for arm in arms if limits[arm.digest].alpha is not None]
    candidates = [Candidate(arm, limits[arm.digest].alpha) for arm in within]  # type: ignore[arg-type]
    if not candidates:
        return []
    if len(judged(candidates, scorer, list(items), budget, MIXED, ignore)) < len(items):
        budget.note("pairs of sites together", 0, len(arms))  # they would be judged by fewer items than the others
        return []
    changes = scorer.changes(candidates, items)
    return [
        Standing(c, _group(c.arm), 1.0, limits[c.arm.digest], items, change) for c, change in zip(candidates, changes)
    ]


def _joined_arm(first: Standing, second: Standing) -> Arm:
    plans = [s.candidate.arm.plan.top(s.candidate.arm.k) for s in (first, second)]
    weights = {s.candidate.arm.site: s.candidate.alpha / 2**0.5 for s in (first, second)}
    plan = plans[0] + plans[1]
    detail = " + ".join(f"{len(part)} at {part.sites[0]}" for part in plans)
    return Arm(first.candidate.arm.method, plan, len(plan), detail, weights)


def trials_of(found: SearchResult, task: Task) -> list[Trial]:
    """All settings, best first among those judged by as many items."""
    return [_trial(standing, task) for standing in found.ranked()]


def _trial(standing: Standing, task: Task) -> Trial:
    return Trial(
        **outcome_of(standing.candidate, standing.change, [task[i].group for i in standing.items]),
        fraction=standing.fraction,
        items=len(standing.items),
        kl=standing.limit.kl,
    )


def evidence_of(chosen: Trial, trials: Sequence[Trial], held_out: HeldOut, tuned_on: str, tested_on: str) -> Evidence:
    """What is known of the chosen plan, to travel with it: every strength that was tried of it.

    Args:
        held_out: the chosen setting on data that nothing was chosen by. tuned_on, tested_on: the data, in words; the
            number of items is put before the first.
    """
    kind = (chosen.site, chosen.operation, chosen.k, chosen.detail)
    tuned = [t for t in trials if (t.site, t.operation, t.k, t.detail) == kind]
    return Evidence(
        effect="mean change of log-odds, nats",
        side_effect="KL(unsteered || steered) on neutral text, nats a token",
        tested=(
            *(
                Outcome(
                    *(t.alpha, f"{t.items} {tuned_on}", t.effect, t.low, t.high, t.share),
                    side_effect=t.kl if t.fraction == 1 else None,  # it was taken at the limit only
                )
                for t in sorted(tuned, key=lambda t: t.fraction)
            ),
            Outcome(
                *(held_out.alpha, tested_on, held_out.effect, held_out.low, held_out.high, held_out.share, held_out.kl)
            ),
        ),
        alpha=chosen.alpha,
    )
