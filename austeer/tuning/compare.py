"""compare(): methods side by side, each tuned alike, at equal side effect, on data that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import METHODS, profiles_needed, sites_needed
from ..baselines import arms as arms_of
from ..baselines.arm import Arm
from ..errors import TaskError
from ..forward.timing import Timing, decode_times
from ..momentum.momentum import Momentum
from ..pairs.pairs import Pairs
from ..plans.table import BY_UNIT, OPERATIONS
from ..steering.steer import steer
from ..tasks.task import Task
from ..utils.environment import environment
from .budget import TIMES, Budget
from .data import Most, Parts
from .held_out import HeldOut, Unsteered, hold_out
from .options import SearchOptions
from .preparation import prepare
from .search import Step, no_bars, search
from .tune import MAX_KL, SITES, Trial, trials_of
from .writing import Writer, Writing

KS = (10, 100)

#: Rounds of decoding that the cost is taken from, and the tokens of each.
ROUNDS, TOKENS = 10, 8


@dataclass(frozen=True)
class CompareResult:
    """What came of each method.

    Attributes:
        settings: all that the comparison depended on. schedule: how much of what was run.
        unsteered, held_out: on the test part: the best setting of each method and operation, best on the tuning part
            first.
        writing: what these write, and which of them derail; None without texts, or time for them.
        cost: time a token of each row by its name, as ``steer`` runs it, decoding at batch 1; beside "unsteered" and
            "unsteered again", whose distance is noise. Empty if it was not timed.
        trials: every setting on the tuning part.
        left_out: what a time budget was too short for, in words. seconds: of this run. environment: of the machine.
    """

    settings: dict[str, Any]
    schedule: dict[str, Any]
    unsteered: Unsteered
    held_out: list[HeldOut]
    writing: Writing | None
    cost: dict[str, Timing]
    trials: list[Trial]
    left_out: list[str]
    seconds: float
    environment: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parse_methods(names: Iterable[str], operations: Sequence[str] = BY_UNIT) -> dict[str, tuple[str, ...]]:
    """The operations that each method is tried with: "random" with all of them, "random:shift" with one.

    Raises:
        TaskError: an unknown method or operation, or none.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        method, _, operation = name.partition(":")
        if method not in METHODS or (operation and operation not in OPERATIONS):
            raise TaskError(
                f"methods: found {name!r}, expected METHOD or METHOD:OPERATION of {', '.join(METHODS)} and "
                f"{', '.join(OPERATIONS)}"
            )
        found[method] = tuple(dict.fromkeys((*found.get(method, ()), *([operation] if operation else operations))))
    if not found:
        raise TaskError(f"methods: found none, expected some of {', '.join(METHODS)}")
    return found


