"""The report's figures: which there are, with what in them; redrawn only where the data differ.

What a figure shows is plain data first, and drawn from that alone (drawings.py). The data's hash is written into the
PNG, so that a check does not depend on the version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from austeer.utils.figures import require_matplotlib

from . import study
from .inference import METRICS, Case, Inference, variants_of
from .load import Results

#: Key of the hash among a PNG's texts; counts up when drawings.py draws the same data in another way.
_KEY, _DRAWN = "Data", 3


@dataclass(frozen=True)
class Figure:
    """What is to be drawn.

    Attributes:
        name: of the file. drawing: a function of drawings.py. data: JSON values.
    """

    name: str
    drawing: str
    data: dict[str, Any]

    @property
    def hash(self) -> str:
        text = json.dumps([_DRAWN, self.drawing, self.data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def file(self, folder: Path) -> Path:
        return folder / f"{self.name}.png"


def figures(results: Results) -> list[Figure]:
    """Every figure that the results give."""
    found = []
    for result in results:
        if result.kind == "inference" and Inference(result).main():
            found.append(Figure(f"{result.name}-overhead", "overheads", _overhead(Inference(result))))
        elif result.kind == "study":
            found.append(Figure(f"{result.name}-study", "bars", study.drawn(result)))
            if result.content["doses"]:
                found.append(Figure(f"{result.name}-doses", "ratios", study.doses_drawn(result)))
    return found


def write(wanted: Sequence[Figure], folder: Path, check: bool) -> list[str]:
    """Draws what is missing or differs, and removes what no result gives any more; other PNGs stay as they are.

    Returns:
        What was changed, or with ``check``, which only looks, would be.
    """
    require_matplotlib()
    changed = []
    files = {figure.file(folder): figure for figure in wanted}
    for path in sorted(folder.glob("*.png")):
        if path not in files and _hash(path) is not None:
            changed.append(f"{path}: no result gives this figure any more")
            if not check:
                path.unlink()
    for path, figure in files.items():
        if path.exists() and _hash(path) == figure.hash:
            continue
        changed.append(f"{path}: {'shows other data than the results' if path.exists() else 'is missing'}")
        if not check:
            draw(figure, path)
    return changed


def _hash(path: Path) -> str | None:
    """What is written in a PNG under our key; None where it is not one of ours, or cannot be read."""
    from PIL import Image  # which matplotlib brings

    try:
        with Image.open(path) as image:
            return image.info.get(_KEY)
    except OSError:
        return None


def draw(figure: Figure, path: Path) -> None:
    """Draws one PNG."""
    from . import drawings

    path.parent.mkdir(parents=True, exist_ok=True)
    drawings.make(figure.drawing, figure.data).savefig(path, metadata={_KEY: figure.hash})


def _rounded(*values: float) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _overhead(inference: Inference) -> dict[str, Any]:
    """For each execution the setting that was measured first (others are in the table), at all batch sizes."""
    chosen: dict[str, list[Case]] = {}
    for case in inference.main():
        own = chosen.setdefault(case.content["execution"], [])
        if not own or own[0].setting == case.setting:
            own.append(case)
    panels = []
    for cases in chosen.values():
        cases = sorted(cases, key=lambda case: case.batch)
        for metric, words in METRICS.items():
            marks = []
            for name in variants_of(cases):
                for case in (case for case in cases if case.times(metric)):
                    o = case.overhead(name, metric)
                    if o is not None:
                        marks.append([name, case.batch, *_rounded(o.median, o.low, o.high)])
            if marks:
                noise = _rounded(max(case.noise(metric) for case in cases if case.times(metric)))[0]
                panels.append({"title": f"{cases[0].words}\n{words}", "noise": noise, "marks": marks})
    return {"title": f"{inference.result.machine}; {inference.model['name']}", "panels": panels}
