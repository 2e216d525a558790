"""A verification in print: a few lines for a terminal, or for an issue."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from ..errors import count_of
from ..plans.replay import Replay

if TYPE_CHECKING:
    from .verdict import Verification

WIDTH = 80
#: Characters of a plan's digest that tell it from any other.
DIGEST = 16


def report(found: Verification) -> str:
    """At most 80 characters a line."""
    replay = found.replay
    units = f"{replay.operation}, {count_of(replay.k, 'AU')}"
    rows = {
        "engine": found.engine,
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "plan": f"{replay.digest[:DIGEST]}: {units} at {_sites(replay)}",
        "strength": f"alpha {alpha_of(replay)}, {scope_of(replay)}",
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


def alpha_of(replay: Replay) -> str:
    """The strength, in words."""
    if not isinstance(replay.alpha, dict):
        return f"{replay.alpha:.6g}"
    return ", ".join(f"{site} {value:.6g}" for site, value in replay.alpha.items())


def scope_of(replay: Replay) -> str:
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
