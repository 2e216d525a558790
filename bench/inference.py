"""What steering costs at inference: every way on the same model and AUs, checked, then timed token by token."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from austeer.costs.ceilings import Ceilings, ceilings
from austeer.costs.steering import steering_cost
from austeer.errors import AusteerError
from austeer.models.sites import find_sites, fingerprint
from austeer.models.structure import input_device, text_config

from . import breakdown, counts, files, footprint, steps, turns
from .catalogue import AGAIN, UNSTEERED
from .gate import Exact, Gate, Outcome
from .graphs import spread
from .intervals import LEVEL, NARROW, NOISE, NOISY, SAME, Ratio, ratio, verdict
from .plans import spread_plan
from .steered import Steered, UnavailableError, Way, twin

KIND, SCHEMA = "inference", 1
EAGER = "eager"
EXECUTIONS = (EAGER, steps.COMPILE, steps.GRAPH)
#: How many tokens of a prompt the gate looks at.
GATE_TOKENS = 12
BREAKDOWN_ROUNDS = 200
#: Decoding under CUDA graphs, ours may take this times what the unsteered model takes.
GRAPH_GOAL = 1.005


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        execution: "eager": Transformers' generate; "compile" or "graph": one decoding step with a static cache.
        layers: how many layers have AUs; None: as many as there are, or as k.
    """

    execution: str = EAGER
    batch: int = 1
    site: str = "ffn"
    k: int = 100
    layers: int | None = None
    prompt_tokens: int = 32

    def __str__(self) -> str:
        layers = "" if self.layers is None else f", {self.layers} layers"
        return (
            f"{self.execution}, batch {self.batch}, {self.site}, k={self.k}{layers}, "
            f"prompt of {self.prompt_tokens} tokens"
        )


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


def sweep(base: Case, **values: Sequence[Any]) -> tuple[list[Case], dict[str, list[int]]]:
    """The base case, and for each field the cases that differ from it in this one alone.

    Args:
        values: for a field of :class:`Case`, all its values; the base's own may be among them.

    Returns:
        The cases, and for "main" and each field that has several values the numbers of its cases, in the order given.
    """
    cases, series = [base], {"main": [0]}
    for name, found in values.items():
        own = [replace(base, **{name: value}) for value in dict.fromkeys(found)]
        cases += [case for case in own if case not in cases]
        if len(own) > 1:
            series[name] = [cases.index(case) for case in own]
    return cases, series


