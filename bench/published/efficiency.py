"""The sections of docs/efficiency.md, one block each; what stands around them is in efficiency.md beside this file."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from austeer.utils.tables import signed

from ..cases import ALONE, COLUMNS, FUSED, PLAIN
from . import tables
from .conclusion import sentences
from .inference import AGAIN, AUTO, DENSE, PUBLIC, Case, Inference, sweeps
from .load import Result, Results

#: Which command measures a kind, on a CPU and on a GPU.
COMMANDS = {
    "inference": {"CPU": "make bench", "GPU": "python -m bench.gpu"},
    "sweep": {"CPU": "make bench", "GPU": "austeer bench --full"},
    "momentum": {"CPU": "python -m bench.momentum", "GPU": "python -m bench.gpu"},
    "host": {"CPU": "python -m bench.host", "GPU": "python -m bench.host"},
    "dispatch": {"GPU": "python -m bench.gpu"},
    "kernels": {
        where: f"pytest bench{mark} --benchmark-only --benchmark-json=bench/results/DEVICE/kernels-DATE.json"
        for where, mark in (("CPU", ""), ("GPU", " -m gpu"))
    },
}
#: The columns of the shortest table.
SUMMARISED = (PUBLIC, DENSE, AUTO, "fold", "columns", "fused")
DISPATCHED = (PLAIN, FUSED, COLUMNS[100], ALONE[100])


def blocks(results: Results) -> dict[str, str]:
    """Markdown, by the section's name."""
    return {
        "conclusion": _each(results, "inference", _conclusion),
        "summary": _summary(results),
        "machines": _machines(results),
        "overhead": _each(results, "inference", _overhead),
        "k": _each(results, "inference", partial(_sweep, along="k"), "sweep"),
        "layers": _each(results, "inference", partial(_sweep, along="layers"), "sweep"),
        "operations": _operations(results),
        "momentum": _each(results, "momentum", _momentum),
    }


def _missing(kind: str, where: str) -> str:
    return f"**{where}**: not measured yet (`{COMMANDS[kind][where]}`)."


def _each(results: Results, kind: str, section: Callable[[Result], str], measured: str = "") -> str:
    """A section of every result of a kind, CPU and GPU; says so where there is none, or nothing of this in it.

    Args:
        measured: of ``COMMANDS``, what measures it; by default the kind.
    """
    texts = []
    for where, devices in results.kinds_of_device():
        found = [r for device in devices for r in results.of(kind, device)]
        own = [f"**{where}: {_title(r)}** ({r.link}){_remark(r)}\n\n{text}" for r in found if (text := section(r))]
        texts += own or [_missing(measured or kind, where)]
    return "\n\n".join(texts)


def _title(result: Result) -> str:
    return Inference(result).title if result.kind == "inference" else result.machine


def _remark(result: Result) -> str:
    return f"; {result.remark}" if result.remark else ""


def _conclusion(result: Result) -> str:
    return "\n".join(f"- {text}" for text in sentences(Inference(result)))


def _summary(results: Results) -> str:
    """The shortest table: batch 1 or the smallest, decode, medians, one row for each machine, model and execution."""
    rows: list[list[str]] = []
    for where, devices in results.kinds_of_device():
        found = [Inference(r) for device in devices for r in results.of("inference", device)]
        for inference in found:
            smallest: dict[str, Case] = {}
            for case in inference.main():
                known = smallest.setdefault(case.execution, case)
                smallest[case.execution] = min(known, case, key=lambda one: one.batch)
            for case in smallest.values():
                machine = where if where == "CPU" else inference.result.machine.removeprefix("NVIDIA ")
                model = Path(inference.model["name"]).name.partition(",")[0].removesuffix("-Instruct")
                content = case.content
                setting = (
                    f"{machine}, {model}, {case.execution}, {content['site']}, {case.operation}, k = {content['k']}"
                )
                rows.append([setting, *(_median(case, name) for name in (AGAIN, *SUMMARISED))])
        if not found:
            rows.append(
                [f"{where}: not measured yet (`{COMMANDS['inference'][where]}`)", *[""] * (len(SUMMARISED) + 1)]
            )
    columns = zip(["a decoded token, %", "unsteered again", *SUMMARISED], *rows)
    head, *filled = zip(*(column for column in columns if any(column[1:])))
    return tables.table(head, filled)


def _median(case: Case, name: str) -> str:
    """In brackets where two unsteered runs may differ by too much for a verdict."""
    if (found := case.overhead(name, "token")) is None:
        return ""
    shown = signed(found.median, 1)
    return shown if case.decidable("token") else f"({shown})"


def _machines(results: Results) -> str:
    rows = []
    for result in results:
        known = result.content.get("environment") or {"commit": result.content["commit_info"].get("id")}
        packages = known.get("packages", {})
        names = (name for name in ("torch", "triton", "transformers") if name in packages)
        versions = ", ".join(f"{name} {packages[name]}" for name in names)
        kind = result.kind + ("" if result.complete else " (cut off)")
        commit = re.sub(r"^(.{10})[^-]*", r"\1", known["commit"]) if known.get("commit") else "not recorded"
        commit += f", {known['code']}" if known.get("code") else ""
        command = f"`{known['command']}`" if known.get("command") else ""
        rows.append([f"{kind}: {result.link}", result.machine, versions, result.order[0], commit, command])
    return tables.table(["result", "device", "versions", "date", "commit", "command"], rows)


