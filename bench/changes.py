"""What differs between two results beyond noise: ratios, counts, variants that came or broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from austeer.utils.tables import signed

from .catalogue import AGAIN, UNSTEERED
from .lineup import Case
from .published.tables import table
from .report import show_markdown

METRICS = {"token": "each token", "first_token": "first token"}
#: What has no noise: of one decoding step, and what a way holds.
COUNTS = {"launches": "launches", "bytes": "bytes moved", "operations": "operations", "held_bytes": "bytes held"}
ENDS = ("median", "low", "high")
DEARER, CHEAPER, WITHIN = "dearer", "cheaper", "within noise"


@dataclass(frozen=True)
class Change:
    """One time before and after.

    Attributes:
        unit: "ratio" to the unsteered model, or "seconds": of that model itself.
        before, after: median, low and high: the ratio's interval, or the quartiles of the seconds.
        noise: how large a difference of the medians may be and mean nothing.
        verdict: "dearer", "cheaper" or "within noise".
    """

    case: str
    variant: str
    metric: str
    unit: str
    before: dict[str, float]
    after: dict[str, float]
    noise: float
    verdict: str

    @property
    def cells(self) -> list[str]:
        """A line of a table."""
        if self.unit == "ratio":
            spreads = [[100 * (of[key] - 1) for key in ENDS] for of in (self.before, self.after)]
            words = [f"{signed(median, 1)} % ({signed(low, 1)} to {signed(high, 1)})" for median, low, high in spreads]
            by = f"{signed(spreads[1][0] - spreads[0][0], 1)} points"
        else:
            spreads = [[1e6 * of[key] for key in ENDS] for of in (self.before, self.after)]
            words = [f"{median:.1f} us ({low:.1f} to {high:.1f})" for median, low, high in spreads]
            by = f"x {spreads[1][0] / spreads[0][0]:.2f}"
        return [self.case, self.variant, METRICS[self.metric], *words, f"{self.verdict} {by}"]


@dataclass
class Changes:
    """What differs between two results.

    Attributes:
        notes: what makes the two runs unlike, or one of them weak: to be read first.
        timed: every time that both have, and that may be compared.
        events: cases and variants that are new, gone, wrong or skipped now, and the reverse; exact counts that differ.
    """

    notes: list[str] = field(default_factory=list)
    timed: list[Change] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    @property
    def beyond_noise(self) -> list[Change]:
        return [change for change in self.timed if change.verdict != WITHIN]

    def to_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return asdict(self) | {"beyond_noise": len(self.beyond_noise)}


def compare(a: dict[str, Any], b: dict[str, Any]) -> Changes:
    """What differs from a result of kind "inference" to a later one.

    A ratio has changed where the two intervals do not meet and the medians differ by more than the noise (of the A/A
    pair) of either run. The unsteered model's seconds are compared, by quartiles, where device and threads agree.
    """
    changes = Changes(notes=list(_unlike(a, b)))
    same_clock = all(a["environment"].get(key) == b["environment"].get(key) for key in ("device", "threads"))
    before, after = _cases(a), _cases(b)
    for case in dict.fromkeys([*before, *after]):
        if case not in before or case not in after:
            changes.events.append(f"{case}: {'new' if case in after else 'gone'}")
            continue
        for side, content in (("before", before[case]), ("after", after[case])):
            for metric in (metric for metric, possible in content["verdicts_possible"].items() if not possible):
                changes.notes.append(
                    f"{case}: the run {side} is too noisy for verdicts on the time to {METRICS[metric]} "
                    f"(two unsteered runs differ by up to {content['noise'][metric]:.1%})"
                )
        changes.timed += _timed(case, before[case], after[case], same_clock)
        changes.events += _variants(case, before[case]["variants"], after[case]["variants"])
    return changes


def _unlike(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Where the runs are not of the same thing on the same machine."""
    for side, content in (("before", a), ("after", b)):
        if not content["complete"]:
            yield f"the run {side} is incomplete: it was stopped after {len(content['cases'])} cases"
    machine = ("device", "threads", "cores", "python", "cuda")
    parts = {
        "": [{key: one["environment"].get(key) for key in machine} for one in (a, b)],
        "model ": [one["model"] for one in (a, b)],
        "version of ": [one["environment"].get("packages", {}) for one in (a, b)],
        "setting ": [one["settings"] for one in (a, b)],
    }
    for words, (before, after) in parts.items():
        for key in dict.fromkeys([*before, *after]):
            values = ["none" if one.get(key) is None else one[key] for one in (before, after)]
            if values[0] != values[1]:
                hint = "; times in seconds are not compared" if not words and key in ("device", "threads") else ""
                yield f"{words}{key}: {values[0]} -> {values[1]}{hint}"


def _cases(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cases by what they are; of several that are alike the second has a number, and so on."""
    found: dict[str, dict[str, Any]] = {}
    seen: Counter[str] = Counter()
    for case in content["cases"]:
        name = str(Case.of(case))
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name} ({seen[name]})"] = case
    return found


def _timed(case: str, a: dict[str, Any], b: dict[str, Any], same_clock: bool) -> Iterator[Change]:
    for variant, row in a["variants"].items():
        other, unit = b["variants"].get(variant, {}), "seconds" if variant == UNSTEERED else "ratio"
        if variant == AGAIN or (unit == "seconds" and not same_clock):  # the one is the noise itself
            continue
        for metric in (metric for metric in METRICS if metric in row and metric in other):
            before, after = ({key: one[metric][unit][key] for key in ENDS} for one in (row, other))
            noise = max(a["noise"][metric], b["noise"][metric]) * (before["median"] if unit == "seconds" else 1)
            yield Change(case, variant, metric, unit, before, after, noise, beyond(before, after, noise))


def beyond(before: Mapping[str, float], after: Mapping[str, float], noise: float = 0.0) -> str:
    """ "dearer" or "cheaper" where the intervals do not meet and the medians differ by more than ``noise``."""
    difference = after["median"] - before["median"]
    if abs(difference) <= noise or (after["low"] <= before["high"] and before["low"] <= after["high"]):
        return WITHIN
    return DEARER if difference > 0 else CHEAPER


def _variants(case: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    for variant in dict.fromkeys([*a, *b]):
        where = f"{case}: {variant}"
        if variant not in a or variant not in b:
            yield f"{where} is {'new' if variant in b else 'gone'}"
            continue
        row, other = a[variant], b[variant]
        if row["status"] != other["status"]:
            reason = f" ({other['reason']})" if other["reason"] else ""
            yield f"{where}: {row['status']} -> {other['status']}{reason}"
        for key, words in COUNTS.items():
            before, after = row.get(key), other.get(key)
            if before is not None and after is not None and before != after:
                yield f"{where}: {words} {before:,.10g} -> {after:,.10g}"


def show(changes: Changes, console: Console) -> None:
    """What makes the runs unlike first, then what changed, and how much did not."""
    for text in changes.notes:
        console.print(f"[yellow]note:[/] {escape(text)}", highlight=False)
    if changes.beyond_noise:
        head = ["case", "variant", "time of", "before", "after", "change"]
        rows = table(head, [change.cells for change in changes.beyond_noise])
        show_markdown(f"Overhead over unsteered with its interval, or time with quartiles:\n\n{rows}", console)
    for text in changes.events:
        console.print(text, highlight=False, markup=False)
    still = len(changes.timed) - len(changes.beyond_noise)
    console.print(f"{len(changes.beyond_noise)} times changed beyond noise; {still} did not", highlight=False)
