"""One trial: a task with one seed of its split. Tuned on one part, reported on another; kept in a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import austeer
from austeer.baselines.arm import Arm, Candidate, Material
from austeer.forward.neutral import neutral_texts
from austeer.momentum.momentum import Momentum
from austeer.momentum.profile import Profile
from austeer.plans.table import STEPPED_BY
from austeer.statistics.intervals import share_interval
from austeer.tuning.calibrate import Limit, calibrate
from austeer.tuning.data import Parts
from austeer.tuning.record import Record
from austeer.tuning.scorer import Scorer
from austeer.tuning.search import Step, no_bars, outcome_of
from austeer.utils.files import write_text

from . import rows as kinds
from .rows import KS, MEASURED, Row

MAX_KL, MOMENTUM = 0.1, "momentum.safetensors"

#: Neutral texts that strengths are found on: of all that is tuned, and of what is reported.
TEXTS, FINAL_TEXTS = 4, 8

#: Tuning items that all of a row's settings are judged by, and how many of them by all items.
FIRST, KEPT = 8, 2


@dataclass(frozen=True)
class Setting:
    """What all trials of a study share.

    Attributes:
        profile: of the model, at all sites that are measured. step: opens progress bars.
        seconds: what the profile took.
    """

    model: nn.Module
    tokenizer: Any
    profile: Profile
    step: Step = no_bars
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return str(self.model.config._name_or_path)


class Trial:
    """Strengths, scores and what is chosen by them, of one task and split.

    Args:
        momentum: of the measured part, with effects. folder: where the record is kept.
    """

    def __init__(self, setting: Setting, parts: Parts, momentum: Momentum, folder: Path):
        self.setting, self.parts, self.folder = setting, parts, folder
        settings = {"model": setting.name, "data": parts.to_json(), "max_kl": MAX_KL}
        model, tokenizer = setting.model, setting.tokenizer
        record = Record(folder / "search.jsonl", settings)
        self.tune = Scorer(model, tokenizer, parts.tune, neutral_texts(), record)
        self.test = Scorer(model, tokenizer, parts.test, neutral_texts("heldout"), record, name="test")
        assert parts.measure is not None
        self.material = Material(model, tokenizer, parts.measure, momentum, setting.profile)
        self.limits: dict[str, Limit] = {}

    def bring_to_limit(self, arms: Sequence[Arm], texts: int | None = None) -> None:
        """Finds the strength of each arm at the limit; a shift's begins where the profile predicts it."""
        distinct = {arm.digest: arm for arm in arms}

        def start(arm: Arm) -> float:
            known = self.limits.get(arm.digest)
            if known is not None and known.alpha is not None:
                return known.alpha
            plan = arm.plan.top(arm.k)
            if plan.operation != "shift":
                return 1.0
            return self.setting.profile.alpha(plan, MAX_KL) if plan.dose is None else plan.dose.alpha(MAX_KL)

        texts = texts or TEXTS
        with self.setting.step(f"{len(distinct)} strengths, on {texts} texts", len(distinct)) as advance:
            found = calibrate(self.tune, list(distinct.values()), MAX_KL, texts, start, on_arm=lambda: advance(1))
        self.limits |= found

    def at_limit(self, arms: Sequence[Arm]) -> list[Candidate]:
        """The arms that have a strength within the limit, at that."""
        found = ((arm, self.limits[arm.digest].alpha) for arm in arms)
        return [Candidate(arm, alpha) for arm, alpha in found if alpha is not None]

    def best(self, row: Row) -> Candidate | None:
        """The best of a row's arms on the tuning items: of all on a few, then of the best two on all."""
        left = self.at_limit(row.arms)
        for items, kept in ((FIRST, KEPT), (len(self.parts.tune), 1)):
            if len(left) > kept:
                change = self.tune.changes(left, self.tune.order[:items]).mean(-1)
                left = [left[i] for i in change.argsort(descending=True, stable=True)[:kept].tolist()]
        return left[0] if left else None

    def choose(self, rows: Sequence[Row]) -> dict[str, tuple[Row, Arm]]:
        """The best arm of each row, by the row's name; rows without a strength within the limit are left out."""
        self.bring_to_limit([arm for row in rows for arm in row.arms])
        with self.setting.step(f"{len(rows)} methods on tuning items", len(rows)) as advance:
            found = {}
            for row in rows:
                best = self.best(row)
                if best is not None:
                    found[row.name] = row, best.arm
                advance(1)
        return found


