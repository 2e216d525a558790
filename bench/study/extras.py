"""What a study asks beside its trials: how many pairs it takes, and whether a ranking by one text's profile holds.

Each answer is kept in a file, and read from there when it is asked for again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy import stats

from austeer.baselines import arms
from austeer.baselines.arm import Arm, Candidate, Material
from austeer.momentum.momentum import Momentum
from austeer.momentum.profile import Profile
from austeer.plans.plan import Plan
from austeer.tuning.data import Parts
from austeer.tuning.search import outcome_of
from austeer.utils.files import write_text

from .rows import KS, SITES
from .trial import FINAL_TEXTS, Setting, Trial, kept_momentum

#: Numbers of measured pairs.
PAIRS = (20, 50, 100, 200)

SITE = SITES[0]


def kept(path: Path, make: Callable[[], Any]) -> dict[str, Any]:
    """What ``make`` gives ("found") and how long it took ("seconds"), made once."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    start = time.perf_counter()
    found = {"found": make(), "seconds": time.perf_counter() - start}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found))
    return found


def pairs_needed(
    setting: Setting, parts: Parts, folder: Path, layer: int, counts: Sequence[int] = PAIRS
) -> list[dict[str, Any]]:
    """Held-out effect of AUs by effect and of CAA with so many measured pairs: the first ones of the same part.

    Args:
        parts: with the most pairs of ``counts`` to measure, or as many as there are. layer: CAA's.
    """
    assert parts.measure is not None
    counts = [count for count in counts if count <= len(parts.measure)]
    momentum: Momentum | None = None
    found = []
    for before, count in zip([0, *counts], counts):
        path = folder / f"pairs-{before}-{count}.safetensors"
        more = kept_momentum(setting, parts.measure[before:count], (SITE, "layer"), path)
        momentum = more if momentum is None else momentum.merge(more)
        trial = Trial(setting, parts, momentum, folder)
        chosen = [Arm("effect", _by_effect(trial.material, k), k) for k in KS]
        chosen += arms("caa", trial.material, sites=[SITE], ks=KS, layers=[layer])
        found += [{"pairs": count, **row} for row in _outcomes(trial, chosen)]
    return found


def other_text(
    setting: Setting, parts: Parts, folder: Path, other: Profile, named: str, momentum: Momentum
) -> list[dict[str, Any]]:
    """Held-out effect of AUs chosen with the profile of one text and of another, both at the limit on neutral text.

    Args:
        parts, momentum: of one trial. other: the profile of other text. named: what that is called.

    Returns:
        For each profile a row for each k; with how many AUs both chose, and Spearman's correlation of the side effects
        of all AUs of the site between the two profiles.
    """
    trial = Trial(setting, parts, momentum, folder)
    found = []
    side = [profile.fisher(SITE).flatten() for profile in (setting.profile, other)]
    correlation = float(stats.spearmanr(*side).statistic)
    materials = [replace(trial.material, profile=profile) for profile in (setting.profile, other)]
    plans = [{k: _by_effect(material, k) for k in KS} for material in materials]
    for name, own in zip(("neutral text", named), plans):
        for row in _outcomes(trial, [Arm("effect", plan, k, name) for k, plan in own.items()]):
            shared = len({*plans[0][row["k"]].keys()} & {*plans[1][row["k"]].keys()}) / row["k"]
            found.append({"text": name, "shared": shared, "correlation": correlation, **row})
    return found


def _by_effect(material: Material, k: int) -> Plan:
    return material.momentum.select(SITE, k, rank="effect", profile=material.profile)


def _outcomes(trial: Trial, chosen: Sequence[Arm]) -> list[dict[str, Any]]:
    """What arms do to the test part at the limit."""
    trial.bring_to_limit(chosen, FINAL_TEXTS)
    candidates: list[Candidate] = trial.at_limit(chosen)
    groups = [item.group for item in trial.parts.test]
    changes = trial.test.changes(candidates, range(len(groups)))
    return [outcome_of(candidate, change, groups) for candidate, change in zip(candidates, changes)]
