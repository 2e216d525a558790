"""The demonstration: sentiment pairs steer SmolLM2-135M-Instruct, and everything about it is measured.

The data (austeer/data) has two parts. Everything is chosen on the selection part: momentum on 85 % of it, and site,
operation, k and alpha on the rest, each setting within the same limit on the side effect. The held-out part, which
shares no topic, template or evaluative word with it, is looked at once, for the figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from ..baselines import arms, random_plan
from ..baselines.arm import Arm, Candidate, Material
from ..forward.generation import continue_prompts
from ..forward.neutral import neutral_texts
from ..forward.timing import Timing
from ..measuring.measure import measure
from ..momentum.momentum import Momentum
from ..pairs.pairs import Pairs, load_pairs
from ..plans.evidence import Overhead
from ..plans.plan import Plan
from ..plans.table import BY_UNIT
from ..statistics import stability
from ..steering.steer import steer
from ..tasks.task import Task
from ..tuning.calibrate import calibrate
from ..tuning.compare import time_tokens
from ..tuning.held_out import HeldOut, Unsteered, hold_out
from ..tuning.scorer import Scorer
from ..tuning.search import SearchResult, Step, no_bars, search
from ..tuning.tune import MAX_KL, SITES, Trial, evidence_of, trials_of
from ..utils.environment import environment

KS = (10, 100)
RANDOM_SEEDS = 3
TIMED_K = 100
PROMPTS = ("The weekend trip was", "I read the report this morning and thought it was")


@dataclass(frozen=True)
class DemoResult:
    """All that the demo found; ``to_json`` is what it writes.

    Attributes:
        pairs: how many in each part. stability: overlap of the top k between halves of the pairs, by site and k.
        max_kl: the limit on KL(unsteered || steered) on the neutral texts that strengths were chosen on, nats a token.
        trials: every setting on the tuning pairs, best first. chosen: the best of them.
        unsteered, held_out: on the held-out pairs, with intervals over topics: the chosen setting first, then the best
            of each other operation, then draws of random AUs at the chosen one's site, operation, k and side effect.
        generations: continuations of ``PROMPTS`` by strength. timings: time a token by variant.
    """

    model: str
    pairs: dict[str, int]
    stability: dict[str, float]
    measure_seconds: float
    max_kl: float
    trials: list[Trial]
    chosen: Trial
    unsteered: Unsteered
    held_out: list[HeldOut]
    generations: dict[str, list[str]]
    timings: dict[str, Timing]
    seconds: float
    environment: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Data:
    """The demo's pairs, in three parts, and the topic of each prompt."""

    momentum: Pairs
    tuning: Pairs
    held_out: Pairs
    topics: Mapping[str, str]

    def task(self, pairs: Pairs) -> Task:
        """Pairs as items, of which those of one topic are alike."""
        task = Task.of_pairs(pairs, "demo pairs")
        return replace(task, items=tuple(replace(item, group=self.topics[item.prompt]) for item in task))


def load_data() -> Data:
    """The demo's pairs, as packaged."""
    with as_file(files("austeer") / "data" / "demo_pairs.jsonl") as path:
        selection = load_pairs(path, where={"split": "selection"})
        held_out = load_pairs(path, where={"split": "heldout"})
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for_momentum, for_tuning = (replace(p, source="demo pairs") for p in selection.split(0.85))
    return Data(for_momentum, for_tuning, held_out, {row["prompt"]: row["topic"] for row in rows})


