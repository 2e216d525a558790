"""The demonstration: sentiment pairs steer SmolLM2-135M-Instruct, and everything about it is measured.

The data (austeer/data) has two parts. Everything is chosen on the selection part: momentum on 85 % of it, and
site, operation, k and alpha on the rest, under a limit on the side effect. The held-out part, which shares no topic,
template or evaluative word with it, is looked at once, for the figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from .baselines import random_plan
from .environment import environment
from .errors import SelectionError
from .evidence import Evidence, Outcome, Overhead
from .generation import continue_prompts
from .measuring import measure
from .momentum import Momentum
from .pairs import Pairs, load_pairs
from .plan import Plan
from .steering import steer
from .timing import Timing, decode_times
from .tune import Scorer, Trial, best, mean_interval, search, top_overlap

SITES = ("attention", "ffn")
KS = (10, 100)
OPERATIONS = ("scale", "push", "shift")
MAX_SIDE_EFFECT = 0.1
RANDOM_SEEDS = 5
TIMED_K = 100
PROMPTS = ("The weekend trip was", "I read the report this morning and thought it was")


@dataclass(frozen=True)
class HeldOut:
    """One steering on the held-out part.

    Attributes:
        effect: mean change of log-odds, nats. share: share of pairs whose log-odds rose.
        low, high: the effect's 95 % interval over topics; for random AUs the least and the greatest seed's.
        side_effect: rise of the cross-entropy on held-out neutral text, nats a token.
    """

    name: str
    alpha: float
    effect: float
    low: float
    high: float
    share: float
    side_effect: float


@dataclass(frozen=True)
class DemoResult:
    """All that the demo found; ``to_json`` is what it writes."""

    model: str
    pairs: dict[str, int]
    stability: dict[str, float]
    measure_seconds: float
    trials: list[Trial]
    chosen: Trial
    base_log_odds: float
    held_out: list[HeldOut]
    generations: dict[str, list[str]]
    timings: dict[str, Timing]
    seconds: float
    environment: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Data:
    momentum: Pairs
    tuning: Pairs
    held_out: Pairs
    held_out_topics: list[str]
    neutral_selection: list[str]
    neutral_held_out: list[str]


def load_data() -> Data:
    """The demo's pairs and neutral texts, as packaged."""
    folder = files("austeer") / "data"
    with as_file(folder / "demo_pairs.jsonl") as path:
        selection = load_pairs(path, where={"split": "selection"})
        held_out = load_pairs(path, where={"split": "heldout"})
    for_momentum, for_tuning = (replace(p, source="demo pairs") for p in selection.split(0.85))

    def column(name: str, field: str, split: str) -> list[str]:
        rows = map(json.loads, (folder / name).read_text(encoding="utf-8").splitlines())
        return [row[field] for row in rows if row["split"] == split]

    return Data(
        for_momentum,
        for_tuning,
        held_out,
        column("demo_pairs.jsonl", "topic", "heldout"),
        column("neutral.jsonl", "text", "selection"),
        column("neutral.jsonl", "text", "heldout"),
    )


