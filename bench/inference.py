"""What steering costs at inference: every way on the same model and AUs, checked, then timed token by token."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from austeer.costs.ceilings import Ceilings, ceilings
from austeer.costs.steering import steering_cost
from austeer.models.sites import find_sites, fingerprint
from austeer.models.structure import input_device, text_config

from . import counted_ops, files, steps, turns
from .catalogue import AGAIN, UNSTEERED
from .graphs import spread
from .intervals import LEVEL, NARROW, NOISE, Ratio, ratio, verdict
from .lineup import EAGER, Case, Lineup
from .steered import Way

KIND = "inference"


@dataclass(frozen=True)
class Effort:
    """How long a case is measured.

    Attributes:
        seconds: about so long. least: but so many generations (eager) or groups of steps. most: and no more.
            With few the bootstrap's intervals are too narrow.
        tokens: of a generation, the first one included; steps of a group.
        counts: whether launches and bytes are counted too, which takes a second a way.
    """

    seconds: float = 120.0
    least: int = 12
    most: int = 10_000
    tokens: int = 8
    counts: bool = True

    def clock(self) -> Callable[[int], bool]:
        """Whether there is to be another generation, by how many there were; starts when it is asked first."""
        begun: list[float] = []

        def go_on(done: int) -> bool:
            begun.append(time.perf_counter())
            return done < self.least or (done < self.most and begun[-1] - begun[0] < self.seconds)

        return go_on


@dataclass(frozen=True)
class Job:
    """A case, with the ways that are measured in it, and for how long."""

    case: Case
    ways: Mapping[str, Way]
    effort: Effort


#: What is told of a run: how many turns of all ways were made since the last time, and what is being done.
Tell = Callable[[int, str], None]


def _nobody(turns: int, text: str) -> None:
    """Tells nobody."""


def sweep(base: Case, **values: Sequence[Any]) -> tuple[list[Case], dict[str, list[Case]]]:
    """The base case, and for each field the cases that differ from it in this one alone.

    Args:
        values: for a field of :class:`Case`, all its values; the base's own may be among them.

    Returns:
        The cases, and for "main" and each field that has several values its cases, in the order given.
    """
    cases, series = [base], {"main": [base]}
    for name, found in values.items():
        own = [replace(base, **{name: value}) for value in dict.fromkeys(found)]
        cases += [case for case in own if case not in cases]
        if len(own) > 1:
            series[name] = own
    return cases, series


def run(
    model: PreTrainedModel,
    name: str,
    jobs: Sequence[Job],
    series: Mapping[str, Sequence[Case]],
    commit: str | None = None,
    tell: Tell = _nobody,
    failed: Callable[[Case, Exception], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures case by case; gives, after each, the content of the result file so far.

    Args:
        series: for each sweep its cases. commit: see :func:`bench.files.about`.
        failed: is told of a case that cannot be measured, and the others go on; without it the error is raised.

    Raises:
        AusteerError: a case that the model cannot have, before anything is measured.
    """
    device = input_device(model)
    for job in jobs:
        job.case.check(model, job.effort.tokens)
    config = text_config(model)
    limits = ceilings(device, model.dtype)
    settings = {"turns": turns.TURNS, "level": LEVEL, "narrow": NARROW, "noise": NOISE}
    content: dict[str, Any] = {
        "kind": KIND,
        "schema": files.SCHEMAS[KIND],
        "environment": files.about(device, commit),
        "model": {
            "name": name,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "settings": asdict(jobs[0].effort) | settings,
        "complete": False,
        "series": {},
        "ceilings": limits.to_json(),
        "cases": [],
    }
    measured: list[Case] = []
    gc.freeze()  # what is there now stays: looking through it again and again would take longer than measuring
    try:
        for job in jobs:
            try:
                content["cases"].append(measure(model, limits, job, tell))
            except Exception as error:
                if failed is None:
                    raise
                failed(job.case, error)
                continue
            measured.append(job.case)
            content["complete"] = len(measured) == len(jobs)
            content["series"] = {
                key: numbers
                for key, own in series.items()
                if (numbers := [measured.index(case) for case in own if case in measured])
            }
            yield content
    finally:
        gc.unfreeze()


def measure(model: PreTrainedModel, limits: Ceilings, job: Job, tell: Tell = _nobody) -> dict[str, Any]:
    """One case: every way is checked, looked at, then timed."""
    case, effort = job.case, job.effort
    with Lineup(model, case, job.ways, lambda way: tell(0, f"{case} · {way}")) as lineup:
        rows, made, prompt = lineup.rows, lineup.made, lineup.prompt
        if case.execution == EAGER:
            seconds = turns.by_turns(
                made, prompt, effort.tokens, effort.clock(), on_generation=lambda: tell(1, str(case))
            )
        else:
            seconds = {"token": steps.by_turns(lineup.steps, effort.tokens, effort.clock(), lambda: tell(1, str(case)))}
        for name, way in made.items():  # when all is timed: a profiler may slow down what comes after it
            counted = effort.counts and job.ways[name].module
            rows[name] |= counted_ops.of_step_or_why_not(way, prompt(-1)) if counted else counted_ops.UNKNOWN
        if effort.counts:
            try:
                _add_predictions(rows, model, case, limits)
            except Exception as error:  # as with counts, times are not to be lost to it
                rows[UNSTEERED]["not_predicted"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    noise, possible = _add_times(rows, case.batch, seconds)
    return asdict(case) | {
        "layers": lineup.plan.layer.unique().numel(),
        "alpha": lineup.gate.alpha,
        "noise": noise,
        "verdicts_possible": possible,
        "variants": rows,
    }


def _add_predictions(rows: dict[str, dict[str, Any]], model: nn.Module, case: Case, limits: Ceilings) -> None:
    """What the analytic model says of a decoded token, beside what was counted, and the floor of the counted work."""
    known = {name: getattr(limits, name) for name in ("bandwidth", "flops", "launch")}
    sizes = {"batch": case.batch, "prompt_tokens": case.prompt_tokens, "context": case.prompt_tokens + 1}
    device, dtype = str(input_device(model)), model.dtype
    found = steering_cost(
        *(model, case.site, case.k),
        **{"layers": case.layers, "operation": case.operation, "dtype": dtype, "device": device, **sizes, **known},
    ).decode
    itself = found.unsteered
    for name, row in rows.items():
        if name in (UNSTEERED, AGAIN):
            row["predicted"] = {"bytes": itself.bytes, "launches": itself.launches}
        elif name in found.extra:
            work, launches = found.extra[name].work, itself.launches
            row["predicted"] = {
                "bytes": itself.bytes + work.bytes,
                "launches": None if launches is None else launches + work.launches,
            }
        if row.get("bytes") is not None:
            row["floor_seconds"] = limits.seconds(row["bytes"], row["operations"], 0)


def _add_times(
    rows: dict[str, dict[str, Any]], batch: int, seconds: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
) -> tuple[dict[str, float], dict[str, bool]]:
    """Times, ratios and verdicts; returns how noisy each metric is, and whether that leaves room for verdicts."""
    noise, possible = {}, {}
    for what, found in seconds.items():
        ratios: dict[str, Ratio] = {name: ratio(values, found[UNSTEERED]) for name, values in found.items()}
        again = ratios[AGAIN]
        noise[what], possible[what] = again.noise, again.noise <= NOISE
        for name, values in found.items():
            flat = [one for group in values for one in group]
            rows[name][what] = {"seconds": asdict(spread(flat)), "ratio": asdict(ratios[name])}
            if name not in (UNSTEERED, AGAIN):
                rows[name].setdefault("verdict", {})[what] = verdict(ratios[name], again)
            if what == "token":
                rows[name]["tokens_a_second"] = batch / statistics.median(flat)
    return noise, possible


def touched_most(model: nn.Module, site: str) -> int:
    """All AUs of a site."""
    found = find_sites(model, [site])
    return fingerprint(model, found).widths[site] * len(found[site])
