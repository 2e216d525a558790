"""What an inference result says of each variant: overheads over the unsteered model, in percent, with verdicts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from austeer.utils.tables import signed

from .load import Result

UNSTEERED, AGAIN, PUBLIC, DENSE, SPARSE = "unsteered", "unsteered again", "public", "dense hook", "sparse hook"
AUTO = "auto"
#: What is timed: decoding comes first, since generation is nearly all of it.
METRICS = {"token": "decode, each token", "first_token": "prefill, to the first token"}
MEASURED = "measured"


@dataclass(frozen=True)
class Overhead:
    """How much more time than the unsteered model, percent; the interval's ends; and the verdict of the result file."""

    median: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        return f"{signed(self.median, 1)} [{signed(self.low, 1)}, {signed(self.high, 1)}]"

    def compared(self, other: Overhead) -> str:
        """ "cheaper" or "dearer" where the two intervals do not meet, else "unresolved": a cautious comparison."""
        if self.high < other.low:
            return "cheaper"
        return "dearer" if self.low > other.high else "unresolved"


@dataclass(frozen=True)
class Case:
    """One setting, and every variant in it."""

    content: dict[str, Any]

    @property
    def batch(self) -> int:
        return int(self.content["batch"])

    @property
    def execution(self) -> str:
        return str(self.content["execution"])

    @property
    def operation(self) -> str:
        """In the first results all cases are of the operation "scale", and none says so."""
        return str(self.content.get("operation", "scale"))

    @property
    def setting(self) -> tuple[str, str, str, int, int, int]:
        """All but the batch: execution, site, operation, k, layers touched, and tokens of the prompt."""
        c = self.content
        return c["execution"], c["site"], self.operation, c["k"], c["layers"], c["prompt_tokens"]

    @property
    def words(self) -> str:
        execution, site, operation, k, layers, prompt = self.setting
        where = f"k = {k} in {layers} layer{'s'[: layers != 1]}"
        return f"{execution}, site {site}, {operation}, {where}, prompt of {prompt} tokens"

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        return self.content["variants"]

    def decidable(self, metric: str) -> bool:
        """Whether this was timed, and two unsteered runs agree well enough for any verdict."""
        return bool(self.content["verdicts_possible"].get(metric, False))

    def noise(self, metric: str) -> float:
        """How far two unsteered runs lie apart, percent; only of what was timed."""
        return 100 * float(self.content["noise"][metric])

    def times(self, metric: str) -> bool:
        """Whether this was timed: one decoding step, as compiled and in graphs, has no first token."""
        return metric in self.content["noise"]

    def overhead(self, variant: str, metric: str) -> Overhead | None:
        """None where the variant has no time: it was skipped, or gave wrong logits."""
        row = self.variants.get(variant, {})
        if row.get("status") != MEASURED or not row.get(metric):
            return None
        ratio = row[metric]["ratio"]
        median, low, high = (100 * (ratio[key] - 1) for key in ("median", "low", "high"))
        return Overhead(median, low, high, row.get("verdict", {}).get(metric, ""))

    def ours(self) -> list[str]:
        """Our variants that were measured."""
        return [name for name, row in self.variants.items() if row.get("ours") and row["status"] == MEASURED]

    def best_of_ours(self, metric: str) -> tuple[str, Overhead] | None:
        """The one of ours with the least median."""
        found = [(name, o) for name in self.ours() if (o := self.overhead(name, metric)) is not None]
        return min(found, key=lambda pair: pair[1].median) if found else None


@dataclass(frozen=True)
class Inference:
    """One result of kind "inference"."""

    result: Result

    @property
    def title(self) -> str:
        """Machine and model, in words."""
        model = self.result.content["model"]
        count = model["parameters"]
        size = f"{count / 1e9:.2g}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
        cut = "" if self.result.complete else "; cut off, incomplete"
        about = f"{size} parameters, {model['layers']} layers, {model['dtype']}"
        return f"{self.result.machine}; {model['name']} ({about}){cut}"

    @property
    def model(self) -> dict[str, Any]:
        return self.result.content["model"]

    @property
    def cases(self) -> list[Case]:
        return [Case(content) for content in self.result.content["cases"]]

    def series(self, *names: str) -> list[Case]:
        """The cases of these sweeps, each once, those that exist so far."""
        cases, wanted = self.cases, self.result.content["series"]
        numbers = dict.fromkeys(i for name in names for i in wanted.get(name, []))
        return [cases[i] for i in numbers if i < len(cases)]

    def main(self) -> list[Case]:
        """What the verdicts are about: all cases but those that only k or layers were varied for."""
        wanted = self.result.content["series"]
        found = self.series("main", *(name for name in wanted if name not in ("k", "layers")))
        swept = {number for numbers in wanted.values() for number in numbers}
        return found + [case for number, case in enumerate(self.cases) if number not in swept]

    @property
    def without_time(self) -> dict[str, str]:
        """Variants that were skipped or wrong anywhere, and why."""
        found: dict[str, str] = {}
        for case in self.cases:
            for name, row in case.variants.items():
                if row["status"] != MEASURED:
                    found.setdefault(name, f"{row['status']}: {row['reason'] or 'no reason given'}")
        return found


def variants_of(cases: Iterable[Case]) -> list[str]:
    """Those that have a time in one of the cases, in their first order, without the unsteered reference."""
    rows = [item for case in cases for item in case.variants.items()]
    return list(dict.fromkeys(name for name, row in rows if name != UNSTEERED and row["status"] == MEASURED))


def in_sweeps(case: Case, name: str) -> bool:
    """Whether a variant is shown along k and layers: other libraries, but for adapters, would hide the rest."""
    return name == "lora" or not case.variants.get(name, {}).get("peer")


def sweeps(cases: Iterable[Case], along: str) -> list[list[Case]]:
    """Cases that differ in ``along`` ("k" or "layers") alone, in its order; only where there are two or more."""
    other = "layers" if along == "k" else "k"
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        # With more AUs more layers are touched, unless the sweep fixes them.
        fixed = () if along == "k" else (case.content[other],)
        key = (case.execution, case.batch, case.content["site"], case.operation, case.content["prompt_tokens"], *fixed)
        groups.setdefault(key, []).append(case)
    found = (sorted(group, key=lambda case: case.content[along]) for group in groups.values())
    return [group for group in found if len({case.content[along] for case in group}) > 1]