def run(
    model,
    tokenizer,
    out: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    step: Callable[[str, int], AbstractContextManager[Callable[[], None]]] | None = None,
    progress: bool | None = False,
) -> tuple[DemoResult, Momentum, Plan]:
    """Runs the whole demo and writes ``momentum.safetensors`` and ``plan/`` into ``out``.

    Args:
        say: told each result as it comes. step: opens a progress bar of so many units and gives what advances it.
        progress: as of :func:`austeer.measure`.
    """
    start = time.perf_counter()
    step = step or _silent
    data = load_data()

    # Two halves are measured apart, to see how stable the ranking is, and merged: counters add up.
    measure_start = time.perf_counter()
    halves = [measure(model, tokenizer, part, SITES, progress=progress) for part in data.momentum.split(0.5)]
    momentum = halves[0].merge(halves[1])
    measure_seconds = time.perf_counter() - measure_start
    stability = {f"{site}, k={k}": top_overlap(halves[0], halves[1], site, k) for site in SITES for k in KS}
    momentum.save(out / "momentum.safetensors")
    say(
        f"momentum  {momentum.pairs} pairs, sites {' and '.join(SITES)}, all layers, in {measure_seconds:.1f} s; "
        "overlap of the top k between halves: " + ", ".join(f"{name} {value:.2f}" for name, value in stability.items())
    )

    trials = _choose(model, tokenizer, momentum, data, step)
    chosen = best(trials)
    if chosen is None:
        raise SelectionError(
            f"no setting stayed within a side effect of {MAX_SIDE_EFFECT} nats on {momentum.model.name}; "
            "expected at least one. The demo's strengths suit small instruction-tuned models"
        )
    plan = chosen.plan(momentum)
    plan.save_pretrained(out / "plan")
    say(
        f"chosen    {chosen.operation} of {chosen.k} AUs at site {chosen.site}, alpha {chosen.alpha:.3g}: "
        f"{chosen.effect:+.2f} nats on {len(data.tuning)} tuning pairs, side effect {chosen.side_effect:+.3f} "
        f"(of {len(trials)} settings within {MAX_SIDE_EFFECT})"
    )

    base, held_out = _hold_out(model, tokenizer, momentum, data, trials, chosen, step)
    generations = {"unsteered": continue_prompts(model, tokenizer, PROMPTS, max_new_tokens=24)}
    with steer(model, plan, chosen.alpha) as steering:
        for factor in (0.5, 1.0, -1.0):
            steering.alpha = factor * chosen.alpha
            text = continue_prompts(model, tokenizer, PROMPTS, max_new_tokens=24)
            generations[f"alpha {steering.alpha:.3g}"] = text
    timings = _time(model, tokenizer, momentum, plan, chosen, step)
    plan = plan.with_evidence(_evidence(plan, chosen, trials, held_out[0], timings, data))
    plan.save_pretrained(out / "plan")
    seconds = time.perf_counter() - start
    sizes = {"momentum": len(data.momentum), "tuning": len(data.tuning), "held-out": len(data.held_out)}
    result = DemoResult(
        momentum.model.name,
        sizes,
        stability,
        measure_seconds,
        trials,
        chosen,
        base,
        held_out,
        generations,
        timings,
        seconds,
        environment(),
    )
    return result, momentum, plan


def _choose(model, tokenizer, momentum: Momentum, data: Data, step) -> list[Trial]:
    scorer = Scorer(model, tokenizer, data.tuning, data.neutral_selection)
    with step("choosing site, operation, k, alpha", len(SITES) * len(OPERATIONS) * len(KS)) as advance:
        return search(
            scorer,
            momentum,
            sites=SITES,
            operations=OPERATIONS,
            ks=KS,
            max_side_effect=MAX_SIDE_EFFECT,
            on_series=advance,
        )