def compare(
    model: nn.Module,
    tokenizer,
    data: Task | Pairs | Parts,
    *,
    methods: Iterable[str] = tuple(METHODS),
    momentum: Momentum | None = None,
    sites: Sequence[str] = SITES,
    operations: Sequence[str] = BY_UNIT,
    ks: Iterable[int] = KS,
    layers: Sequence[int] | None = None,
    max_kl: float = MAX_KL,
    budget: float | None = None,
    neutral: Sequence[str] | None = None,
    texts: bool = True,
    timed: bool = True,
    most: Most = (400, 200, 400),
    seed: int = 0,
    folder: str | Path | None = None,
    step: Step = no_bars,
    progress: bool | None = False,
) -> CompareResult:
    """Tunes every method alike and reports the best of each, and of each operation, on the test part.

    All methods get the same pairs, the same limit on the side effect (KL divergence from the unsteered model on neutral
    text) and the same search: every setting is brought to that limit, then successive halving finds the best on a part
    of the data that was not measured. The figures are of a third part, which is looked at once.

    Example:
        >>> result = austeer.compare(model, tokenizer, pairs, methods=["momentum:shift", "random:shift"], ks=[3])
        >>> sorted(row.method for row in result.held_out)
        ['momentum', 'random']
        >>> [name for name in result.cost if "unsteered" in name]  # time of a token: twice, so that the noise shows
        ['unsteered', 'unsteered again']

    Args:
        model: a Transformers decoder. tokenizer: its own.
        data: pairs, or a task with options (:func:`austeer.tasks.load_task`); or parts of them, split elsewhere.
        methods: names of :data:`austeer.baselines.METHODS`, or ``NAME:OPERATION`` for one operation only.
        momentum: of other pairs than ``data``'s. "iti" looks at the pairs themselves: with a momentum it needs
            ``data`` as :class:`austeer.tuning.Parts`, with those pairs in them.
        sites, operations, ks: what is searched for each method that has them; "ablate" has to be named.
        layers: where "caa", "newton" and "trained" add their vector, and "ablation" removes its direction; see
            :func:`austeer.baselines.arms`.
        max_kl: the limit on KL(unsteered || steered), nats a token.
        budget: seconds for all of it, but for a profile that has to be made; by default as long as it takes.
        neutral: texts that should stay as they are; half for tuning, half for the report. By default packaged ones.
        texts: also let each method's best setting write, and say where it derails.
        timed: also time decoding with each method's best setting.
        most: at most so many items to measure, tune and test.
        seed: of the split and of all that is random.
        folder: where ``momentum.safetensors`` and ``search.jsonl`` are kept; an interrupted
            search goes on from them.
        step: opens progress bars. progress: as of :func:`austeer.measure`.

    Raises:
        TaskError: an unknown method, a numeric task, too little data or budget, or no setting within the limit.
        SelectionError: a site that ``momentum`` lacks, or a k that does not fit.
        GradientError: a method by gradients, of a model without a backward pass.
        FileFormatError: ``folder`` holds another search.
    """
    clock = Budget(budget)
    options = SearchOptions(
        *(momentum, sites, operations, ks, max_kl, budget, neutral, most, seed), folder=folder, progress=progress
    )
    operations_of = parse_methods(methods, options.operations)
    settings = {
        "methods": {method: list(names) for method, names in operations_of.items()},
        **options.settings("sites", "ks"),
        "layers": None if layers is None else list(layers),
        **options.settings("max_kl", "budget"),
    }
    needed, profiled = (of(operations_of, options.sites) for of in (sites_needed, profiles_needed))
    prepared = prepare(
        model,
        tokenizer,
        data,
        options,
        sites=needed,
        profiled=profiled,
        settings=settings,
        budget=clock,
        instead="without gradients: other methods than effect, newton and trained",
    )
    scorer, test_scorer, material = prepared.tune_scorer, prepared.test_scorer, prepared.material
    ks = options.ks_of(material.momentum)
    arms = [
        arm
        for method, names in operations_of.items()
        for arm in arms_of(method, material, sites=options.sites, operations=names, ks=ks, layers=layers)
    ]
    found = search(scorer, arms, group=_group, max_kl=max_kl, budget=clock, step=step)
    groups = dict.fromkeys(_group(s.candidate.arm) for s in found.standings)
    best = sorted((found.best_in(group) for group in groups), key=lambda s: -s.effect)
    candidates = [s.candidate for s in best]
    writing = Writer(scorer, material.pairs, clock, options.seed, step).writing(candidates) if texts else None
    unsteered, held_out = hold_out(test_scorer, candidates, step, clock, writing)
    known = scorer.record.get("cost") if timed else {}
    if known is None:
        variants = {c.arm.name: partial(steer, model, c.arm.plan, c.strength, k=c.arm.k) for c in candidates}
        timings = time_tokens(model, tokenizer, variants, test_scorer.neutral[0], step, clock)
        known = {name: asdict(timing) for name, timing in timings.items()}
        if known:
            scorer.record.put("cost", known)
    return CompareResult(
        settings=prepared.settings,
        schedule=found.schedule.to_json(),
        unsteered=unsteered,
        held_out=held_out,
        writing=writing,
        cost={name: Timing(**timing) for name, timing in known.items()},
        trials=trials_of(found, scorer.task),
        left_out=clock.left_out,
        seconds=clock.total,
        environment=environment(),
    )


def _group(arm: Arm) -> str:
    return f"{arm.method}: {arm.operation}"


def time_tokens(
    model: nn.Module,
    tokenizer,
    steered: Mapping[str, Callable[[], AbstractContextManager]],
    text: str,
    step: Step,
    budget: Budget | None = None,
) -> dict[str, Timing]:
    """Time a token of the unsteered model, twice so that the noise shows, and of each steered one, in turns.

    Args:
        budget: for as many rounds as it leaves time for; without time for any the result is empty.
    """
    budget = Budget() if budget is None else budget
    if budget.is_over(TIMES):
        budget.note("rounds of times of a token", 0, ROUNDS)
        return {}
    variants = {"unsteered": nullcontext, "unsteered again": nullcontext, **steered}
    with step(f"time a token, {len(variants)} ways", ROUNDS + 1) as advance:
        found = decode_times(
            model,
            tokenizer,
            variants,
            prompt=text,
            tokens=TOKENS,
            rounds=ROUNDS,
            on_round=lambda: advance(1),
            is_over=lambda: budget.is_over(TIMES),
        )
    budget.note("rounds of times of a token", found["unsteered"].rounds if found else 0, ROUNDS)
    return found
