"""Reads result files: the newest of each kind, device and model, each checked for what the report needs of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import KEYS, ResultsError, read

CPU = "cpu"

_NAME = re.compile(
    r"(?P<kind>[a-z]+)(?P<quick>-quick)?(-[a-z0-9.-]+?)?-(?P<date>\d{4}-\d\d-\d\d)(-(?P<number>\d+))?\.json"
)


@dataclass(frozen=True)
class Result:
    """One result file.

    Attributes:
        device: the name of its folder: "cpu", or a GPU's. kind: one of ``KEYS``.
        order: date and number, as the file's name has them. content: the JSON.
    """

    path: Path
    device: str
    kind: str
    order: tuple[str, int]
    content: dict[str, Any]

    @property
    def model(self) -> str:
        """The model of kinds "inference" and "study"; the others have one a device, and give ""."""
        if self.kind == "study":
            return str(self.content["model"])
        return str(self.content["model"]["name"]) if self.kind == "inference" else ""

    @property
    def executions(self) -> tuple[str, ...]:
        """How the model ran, of kind "inference": eager mode and CUDA graphs may be measured apart."""
        cases = self.content["cases"] if self.kind == "inference" else ()
        return tuple(sorted({case["execution"] for case in cases}))

    @property
    def remark(self) -> str:
        """What has to be known to read it; "" of most."""
        return str(self.content.get("remark", ""))

    @property
    def complete(self) -> bool:
        """Whether the measurement came to its end; the files of some kinds are written part by part."""
        return bool(self.content.get("complete", True))

    @property
    def name(self) -> str:
        """For figures and numbers: the device, and the model where there may be several."""
        alone = f"-{self.executions[0]}" if len(self.executions) == 1 else ""
        return f"{self.device}-{self.subject}{alone}" if self.model else self.device

    @property
    def subject(self) -> str:
        """The model's name without its folder or organisation, for figures and numbers."""
        return slug(Path(self.model).name)

    @property
    def machine(self) -> str:
        """What it was measured on, in words."""
        environment = self.content.get("environment", {})
        brand = self.content.get("machine_info", {}).get("cpu", {}).get("brand_raw") if self.device == CPU else None
        name = re.sub(r"\((R|TM)\)", "", str(environment.get("device") or brand or self.device))
        cores = f", {environment['cores']} cores" if self.device == CPU and "cores" in environment else ""
        return " ".join(name.split()) + cores

    @property
    def link(self) -> str:
        """Markdown; ``{root}`` stands for the way to the repository's root."""
        place = f"bench/results/{self.device}/{self.path.name}"
        return f"[{place}]({{root}}{place})"


class Results(tuple[Result, ...]):
    """The results that are published: CPU first, then GPUs by name."""

    def of(self, kind: str, device: str | None = None) -> list[Result]:
        """Those of a kind, of a device or of all."""
        return [r for r in self if r.kind == kind and device in (None, r.device)]

    def kinds_of_device(self) -> Iterator[tuple[str, list[str]]]:
        """("CPU", its folder) and ("GPU", those of all GPUs), also where there is none."""
        yield "CPU", [CPU]
        yield "GPU", list(dict.fromkeys(r.device for r in self if r.device != CPU))


def slug(name: str) -> str:
    """A name of lower-case letters, digits, dots and single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def load(results: Path) -> Results:
    """The newest result of each kind, device, model and way to execute it; a whole one before one that was cut off.

    Quick runs (``<kind>-quick-...``) only show that everything works, and are passed over.

    Raises:
        ResultsError: no folder; or a file of an unknown kind or schema, or without what the report needs.
    """
    if not results.is_dir():
        raise ResultsError(f"{results}: found no folder, expected the results, such as bench/results")
    chosen: dict[tuple[str, str, str, tuple[str, ...]], Result] = {}
    for path in sorted(results.glob("*/*.json")):
        result = _read(path)
        if result is None:
            continue
        key = result.device, result.kind, result.model, result.executions
        other = chosen.get(key)
        if other is None or (result.complete, result.order) > (other.complete, other.order):
            chosen[key] = result
    return Results(
        sorted(
            chosen.values(), key=lambda r: (r.device != CPU, r.device, list(KEYS).index(r.kind), r.model, r.executions)
        )
    )


def _read(path: Path) -> Result | None:
    found = _NAME.fullmatch(path.name)
    if found is None or found["kind"] not in KEYS:
        raise ResultsError(
            f"{path}: found a name of no known kind, expected <kind>-<date>.json with one of {', '.join(KEYS)}; rename "
            "or move it, or add its kind to bench/files.py"
        )
    if found["quick"]:
        return None
    kind = found["kind"]
    order = found["date"], int(found["number"] or 1)
    return Result(path, path.parent.name, kind, order, read(path, kind))
