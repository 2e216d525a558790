"""The study: methods at equal side effect on held-out items, stability of rankings, single AUs, and cost, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from austeer.utils.tables import signed

from .load import Result
from .tables import table

#: Words for the ways of the causal check.
WAYS = {
    "scale": "doubled and zeroed",
    "shift": "shifted by the mean difference",
    "deviation": "shifted by a standard deviation",
}


def values(result: Result) -> Iterator[tuple[str, object]]:
    """Everything that pages may show of a study; see numbers.py."""
    content = result.content
    tasks = content["tasks"]
    yield "seconds", content["seconds"]
    yield "minutes", content["seconds"] / 60
    yield "tasks", table(["task", "measured", "tuned on", "held out", "unsteered accuracy"], map(_task, tasks.items()))
    ks = next(iter(next(iter(tasks.values()))["stability"].values()))["k"]
    head = ["task", "pairs", "site", "AUs at FDR 5 %", *(f"overlap, k = {k} (chance)" for k in ks)]
    yield "stability", table(head, [row for name, task in tasks.items() for row in _stability(name, task)])
    yield "operations", table(["task", "site", "scale (the paper)", "push", "shift"], _operations(tasks))
    yield "methods", table(["method", *tasks], _summary(tasks))
    yield from causal_tables(tasks)
    for name, task in tasks.items():
        yield f"{name}.table", _held_out(task)
        if task["cost"]:
            yield "cost", _cost(task)
    for name, task in tasks.items():
        for row in task["held_out"]:
            at = f"{name}.{row['method']}.{row['operation']}"
            for key in ("effect", "low", "high", "accuracy", "kl", "k"):
                yield f"{at}.{key}", row[key]
            if row["behind"] is not None:
                yield f"{at}.behind", row["behind"][0]


def causal_tables(tasks: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """The causal check of those tasks that have one, by name."""
    head = ["task", "each AU alone", "top AUs", "matched random", "difference [95 %]"]
    yield "causal", table([*head, "rank correlation with beta [95 %]"], causal(tasks))
    head = ["task", "each AU alone", "beta", "delta", "predicted effect", "measured for a nat predicted"]
    yield "causal.predicted", table(head, predicted(tasks))
    head = ["task", "strength of ten AUs", "correlation of predicted and measured", "measured for a nat predicted"]
    yield "causal.together", table(head, together(tasks))


def _task(item: tuple[str, dict[str, Any]]) -> list[str]:
    name, task = item
    parts, plain = task["settings"]["data"], task["unsteered"]
    return [
        name,
        f"{parts['measure']['pairs']} pairs",
        f"{parts['tune']['items']} items",
        f"{parts['test']['items']} items",
        f"{plain['accuracy']:.0%} [{plain['accuracy_low']:.0%}, {plain['accuracy_high']:.0%}]",
    ]


def _stability(name: str, task: dict[str, Any]) -> Iterator[list[str]]:
    for site, found in task["stability"].items():
        shares = [f"{o:.2f} ({c:.3f})" for o, c in zip(found["overlap"], found["chance"])]
        pairs = found["pairs"] if isinstance(found["pairs"], int) else sum(found["pairs"])
        yield [name, str(pairs), site, f"{found['discoveries']} of {found['size']}", *shares]


def _interval(row: dict[str, Any], key: str = "effect", digits: int = 2) -> str:
    if row["low"] is None:
        return signed(row[key], digits)
    return f"{signed(row[key], digits)} [{signed(row['low'], digits)}, {signed(row['high'], digits)}]"


def _operations(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """The best setting of each site and operation, of momentum's AUs, on the tuning items, all at the same limit."""
    for name, task in tasks.items():
        found = [*task["trials"], *task["layer"]["trials"]]
        for site in (*task["settings"]["sites"], "layer"):
            cells = []
            for operation in ("scale", "push", "shift"):
                kind = ("momentum", site, operation)
                trials = [t for t in found if (t["method"], t["site"], t["operation"]) == kind]
                best = max(trials, key=lambda t: (t["items"], t["effect"]), default=None)
                cells.append("none within the limit" if best is None else f"{_interval(best)}, n = {best['items']}")
            yield [name, site, *cells]