def _overhead(result: Result) -> str:
    inference = Inference(result)
    if not inference.main():
        return ""
    texts = [tables.picture(f"{result.name}-overhead", "Overhead by variant and batch"), tables.overheads(inference)]
    texts.append(
        "What it takes, in the first of these settings; predicted: by `austeer cost`; the floor is the time of the "
        f"bytes and operations at this machine's ceilings:\n\n{tables.costs(inference.main()[0])}"
    )
    without = [f"- {name}: {why}" for name, why in inference.without_time.items()]
    if without:
        texts.append("Without a time:\n\n" + "\n".join(without))
    return "\n\n".join(texts)


def _sweep(result: Result, along: str) -> str:
    groups = sweeps(Inference(result).series(along), along)
    texts = []
    for group in groups:
        execution, site, operation, k, *_ = group[0].setting
        fixed = "" if along == "k" else f", k = {k}"
        head = f"{execution}, site {site}, {operation}{fixed}, batch {group[0].batch}; a decoded token:"
        texts.append(f"{tables.capital(head)}\n\n{tables.sweep(group, along)}")
    return "\n\n".join(texts)


def _operations(results: Results) -> str:
    texts = []
    for where, devices in results.kinds_of_device():
        found = [r for device in devices for kind in OPERATIONS for r in results.of(kind, device)]
        texts += [f"**{where}: {r.machine}** ({r.link}){_remark(r)}\n\n{OPERATIONS[r.kind](r)}" for r in found]
        if not {"dispatch", "kernels"} & {r.kind for r in found}:
            texts.append(_missing("kernels", where))
    return "\n\n".join(texts)


def _host(result: Result) -> str:
    return (
        "Host time that a steered site adds to one decoded token in eager mode (a small MLP by itself, in turns with "
        f"its unsteered twin; median [quartiles] of {result.content['rounds']} rounds, batch "
        f"{result.content['batches'][0]['batch']}):\n\n{tables.host(result)}"
    )


def _dispatch(result: Result) -> str:
    ceilings = result.content["ceilings"]
    if "copy" in ceilings:  # of results older than the best of several operations
        memory, flops = f"a copy {ceilings['copy'] / 1e12:.2f} TB/s, which reads exceed", ceilings["matmul"]
    else:
        memory, flops = f"memory {ceilings['bandwidth'] / 1e12:.2f} TB/s", ceilings["flops"]
    return (
        f"Ratio to PyTorch's plain product [quartiles], and the share of the roofline that is reached ({memory}, "
        f"matmul {flops / 1e12:.0f} TFLOP/s, both measured there):"
        f"\n\n{tables.dispatch(result.content, DISPATCHED)}"
    )


def _settings(result: Result) -> str:
    texts = [
        "The fused kernel in each of its forms with the best of some 30 settings, its time over that of PyTorch's "
        f"plain product, and over that of product and columns:\n\n{tables.settings(result.content)}",
        f"The sparse kernel by itself:\n\n{tables.sparse_settings(result.content)}",
        tables.counting_settings(result.content),
    ]
    if bias := tables.bias_settings(result.content):
        texts.append(f"PyTorch's product with a bias, over that without:\n\n{bias}")
    return "\n\n".join(texts)


def _plans(result: Result) -> str:
    content = result.content
    texts = [
        f"A batch of {content['batch']} rows with so many plans, each row one of them (median [quartiles] of "
        f"{content['rounds']} rounds). The operation on [{content['batch']}, {content['operation']['width']}], "
        f"{content['operation']['aus']} AUs a plan, over a plain copy:\n\n{tables.plans(content['operation'])}"
    ]
    for entry in content["models"]:
        layers = entry["sizes"]["num_hidden_layers"]
        texts.append(
            f"A decoding step of a random Llama of {layers} layers, {entry['aus'] // layers} AUs a layer and plan, "
            f"over the unsteered one ({entry['execution']}; 95 % intervals):\n\n{tables.model_with_plans(entry)}"
        )
    return "\n\n".join(texts)


#: The kinds of results about single operations, and how each is shown.
OPERATIONS = {
    "dispatch": _dispatch,
    "settings": _settings,
    "kernels": tables.kernels,
    "plans": _plans,
    "host": _host,
}


def section(result: Result) -> str:
    """All that a terminal shows of one result."""
    texts = [f"**{_title(result)}**{_remark(result)}"]
    if result.kind == "inference":
        along: list[Callable[[Result], str]] = [partial(_sweep, along=name) for name in ("k", "layers")]
        makers = [_conclusion, _overhead, *along]
    elif result.kind == "momentum":
        makers = [_momentum, lambda result: tables.memory(result.content["memory"]), _offloaded]
    elif result.kind == "served":
        makers = [lambda result: tables.served_rows(result.content)]
    else:
        makers = [OPERATIONS[result.kind]]
    return "\n\n".join(filter(None, [*texts, *(make(result) for make in makers)]))


def _offloaded(result: Result) -> str:
    cases = (result.content["offloaded"] or {"cases": {}})["cases"]
    return "\n\n".join(f"{tables.capital(case)}:\n\n{tables.rates(row)}" for case, row in cases.items())


def _momentum(result: Result) -> str:
    large, kernel = result.content["large"], result.content["kernel"]
    sets = result.content["sets"] + (large["sets"] if large else [])
    if not sets:
        return ""
    texts = [tables.momentum(result.content["sets"])] if result.content["sets"] else []
    if large:
        texts.append(f"A random {large['shape']['name']} in {large['dtype']}:\n\n{tables.momentum(large['sets'])}")
    if kernel:
        texts.append(tables.counting(kernel))
    return "\n\n".join(texts)