def run(
    model,
    tokenizer,
    out: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    step: Step = no_bars,
    progress: bool | None = False,
) -> tuple[DemoResult, Momentum, Plan]:
    """Runs the whole demo and writes ``momentum.safetensors`` and ``plan/`` into ``out``.

    Args:
        say: told each result as it comes. step: opens progress bars. progress: as of :func:`austeer.measure`.

    Raises:
        TaskError: no setting stays within the limit on the side effect.
    """
    start = time.perf_counter()
    data = load_data()

    measure_start = time.perf_counter()
    momentum = measure(model, tokenizer, data.momentum, SITES, progress=progress)
    measure_seconds = time.perf_counter() - measure_start
    momentum.save(out / "momentum.safetensors")
    overlaps = {
        f"{site}, k={k}": share
        for site in SITES
        for found in [stability(momentum, site, KS)]
        for k, share in zip(found.k, found.overlap)
    }
    say(
        f"momentum  {momentum.pairs} pairs, sites {' and '.join(SITES)}, all layers, in {measure_seconds:.1f} s; "
        "overlap of the top k between halves: " + ", ".join(f"{name} {value:.2f}" for name, value in overlaps.items())
    )

    scorer = Scorer(model, tokenizer, data.task(data.tuning), neutral_texts())
    material = Material(model, tokenizer, data.momentum, momentum)
    tried = arms("momentum", material, sites=SITES, operations=BY_UNIT, ks=KS)
    found = search(scorer, tried, group=lambda arm: arm.operation, max_kl=MAX_KL, step=step)
    trials = trials_of(found, scorer.task)
    best, chosen = found.best().candidate, trials[0]
    plan = best.arm.plan.top(best.arm.k)
    plan.save_pretrained(out / "plan")
    say(
        f"chosen    {plan.operation} of {len(plan)} AUs at site {chosen.site}, alpha {best.alpha:.3g}: "
        f"{chosen.effect:+.2f} nats on {chosen.items} tuning pairs "
        f"(best of {len(trials)} settings within a KL divergence of {MAX_KL:g} nats a token on neutral text)"
    )

    candidates = [*_best_of_each(found), *_random(scorer, found, momentum, step)]
    test = Scorer(model, tokenizer, data.task(data.held_out), neutral_texts("heldout"), name="held-out")
    unsteered, held_out = hold_out(test, candidates, step)
    generations = {"unsteered": continue_prompts(model, tokenizer, PROMPTS, max_new_tokens=24)}
    with steer(model, plan, best.alpha) as steering:
        for factor in (0.5, 1.0, -1.0):
            steering.alpha = factor * best.alpha
            text = continue_prompts(model, tokenizer, PROMPTS, max_new_tokens=24)
            generations[f"alpha {steering.alpha:.3g}"] = text
    timings = _time(model, tokenizer, momentum, plan, best.alpha, step)
    spread = "pairs (95 % interval over topics)"
    evidence = evidence_of(chosen, trials, held_out[0], f"tuning {spread}", f"{len(data.held_out)} held-out {spread}")
    plan = plan.with_evidence(replace(evidence, overhead=(_overhead(timings[_as_chosen(plan)]),)))
    plan.save_pretrained(out / "plan")
    result = DemoResult(
        model=momentum.model.name,
        pairs={"momentum": len(data.momentum), "tuning": len(data.tuning), "held-out": len(data.held_out)},
        stability=overlaps,
        measure_seconds=measure_seconds,
        max_kl=MAX_KL,
        trials=trials,
        chosen=chosen,
        unsteered=unsteered,
        held_out=held_out,
        generations=generations,
        timings=timings,
        seconds=time.perf_counter() - start,
        environment=environment(),
    )
    return result, momentum, plan


def _best_of_each(found: SearchResult) -> list[Candidate]:
    """The best setting of each operation, best first."""
    best = [s for s in (found.best_of(operation=operation) for operation in BY_UNIT) if s is not None]
    return [s.candidate for s in sorted(best, key=lambda s: (-len(s.items), -s.effect))]


def _random(scorer: Scorer, found: SearchResult, momentum: Momentum, step: Step) -> list[Candidate]:
    """Random AUs in the place of the chosen ones, brought to the same side effect.

    Random AUs have smaller betas and deltas than chosen ones, so at the same alpha they would also be pushed less.
    """
    best = found.best()
    chosen = best.candidate.arm
    drawn = [
        Arm("random", random_plan(momentum, chosen.site, chosen.k, seed, chosen.operation), chosen.k, f"seed {seed}")
        for seed in range(RANDOM_SEEDS)
    ]
    with step("random AUs, strengths at the limit", len(drawn)) as advance:
        limits = calibrate(
            scorer,
            drawn,
            MAX_KL,
            found.schedule.final_texts,
            start=lambda arm: best.limit.alpha or 1.0,
            on_arm=lambda: advance(1),
        )
    return [
        Candidate(arm, limit.alpha * best.fraction)
        for arm in drawn
        for limit in [limits[arm.digest]]
        if limit.alpha is not None
    ]


def _time(model, tokenizer, momentum: Momentum, plan: Plan, alpha: float, step: Step) -> dict[str, Timing]:
    """Every path with the paper's operation (which all can take), and the chosen plan as auto runs it.

    On a CPU the fused path runs its definition in PyTorch, not the Triton kernel.
    """
    paper = momentum.select("attention", k=TIMED_K)
    variants: dict[str, Callable[[], AbstractContextManager]] = {
        f"{mode}, scale, k={TIMED_K}": partial(steer, model, paper, 1.0, mode=mode)
        for mode in ("fold", "fused", "columns", "dense")
    }
    variants[_as_chosen(plan)] = partial(steer, model, plan, alpha)
    return time_tokens(model, tokenizer, variants, PROMPTS[0], step)


def _as_chosen(plan: Plan) -> str:
    """What the chosen plan is called among what is timed."""
    return f"auto, {plan.operation}, k={len(plan)}"


def _overhead(timing: Timing) -> Overhead:
    percent, low, high = (100 * (ratio - 1) for ratio in (timing.ratio, timing.low, timing.high))
    setting = "decoding at batch 1; quartiles of rounds"
    return Overhead(percent, str(environment()["device"]), "auto", setting, low, high)