def _summary(tasks: dict[str, Any]) -> list[list[str]]:
    """One row a method and operation: held-out effect on each task; bold where the interval leaves out 0."""
    rows: dict[str, dict[str, str]] = {}
    for name, task in tasks.items():
        for row in task["held_out"]:
            clear = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
            text = _interval(row)
            rows.setdefault(label(row), {})[name] = f"**{text}**" if clear else text
    order = sorted(rows, key=lambda name: (not name.startswith("momentum"), name))
    return [[name, *(rows[name].get(task, "") for task in tasks)] for name in order]


def label(row: dict[str, Any]) -> str:
    """A method and its operation, in print."""
    paper = " (the paper)" if (row["method"], row["operation"]) == ("momentum", "scale") else ""
    return f"{row['method']}, {row['operation']}{paper}"


def _held_out(task: dict[str, Any]) -> str:
    head = ["method", "where", "AUs", "layers", "effect, nats [95 %]", "behind the first [95 %]", "accuracy", "p", "KL"]
    plain = task["unsteered"]
    rows = [["unsteered", "", "", "", "", "", f"{plain['accuracy']:.0%}", "", ""]]
    for row in task["held_out"]:
        behind = row["behind"]
        where = row["site"] + (f", {row['detail']}" if row["detail"] else "")
        later = "" if behind is None else f"{signed(behind[0], 2)} [{signed(behind[1], 2)}, {signed(behind[2], 2)}]"
        sizes = [str(row["k"]), str(row["layers"]), _interval(row), later, f"{row['accuracy']:.0%}"]
        rows.append([label(row), where, *sizes, f"{row['p']:.2g}", f"{row['kl']:.3f}"])
    return table(head, rows)


def drawn(result: Result) -> dict[str, Any]:
    """Held-out effects with intervals, a panel a task: the data of a figure."""
    panels = []
    for name, task in result.content["tasks"].items():
        rows = sorted(task["held_out"], key=lambda row: (row["method"] != "momentum", label(row)))
        bars = [
            [label(row), *(row[key] for key in ("effect", "low", "high"))] for row in rows if row["low"] is not None
        ]
        panels.append({"title": f"{name}, {task['settings']['data']['test']['items']} held-out items", "bars": bars})
    title = f"Every method at one limit on the side effect, {result.machine}"
    return {"title": title, "x": "change of log-odds, nats", "panels": panels}


def causal(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """Top AUs beside matched random ones, each steered alone."""
    for name, task in tasks.items():
        if "causal" not in task:
            continue
        for way, found in task["causal"]["findings"].items():
            # results from before effects were measured have one correlation, over AUs of every |beta|
            wanted, rank = found["wanted"], found["signed"] if "signed" in found else found["spread"]["beta"]
            means = [signed(wanted[key], 3) for key in ("top", "matched")]
            yield [name, WAYS.get(way, way), *means, _interval(wanted, "difference", 3), _interval(rank, "rho")]


def predicted(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """Rank correlations with the effect of single AUs, the top ones by effect among them, where effects are known."""
    for name, task in tasks.items():
        for way, found in task.get("causal", {}).get("findings", {}).items():
            mixed = found.get("mixed")
            if mixed is not None and mixed["predicted"] is not None:
                rhos = [_interval(mixed[key], "rho") for key in ("beta", "delta", "predicted")]
                yield [name, WAYS.get(way, way), *rhos, _triple(mixed["slope"])]


def together(tasks: dict[str, Any]) -> Iterator[list[str]]:
    """Groups of ten AUs, at each strength, where effects are known."""
    for name, task in tasks.items():
        found = task.get("causal", {}).get("together")
        for row in [] if found is None else found["strengths"]:
            strength = f"{row['alpha']:g} mean differences"
            yield [name, strength, _triple(row["correlation"]), _triple(row["slope"])]


def _triple(values: list[float]) -> str:
    return _interval(dict(zip(("value", "low", "high"), values)), "value")


def _cost(task: dict[str, Any]) -> str:
    """Time a token, in the order of the comparison."""
    names = {row["name"]: row for row in task["held_out"]}
    rows = []
    for name, timing in task["cost"].items():
        row = names.get(name)
        if name == "unsteered":
            continue
        where = "" if row is None else f"{row['k']} AUs, {row['layers']} of the layers"
        percent = {key: 100 * (timing[key] - 1) for key in ("ratio", "low", "high")}
        text = _interval(percent, "ratio", 1)
        rows.append([name if row is None else label(row), where, text])
    return table(["method", "touches", "time a token over unsteered, %, median [quartiles]"], rows)
