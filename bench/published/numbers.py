"""Named numbers and texts from the results: what a span may hold. Names begin with the device's folder and the kind.

<...>.source                            the result file, as a link (demo, host, momentum, inference.<model>, study)
<device>.demo.seconds, .cores, .max_kl, .unsteered.<log_odds|accuracy>; .printed a block: what the demo prints
<device>.demo.<chosen|shift|push|scale|random>.<operation|site|k|effect|low|high|kl|...>, .over.<another>
<device>.demo.time.<variant>.ms, .percent, .low, .high      over unsteered, quartiles
<device>.host.<variant>.us, .low, .high; .table a block
<device>.momentum.<set>.<way>.pairs_a_second, .<way>.over.<other>, .at_1000.<way>.over.<other>; .table, .report blocks
<device>.momentum.unshared.<least|most>, .memory.<way>.<few|many>.<pairs|mb>, .memory.<way>.mb_a_pair
<device>.momentum.offloaded.pairs, .read, .<cached|disk>.over.<other>, .<cached|disk>.at_1000.over.<other>
<device>.inference.<model>.<execution>.<site>.b<batch>.k<k>.l<layers>.p<prompt>.<variant>.<token|first_token>
                                        (behind the site the operation, where it is not scale)
                                        percent over unsteered; with .low and .high behind it the interval's ends
<device>.study.<model>.minutes, .figure; .causal, .causal.predicted, .causal.together blocks
<device>.study.<model>.<task>.<row>.<effect|low|high|kl>
study.methods                           a block, of all models: goals and tables of the study
serving.exactness                       a block, of what the engines' tests wrote (make test-engines EXACTNESS=FILE)
served.cost                             a block: what the vLLM plugin costs (make bench-served)
efficiency.<section>, .summary                  blocks: see efficiency.py
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from ..compare import MANY
from ..offloaded import CACHED, FROM_DISK, LAYERWISE
from ..ways import STACKED, UNSHARED
from . import demo, efficiency, study, tables
from .inference import METRICS, Inference
from .load import Result, Results, slug

Named = Iterator[tuple[str, object]]


def values(results: Results) -> dict[str, object]:
    """Everything that a span may hold, by name."""
    found: dict[str, object] = {}
    makers = {"demo": _demo, "host": _host, "momentum": _momentum, "inference": _inference, "study": _study}
    for result in results:
        if result.kind in makers:
            prefix = f"{result.device}.{result.kind}"
            prefix += f".{result.subject}" if result.model else ""
            alone = f".{result.executions[0]}" if len(result.executions) == 1 else ""
            found[f"{prefix}{alone}.source"] = result.link
            found.update((f"{prefix}.{name}", value) for name, value in makers[result.kind](result))
    found["study.methods"] = study.report(results)
    found["serving.exactness"] = tables.exactness(results)
    found["served.cost"] = tables.served(results)
    found.update((f"efficiency.{name}", text) for name, text in efficiency.blocks(results).items())
    return found


def _demo(result: Result) -> Named:
    content = result.content
    yield "seconds", content["seconds"]
    yield "cores", content["environment"]["cores"]
    yield "printed", demo.printed(content)
    yield "max_kl", content["max_kl"]
    for key in ("log_odds", "accuracy"):
        yield f"unsteered.{key}", content["unsteered"][key]
    chosen, *_ = held_out = content["held_out"]
    rows = {"chosen": chosen, **{row["operation"]: row for row in held_out if row["method"] == "momentum"}}
    keys = ("operation", "site", "k", "alpha", "effect", "low", "high", "accuracy", "kl", "rise")
    found = {name: {key: row[key] for key in keys} for name, row in rows.items()}
    drawn = [row for row in held_out if row["method"] == "random"]
    if drawn:
        found["random"] = {key: mean(row[key] for row in drawn) for key in ("effect", "kl", "rise")}
        effects = [row["effect"] for row in drawn]
        found["random"] |= {"low": min(effects), "high": max(effects), "draws": len(drawn)}
    for name, row in found.items():
        yield from ((f"{name}.{key}", value) for key, value in row.items())
        for other, beside in found.items():
            if other != name and beside["effect"]:
                yield f"{name}.over.{other}", row["effect"] / beside["effect"]
    for name, row in content["timings"].items():
        yield f"time.{slug(name)}.ms", 1000 * row["seconds"]
        for key, ratio in (("percent", "ratio"), ("low", "low"), ("high", "high")):
            yield f"time.{slug(name)}.{key}", 100 * (row[ratio] - 1)


def _study(result: Result) -> Named:
    yield "figure", tables.picture(f"{result.name}-study", "Held-out effect of every method, task by task")
    yield from study.values(result)


def _host(result: Result) -> Named:
    batch = result.content["batches"][0]
    yield "table", tables.host(result)
    for name, row in batch["variants"].items():
        alone = row["us_by_itself"]
        yield f"{slug(name)}.us", alone["median"]
        yield f"{slug(name)}.low", alone["low"]
        yield f"{slug(name)}.high", alone["high"]


def _momentum(result: Result) -> Named:
    content = result.content
    yield "table", tables.momentum(content["sets"])
    for row in content["sets"]:
        for way, own in row["ways"].items():
            yield f"{row['set']}.{slug(way)}.pairs_a_second", own["pairs_a_second"]
        yield from ((f"{row['set']}.{name}", value) for name, value in _ratios(row))
    if content["sets"]:
        yield "report", demo.measured(content["sets"][0]["ways"]["ours"]["report"])
        unshared = [row["ways"][UNSHARED]["faster_than"][STACKED]["median"] for row in content["sets"]]
        yield "unshared.least", min(unshared)
        yield "unshared.most", max(unshared)
    for extra in content["memory"]:
        few, many = extra["runs"]
        at = f"memory.{slug(extra['way'])}"
        for name, run in (("few", few), ("many", many)):
            yield f"{at}.{name}.pairs", run["pairs"]
            yield f"{at}.{name}.mb", run["bytes"] / 1e6
        yield f"{at}.mb_a_pair", (many["bytes"] - few["bytes"]) / (many["pairs"] - few["pairs"]) / 1e6
    for case, row in (content["offloaded"] or {"cases": {}})["cases"].items():
        at = {CACHED: "cached", FROM_DISK: "disk"}[case]
        own = row["ways"][LAYERWISE]
        yield from ((f"offloaded.{at}.{name}", value) for name, value in _ratios({"ways": {"": own}}))
        yield "offloaded.pairs", own["pairs"]
        yield "offloaded.read", own["report"]["weights_read"] / content["offloaded"]["weights"]


def _ratios(row: dict[str, Any]) -> Named:
    """How much faster every way of a set is than others, as run and at many pairs."""
    for way, own in row["ways"].items():
        over = f"{slug(way)}.over" if way else "over"
        for key, where in (("faster_than", ""), (f"faster_than_at_{MANY}", f"at_{MANY}.")):
            for other, ratio in own[key].items():
                yield f"{where}{over}.{slug(other)}", ratio["median"]


def _inference(result: Result) -> Named:
    for case in Inference(result).cases:
        execution, site, operation, k, layers, prompt = case.setting
        at = f"{slug(execution)}.{slug(site)}" + (f".{operation}" if operation != "scale" else "")
        at += f".b{case.batch}.k{k}.l{layers}.p{prompt}"
        for name in case.variants:
            for metric in METRICS:
                found = case.overhead(name, metric)
                if found is not None:
                    yield f"{at}.{slug(name)}.{metric}", found.median
                    yield f"{at}.{slug(name)}.{metric}.low", found.low
                    yield f"{at}.{slug(name)}.{metric}.high", found.high
