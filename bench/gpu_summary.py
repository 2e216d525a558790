"""What the GPU suite prints in the end: kernels over their floors, overheads, goals, and what was not run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import cases
from .catalogue import AGAIN, UNSTEERED

#: What is shown of a projection: the product alone, steering in it, after it, and the sparse kernel by itself.
KERNELS = (cases.PLAIN, cases.FUSED, cases.COLUMNS[100], cases.ALONE[100])
METRICS = {"token": "decode", "first_token": "prefill"}


def show(path: Path, content: dict[str, Any]) -> None:
    """Prints the summary of a suite's result file; those of its parts lie beside it."""
    console = Console(width=200) if not Console().is_terminal else Console()
    parts, environment = content["parts"], content["environment"]
    found = {name: _results(path.parent, entry) for name, entry in parts.items()}
    console.print(f"[bold]{environment['device']}[/], {content['settings']['dtype']}; {_versions(environment)}")
    for ceilings in found.get("ceilings", []):
        console.print(
            f"ceilings: copy {ceilings['copy'] / 1e12:.2f} TB/s, matmul {ceilings['matmul'] / 1e12:.0f} TFLOP/s"
        )
    for tests in found.get("tests", []):
        console.print("tests: " + (", ".join(f"{n} {word}" for word, n in tests["counts"].items()) or "none ran"))
        for name in tests["failing"]:
            console.print(f"    failed: {name}", highlight=False)
    goals: list[dict[str, Any]] = []
    for result in found.get("kernels", []):
        console.print(_kernels(result))
        goals += result["goals"]
    for kernel in found.get("counting", []):
        us = kernel["seconds"]["kernel"]["median"] * 1e6
        console.print(
            f"counting kernel on {kernel['pairs']} x {kernel['columns']}: {us:.1f} us, "
            f"{kernel['of_copy_bandwidth']:.0%} of the copy bandwidth, "
            f"{kernel['faster_than_eager']['median']:.1f}x eager operations"
        )
    inference = [result for results in found.values() for result in results if result.get("kind") == "inference"]
    if inference:
        console.print(_overheads(inference))
    for name, why in _untimed(inference).items():
        console.print(f"    {name}: {why}", highlight=False, markup=False)
    for result in found.get("momentum", []):
        for row in result["large"]["sets"]:
            rates = ", ".join(f"{way} {of['pairs_a_second']:.0f}" for way, of in row["ways"].items())
            console.print(f"momentum, random {result['large']['shape']['name']}, {row['set']}: pairs/s: {rates}")
        goals += result["goals"]
    for result in inference:
        goals += [goal | {"case": f"{result['model']['name']}, {goal['case']}"} for goal in result["goals"]]
    _goals(goals, console)
    console.print(_parts(parts))
    if "stopped" in content:
        console.print(f"[bold red]{content['stopped']}[/]")
    if content["settings"]["quick"]:
        console.print("[bold]--quick: these times mean nothing[/]")
    for name in [path.name, *(name for entry in parts.values() for name in entry["files"])]:
        console.print(f"written: {path.parent / name}", highlight=False, soft_wrap=True)


def _results(folder: Path, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """What a part found: in its entry or in files of its own."""
    found = [json.loads((folder / name).read_text(encoding="utf-8")) for name in entry["files"]]
    return [*found, entry["result"]] if entry["result"] else found


def _versions(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return f"{packages}; commit {environment['commit'] or 'unknown'}"


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _kernels(result: dict[str, Any]) -> Table:
    table = _table("kernels: us, and time over the floor", ["out x in"], ["tokens", *KERNELS])
    for row in result["rows"]:
        found = (row["variants"].get(name) for name in KERNELS)
        cells = (f"{of['seconds']['median'] * 1e6:.1f}  {1 / of['of_floor']:.2f}x" if of else "" for of in found)
        table.add_row(f"{row['n']}x{row['k']}", str(row["tokens"]), *cells)
    return table


def _overheads(results: list[dict[str, Any]]) -> Table:
    names = [n for n in dict.fromkeys(n for r in results for c in r["cases"] for n in c["variants"]) if n != UNSTEERED]
    table = _table("overhead over unsteered, %, with its interval", ["model", "case", "what"], ["ms", *names])
    for result in results:
        for number, case in enumerate(result["cases"]):
            for metric, word in METRICS.items():
                if metric not in case["variants"][UNSTEERED]:
                    continue
                ms = case["variants"][UNSTEERED][metric]["seconds"]["median"] * 1e3
                cells = [_overhead(case["variants"].get(name, {}).get(metric)) for name in names]
                noisy = "" if case["verdicts_possible"][metric] else "\n(noise)"
                table.add_row(
                    *(result["model"]["name"] if number == 0 and metric == "token" else "", _case(case)),
                    *(f"{word}{noisy}", f"{ms:.2f}", *cells),
                )
        table.add_section()
    return table


def _case(case: dict[str, Any]) -> str:
    return f"{case['execution']}, {case['site']}, k={case['k']}, batch {case['batch']}, prompt {case['prompt_tokens']}"


def _overhead(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    median, low, high = (100 * (found["ratio"][key] - 1) for key in ("median", "low", "high"))
    return f"{median:+.2f}\n{low:+.1f} to {high:+.1f}"


def _untimed(results: list[dict[str, Any]]) -> dict[str, str]:
    """Ways that got no time somewhere, and why the first time."""

    def every() -> Iterator[tuple[str, str]]:
        for result in results:
            for case in result["cases"]:
                for name, row in case["variants"].items():
                    if name != AGAIN and row["status"] != "measured":
                        yield f"{name}, {result['model']['name']}", f"{row['status']}: {row['reason']}"

    return dict(reversed(list(every())))


def _goals(goals: list[dict[str, Any]], console: Console) -> None:
    """How often each goal was met; where it was missed."""
    for text in dict.fromkeys(goal["text"] for goal in goals):
        own = [goal for goal in goals if goal["text"] == text]
        hidden = sum(goal["met"] is None for goal in own)
        met = f"met in {sum(goal['met'] is True for goal in own)} of {len(own)} cases"
        console.print(f"[bold]{text}: {met}[/]" + (f", hidden by noise in {hidden}" if hidden else ""), highlight=False)
        for goal in own:
            if goal["met"] is False:
                console.print(
                    f"    missed: {goal['case']}: {goal['value']:.4g}, limit {goal['limit']:g}",
                    highlight=False,
                    markup=False,
                )


def _parts(parts: dict[str, dict[str, Any]]) -> Table:
    table = _table("parts", ["part", "status"], ["seconds"])
    table.add_column("reason", overflow="fold")
    for name, entry in parts.items():
        table.add_row(name, entry["status"], f"{entry['seconds']:.0f}", entry["reason"])
    return table
