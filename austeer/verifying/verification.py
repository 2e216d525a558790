"""What came of a comparison, as data and in print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..errors import count_of
from ..plans.replay import APPLIED, Replay

WIDTH = 80
#: Characters of a plan's digest that tell it from any other.
DIGEST = 16


@dataclass(frozen=True)
class Verification:
    """What came of a comparison with a replay; ``str`` of it is a report for people.

    Attributes:
        verdict: "applied"; "not applied"; "applied elsewhere (layers + 1)", "sign flipped", "half strength",
            "generation only" and the like, or several that cannot be told apart; "applied to every request", also to
            those that ask for no plan; "stale prompt cache"; "something else"; or "cannot tell".
        reason: more, where the verdict alone does not say what is meant.
        differences: for each hypothesis the largest difference of a log-probability that steered requests have from
            it, nats.
        unsteered: the same of unsteered requests, from "not applied"; None where there were none.
        effect: what the plan itself moves a log-probability by, at most.
        agreeing: how many greedy tokens were those of "applied".
        replay: what was compared with.
        engine: what ran, in words. versions: of packages, by name.
    """

    verdict: str
    reason: str
    differences: dict[str, float]
    unsteered: float | None
    effect: float
    agreeing: int
    replay: Replay = field(repr=False)
    engine: str
    versions: dict[str, str]

    @property
    def applied(self) -> bool:
        """Whether the plan does what was recorded, and nothing else is wrong."""
        return self.verdict == APPLIED

    def to_json(self) -> dict[str, Any]:
        """All but the replay's texts and numbers."""
        replay = self.replay
        return {
            "verdict": self.verdict,
            "applied": self.applied,
            "reason": self.reason,
            "engine": self.engine,
            "versions": self.versions,
            "plan": {
                **{"digest": replay.digest, "operation": replay.operation, "k": replay.k},
                **{"layers": replay.layers, "alpha": replay.alpha, "scope": replay.scope},
            },
            "recorded": {"dtype": replay.dtype, "prompts": len(replay.prompts), "tokens": replay.tokens},
            "differences": self.differences,
            "unsteered": self.unsteered,
            "effect": self.effect,
            "agreeing": self.agreeing,
        }

    def __str__(self) -> str:
        """A report of at most 80 characters a line, for a terminal or an issue."""
        return _report(self)


def _report(found: Verification) -> str:
    replay = found.replay
    units = f"{replay.operation}, {count_of(replay.k, 'AU')}"
    rows = {
        "engine": found.engine,
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "plan": f"{replay.digest[:DIGEST]}: {units} at {_sites(replay)}",
        "strength": f"alpha {_alpha(replay)}, {_scope(replay)}",
        "recorded": f"{count_of(len(replay.prompts), 'prompt')}, {count_of(replay.tokens, 'token')}, {replay.dtype}",
        "unsteered": "no such request was made"
        if found.unsteered is None
        else f"within {_nats(found.unsteered)} nats of the record",
        "tokens": f"{found.agreeing} of {replay.tokens} as recorded with the plan",
    }
    lines = _wrapped(f"austeer verify: {found.verdict}" + (f" ({found.reason})" if found.reason else ""), "  ")
    for name, text in rows.items():
        lines += _wrapped(f"  {name:<10} {text}", " " * 13)
    lines += ["", "  steered requests, as if   largest difference of a log-probability, nats"]
    order = sorted(found.differences.items(), key=lambda item: item[1])
    return "\n".join([*lines, *(f"  {name:<25} {_nats(value)}" for name, value in order)])


def _alpha(replay: Replay) -> str:
    """The strength, in words."""
    if not isinstance(replay.alpha, dict):
        return f"{replay.alpha:.6g}"
    return ", ".join(f"{site} {value:.6g}" for site, value in replay.alpha.items())


def _scope(replay: Replay) -> str:
    """The tokens that are steered, in words."""
    scope = replay.scope
    return f"scope {scope}" if isinstance(scope, str) else f"tokens {scope[0]}:{'' if scope[1] is None else scope[1]}"


def _sites(replay: Replay) -> str:
    return "; ".join(f"{site}, {_layers(layers)}" for site, layers in replay.layers.items())


def _layers(layers: Sequence[int]) -> str:
    """Layers in words, those in a row as the first and the last of them."""
    runs = []
    for _, group in groupby(enumerate(sorted(layers)), lambda item: item[1] - item[0]):
        row = [layer for _, layer in group]
        runs.append(f"{row[0]}-{row[-1]}" if len(row) > 2 else ", ".join(map(str, row)))
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(runs)}"


def _nats(value: float) -> str:
    return f"{value:.5f}" if value < 0.01 else f"{value:.3f}"


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