def run(setting: Setting, parts: Parts, folder: Path, sites_too: bool) -> dict[str, Any]:
    """One trial; what it found is kept in ``folder``, and read from there when it is asked for again.

    Args:
        sites_too: also tests the prediction of sites and steps, on the tuning items, by which nothing of it is chosen.
    """
    done = folder / "trial.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    start = time.perf_counter()
    assert parts.measure is not None
    momentum = kept_momentum(setting, parts.measure, MEASURED, folder / MOMENTUM)
    trial = Trial(setting, parts, momentum, folder)
    curves = []
    with setting.step("predicted effects and plans", len(STEPPED_BY) + 2) as advance:
        for step in STEPPED_BY:
            curves += kinds.curves_of(trial.material, step)
            advance(1)
        rows = kinds.predicted_rows(trial.material, curves)
        advance(1)
        rows += kinds.rows_of(trial.material)
        advance(1)
    chosen = trial.choose(rows)
    if kinds.NEWTON in chosen:
        layer = int(chosen[kinds.NEWTON][1].plan.layer[0])
        chosen |= trial.choose([kinds.trained_row(trial.material, layer)])
    trial.bring_to_limit([arm for _, arm in chosen.values()], FINAL_TEXTS)
    found = {
        "task": parts.name,
        "seed": parts.seed,
        "data": parts.to_json(),
        **_held_out(trial, chosen),
        "curves": [{"step": step, **asdict(curve)} for step, curve in curves],
        "sites": _measured_sites(trial, curves) if sites_too else [],
        "seconds": time.perf_counter() - start,
    }
    write_text(done, json.dumps(found))
    return found


def _held_out(trial: Trial, chosen: dict[str, tuple[Row, Arm]]) -> dict[str, Any]:
    """What the chosen arms do to the test part, item by item."""
    test, items = trial.test, range(len(trial.parts.test))
    within = {name: row for name, (row, arm) in chosen.items() if trial.at_limit([arm])}
    candidates = [trial.at_limit([chosen[name][1]])[0] for name in within]
    with trial.setting.step("held-out neutral text", len(candidates)) as advance:
        side_effects = test.side_effects(candidates)
        advance(len(candidates))
    with trial.setting.step("held-out items", len(items) * (len(candidates) + 1)) as advance:
        scores = test.scores([None, *candidates], items, advance)
    changes, groups = scores.margin[1:] - scores.margin[0], [item.group for item in trial.parts.test]
    rows = []
    for (name, row), candidate, change, correct, (kl, rise) in zip(
        within.items(), candidates, changes, scores.correct[1:], side_effects
    ):
        arm = candidate.arm
        rows.append(
            {
                "name": name,
                "kind": row.kind,
                "settings": len(row.arms),
                **outcome_of(candidate, change, groups),
                "layers": len(arm.plan.layer[: arm.k].unique()),
                "accuracy": float(correct.double().mean()),
                "kl": kl,
                "rise": rise,
                "predicted": _predicted(trial.setting.profile, candidate),
                "change": [round(value, 4) for value in change.tolist()],
            }
        )
    hits = int(scores.correct[0].sum())
    return {
        "unsteered": {
            "log_odds": float(scores.margin[0].mean()),
            "accuracy": [hits / len(items), *share_interval(hits, len(items))],
        },
        "groups": [hashlib.sha256(group.encode()).hexdigest()[:12] for group in groups],
        "rows": rows,
    }


def _predicted(profile: Profile, candidate: Candidate) -> dict[str, float | None] | None:
    """The KL and the effect that a shift was predicted to have at its strength; None of other operations."""
    plan = candidate.arm.plan.top(candidate.arm.k)
    if plan.operation != "shift":
        return None
    dose = plan.dose
    effect = None if dose is None else dose.effect_of(candidate.alpha)
    return {"kl": profile.kl(plan, candidate.alpha) if dose is None else dose.kl_of(candidate.alpha), "effect": effect}


def _measured_sites(trial: Trial, curves: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Predicted and measured effect at the limit, of each step at each site."""
    k = KS[0]
    arms = [Arm("effect", kinds.effect_plan(trial.material, curve.sites, step, k), k, step) for step, curve in curves]
    trial.bring_to_limit(arms)
    items = range(len(trial.parts.tune))
    found = []
    with trial.setting.step("sites and steps, on tuning items", len(arms)) as advance:
        for (step, curve), arm in zip(curves, arms):
            for candidate in trial.at_limit([arm]):
                effect = float(trial.tune.changes([candidate], items).mean())
                predicted = kinds.effect_at(curve, k) * MAX_KL**0.5
                found.append(
                    {"sites": list(curve.sites), "step": step, "k": k, "predicted": predicted, "effect": effect}
                )
            advance(1)
    return found


def kept_momentum(setting: Setting, pairs: austeer.Pairs, sites: Sequence[str], path: Path) -> Momentum:
    """Momentum and effects of some pairs; from the file if they were measured before."""
    if path.exists():
        return Momentum.load(path)
    checkpoint = path.with_suffix(".checkpoint")
    with setting.step(f"measuring {len(pairs)} pairs", 1) as advance:
        momentum = austeer.measure(
            *(setting.model, setting.tokenizer, pairs, list(sites)),
            effects=True,
            checkpoint=checkpoint,
            resume=True,
            progress=False,
        )
        advance(1)
    momentum.save(path)
    checkpoint.unlink(missing_ok=True)
    return momentum