def _hold_out(
    model, tokenizer, momentum: Momentum, data: Data, trials: list[Trial], chosen: Trial, step
) -> tuple[float, list[HeldOut]]:
    """The best setting of each operation, and random AUs in the place of the chosen one's.

    Random AUs have smaller betas and deltas than chosen ones, so at the same alpha they would also be pushed less:
    their alpha is raised until the plan's strengths have the chosen plan's norm.
    """
    scorer = Scorer(model, tokenizer, data.held_out, data.neutral_held_out)
    shown = [trial for trial in (best(trials, operation=name) for name in OPERATIONS) if trial]
    shown.sort(key=lambda trial: -trial.effect)
    rows = []
    with step("held-out pairs", len(shown) + RANDOM_SEEDS) as advance:

        def score(plan: Plan, alpha: float) -> tuple[torch.Tensor, float]:
            scored = scorer.change(plan, alpha), scorer.side_effect(plan, alpha)
            advance()
            return scored

        for trial in shown:
            change, side_effect = score(trial.plan(momentum), trial.alpha)
            paper = " (paper)" if trial.operation == "scale" else ""
            name = f"{trial.operation}{paper}, {trial.site} k={trial.k}"
            interval = mean_interval(change, data.held_out_topics)
            rows.append(HeldOut(name, trial.alpha, float(change.mean()), *interval, _share_up(change), side_effect))
        norm = _strengths(chosen.plan(momentum)).norm()
        plans = [random_plan(momentum, chosen.site, chosen.k, seed, chosen.operation) for seed in range(RANDOM_SEEDS)]
        alphas = [chosen.alpha * float(norm / _strengths(plan).norm()) for plan in plans]
        scores = [score(plan, alpha) for plan, alpha in zip(plans, alphas)]
    effects = [float(change.mean()) for change, _ in scores]
    rows.append(
        HeldOut(
            f"random AUs x{RANDOM_SEEDS}, same norm",
            mean(alphas),
            mean(effects),
            min(effects),
            max(effects),
            _share_up(torch.cat([change for change, _ in scores])),
            mean(side_effect for _, side_effect in scores),
        )
    )
    return float(scorer.base_log_odds.mean()), rows


def _strengths(plan: Plan) -> torch.Tensor:
    return plan.delta if plan.operation == "shift" else plan.beta


def _share_up(change: torch.Tensor) -> float:
    return float((change > 0).double().mean())


def _time(model, tokenizer, momentum: Momentum, plan: Plan, chosen: Trial, step) -> dict[str, Timing]:
    """Every path with the paper's operation (which all can take), and the chosen plan as auto runs it.

    On a CPU the fused path runs its definition in PyTorch, not the Triton kernel.
    """
    paper = momentum.select("attention", k=TIMED_K)
    variants: dict[str, Callable[[], AbstractContextManager]] = {
        "unsteered": nullcontext,
        "unsteered again": nullcontext,
        **{
            f"{mode}, scale, k={TIMED_K}": partial(steer, model, paper, 1.0, mode=mode)
            for mode in ("fold", "fused", "columns", "dense")
        },
        f"auto, {plan.operation}, k={len(plan)}": partial(steer, model, plan, chosen.alpha),
    }
    rounds = 10
    with step("timing", rounds + 1) as advance:
        return decode_times(model, tokenizer, variants, prompt=PROMPTS[0], tokens=8, rounds=rounds, on_round=advance)


def _evidence(
    plan: Plan, chosen: Trial, trials: list[Trial], held_out: HeldOut, timings: dict[str, Timing], data: Data
) -> Evidence:
    """What was found out about the chosen plan, to travel with it.

    Args:
        held_out: the chosen setting on pairs that nothing was chosen by.
    """
    kind = (chosen.site, chosen.operation, chosen.k)
    tuned = [trial for trial in trials if (trial.site, trial.operation, trial.k) == kind]
    timing = timings[f"auto, {plan.operation}, k={len(plan)}"]
    percent, low, high = (100 * (ratio - 1) for ratio in (timing.ratio, timing.low, timing.high))
    return Evidence(
        effect="mean change of log-odds, nats",
        side_effect="rise of the cross-entropy on neutral text, nats a token",
        tested=(
            *(
                Outcome(t.alpha, f"{len(data.tuning)} tuning pairs", t.effect, share=t.share, side_effect=t.side_effect)
                for t in tuned
            ),
            Outcome(
                held_out.alpha,
                f"{len(data.held_out)} held-out pairs (95 % interval over topics)",
                *(held_out.effect, held_out.low, held_out.high, held_out.share, held_out.side_effect),
            ),
        ),
        alpha=chosen.alpha,
        overhead=(
            Overhead(
                *(percent, str(environment()["device"]), "auto", "decoding at batch 1; quartiles of rounds"),
                *(low, high),
            ),
        ),
    )


@contextmanager
def _silent(what: str, total: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