def run(
    model: PreTrainedModel,
    name: str,
    cases: Sequence[Case],
    series: Mapping[str, Sequence[int]],
    ways: Mapping[str, Way],
    effort: Effort,
    others: Mapping[int, tuple[Mapping[str, Way], Effort]] | None = None,
    commit: str | None = None,
    on_case: Callable[[str], None] = lambda text: None,
    on_way: Callable[[str], None] = lambda text: None,
    on_turn: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Measures case by case; gives, after each, the content of the result file so far.

    Args:
        ways, effort: of every case but ``others``, by their numbers.

    Raises:
        AusteerError: a case that the model cannot have, before anything is measured.
    """
    device = input_device(model)
    for number, case in enumerate(cases):
        check_case(case, model, (others or {}).get(number, (ways, effort))[1].tokens)
    exact = Exact(model)
    config = text_config(model)
    content: dict[str, Any] = {
        "kind": KIND,
        "schema": SCHEMA,
        "environment": files.about(device, commit),
        "model": {
            "name": name,
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "settings": asdict(effort) | {"turns": turns.TURNS, "level": LEVEL, "narrow": NARROW, "noise": NOISE},
        "complete": False,
        "series": {key: list(numbers) for key, numbers in series.items()},
        "cases": [],
    }
    limits = ceilings(device, model.dtype)
    content["ceilings"] = limits.to_json()
    main = cases[0]
    width = spread_plan(model, main.site, main.k, main.layers).model.widths[main.site]
    a_layer = -(-main.k // (main.layers or min(main.k, config.num_hidden_layers)))
    content["breakdown"] = breakdown.measure(
        config.num_hidden_layers, (main.batch, width), a_layer, model.dtype, device, BREAKDOWN_ROUNDS
    )
    gc.freeze()  # what is there now stays: looking through it again and again would take longer than measuring
    try:
        for number, case in enumerate(cases):
            on_case(str(case))
            own = (others or {}).get(number, (ways, effort))
            content["cases"].append(measure(model, exact, limits, case, *own, on_way, on_turn))
            content["complete"] = len(content["cases"]) == len(cases)
            yield content | {"goals": goals(content["cases"], device.type)}
    finally:
        gc.unfreeze()


def check_case(case: Case, model: nn.Module, tokens: int = steps.ROOM) -> None:
    """
    Args:
        tokens: that are generated after the prompt, at most.

    Raises:
        AusteerError: the model cannot have the case, or the machine cannot run it.
    """
    tokens = max(tokens, steps.ROOM)
    if case.execution not in EXECUTIONS:
        raise AusteerError(f"execution: found {case.execution!r}, expected {', '.join(EXECUTIONS)}")
    if case.execution == steps.GRAPH and input_device(model).type != "cuda":
        raise AusteerError("execution 'graph': found a CPU, expected a GPU; leave it out, or name a GPU with --device")
    if min(case.batch, case.prompt_tokens) < 1:
        raise AusteerError(f"found {case}, expected a batch and a prompt of at least 1")
    longest = getattr(text_config(model), "max_position_embeddings", None) or case.prompt_tokens + tokens
    if case.prompt_tokens + tokens > longest:
        raise AusteerError(
            f"prompt: found {case.prompt_tokens} tokens and {tokens} after them, expected at most {longest} together "
            "(the model)"
        )
    spread_plan(model, case.site, case.k, case.layers)


def prompts(model: nn.Module, batch: int, length: int) -> Callable[[int], Tensor]:
    """Random token numbers [batch, length], the same each time that a number is asked for."""
    device, vocabulary = input_device(model), text_config(model).vocab_size

    def prompt(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number + 1)
        return torch.randint(vocabulary // 8, vocabulary, (batch, length), generator=generator).to(device)

    return prompt


def measure(
    model: PreTrainedModel,
    exact: Exact,
    limits: Ceilings,
    case: Case,
    ways: Mapping[str, Way],
    effort: Effort,
    on_way: Callable[[str], None] = lambda text: None,
    on_turn: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One case: every way is checked, looked at, then timed.

    Raises:
        WeakGateError: see :class:`bench.gate.Gate`.
    """
    plan = spread_plan(model, case.site, case.k, case.layers)
    prompt = prompts(model, case.batch, case.prompt_tokens)
    gate = Gate(model, exact, plan, prompts(model, case.batch, min(case.prompt_tokens, GATE_TOKENS))(-2))
    rows: dict[str, dict[str, Any]] = {}
    made: dict[str, Steered] = {}
    stepping: dict[str, steps.Step] = {}
    try:
        for name, way in ways.items():
            on_way(name)
            rows[name] = {"status": "measured", "reason": "", "ours": way.ours, "peer": way.peer}
            before = footprint.storages(model)
            try:
                if case.execution != EAGER and not way.module:
                    raise UnavailableError("it runs eagerly only")
                made[name] = way.make(twin(model), plan, gate.alpha)
                rows[name]["held_bytes"] = footprint.added(before)
                if case.execution != EAGER:
                    stepping[name] = steps.Step(made[name], prompt(-1), case.execution)
                rows[name] |= _judged(gate, name, made[name], stepping.get(name), prompt(-1))
            except UnavailableError as error:
                rows[name] |= {"status": "skipped", "reason": str(error)}
            except Exception as error:  # another library's, say, on a model that it does not know
                if name in (UNSTEERED, AGAIN):
                    raise
                rows[name] |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if rows[name]["status"] != "measured":
                if name in (UNSTEERED, AGAIN):
                    row = rows[name]
                    raise AusteerError(f"{case}: the unsteered model itself is {row['status']}: {row['reason']}")
                stepping.pop(name, None)
                if name in made:
                    made.pop(name).close()
        if case.execution == EAGER:
            _add_peaks(rows, made, prompt(-1), effort.tokens)
            times = turns.by_turns(made, prompt, effort.tokens, effort.clock(), on_generation=on_turn)
            first = {name: [[one] for one in found.first] for name, found in times.items()}
            seconds = {"first_token": first, "token": {name: found.token for name, found in times.items()}}
        else:
            seconds = {"token": steps.by_turns(stepping, effort.tokens, effort.clock(), on_turn)}
        for name, way in made.items():  # when all is timed: a profiler may slow down what comes after it
            counted = effort.counts and ways[name].module
            rows[name] |= counts.of_step(way, prompt(-1)) if counted else counts.UNKNOWN
        if effort.counts:
            _add_predictions(rows, model, case, limits)
    finally:
        for way in made.values():
            way.close()
        if case.execution == steps.COMPILE:
            torch._dynamo.reset()
    return _summary(case, plan.layer.unique().numel(), gate, rows, seconds)


def _judged(gate: Gate, name: str, way: Steered, step: steps.Step | None, ids: Tensor) -> dict[str, Any]:
    """What the gate says of a way, and of its compiled or captured step; of the unsteered model's, that alone."""
    unsteered = name in (UNSTEERED, AGAIN)
    if unsteered and step is None:
        return {}
    outcome: Outcome | None = None if unsteered else gate(way)
    if step is not None and (outcome is None or not outcome.reason):
        outcome = gate.judge_step(step.run(), torch.cat([ids, step.token], 1), unsteered)
    assert outcome is not None
    found = {"error": outcome.error, "allowed": outcome.allowed, "effect": outcome.effect}
    return found | ({"status": "wrong", "reason": outcome.reason} if outcome.reason else {})


def _add_predictions(rows: dict[str, dict[str, Any]], model: nn.Module, case: Case, limits: Ceilings) -> None:
    """What the analytic model says of a decoded token, beside what was counted, and the floor of the counted work."""
    known = {name: getattr(limits, name) for name in ("bandwidth", "flops", "launch")}
    sizes = {"batch": case.batch, "prompt_tokens": case.prompt_tokens, "context": case.prompt_tokens + 1}
    device, dtype = str(input_device(model)), model.dtype
    found = steering_cost(
        model, case.site, case.k, layers=case.layers, dtype=dtype, device=device, **sizes, **known
    ).decode  # type: ignore[arg-type]
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


def _add_peaks(rows: dict[str, dict[str, Any]], made: Mapping[str, Steered], ids: Tensor, tokens: int) -> None:
    """Bytes at the peak of a generation, and how many more than the unsteered model's, with what is held."""

    def generate(way: Steered) -> None:
        with way.active():
            way.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    for name, way in made.items():
        generate(way)
        rows[name]["peak_bytes"] = footprint.peak(lambda way=way: generate(way), ids.device)
    least = rows[UNSTEERED]["peak_bytes"]
    for name in made:
        more = None if least is None else rows[name]["peak_bytes"] - least
        rows[name]["extra_bytes"] = None if more is None else rows[name]["held_bytes"] + more


def _summary(
    case: Case,
    layers: int,
    gate: Gate,
    rows: dict[str, dict[str, Any]],
    seconds: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
) -> dict[str, Any]:
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
                rows[name]["tokens_a_second"] = case.batch / statistics.median(flat)
    return asdict(case) | {
        "layers": layers,
        "alpha": gate.alpha,
        "noise": noise,
        "verdicts_possible": possible,
        "variants": rows,
    }


def goals(cases: Sequence[dict[str, Any]], device: str = "cpu") -> list[dict[str, Any]]:
    """What was to be reached on a kind of device, and what was; ``met`` is None where noise hides the answer."""
    found = []
    for case in cases:
        where = str(Case(**{name: case[name] for name in Case.__dataclass_fields__}))
        for name, row in case["variants"].items():
            if not row["ours"] or "token" not in row:
                continue
            said, of = row["verdict"]["token"], row["token"]["ratio"]
            if case["execution"] == steps.GRAPH:
                text = f"decoding under CUDA graphs, ours takes at most {GRAPH_GOAL:g}x the unsteered time"
                within = True if of["high"] <= GRAPH_GOAL else False if of["low"] > GRAPH_GOAL else None
                met = None if said == NOISY else within
                found.append(
                    {"text": text, "case": f"{name}, {where}", "value": of["median"], "limit": GRAPH_GOAL, "met": met}
                )
            elif device == "cpu" and case["execution"] == EAGER and name in ("fold", "columns"):
                text = "fold and columns: the interval of the ratio contains 1 and is narrower than 2 %"
                met = None if said == NOISY else said == SAME
                value = of["high"] - of["low"]
                found.append({"text": text, "case": f"{name}, {where}", "value": value, "limit": NARROW, "met": met})
    return found


def touched_most(model: nn.Module, site: str) -> int:
    """All AUs of a site."""
    found = find_sites(model, [site])
    return fingerprint(model, found).widths[site] * len(found[site])
