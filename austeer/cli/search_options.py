"""What ``austeer tune`` and ``austeer compare`` share: options, data, limits, the folder, progress and the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common

if TYPE_CHECKING:
    from ..tasks import Task
    from ..tuning.search import Step

DataArgument = Annotated[
    str,
    typer.Argument(
        help="Pairs (prompt, positive, negative), or a labelled task: a file, a pattern or hf:ORG/NAME.",
        show_default=False,
    ),
]
Template = Annotated[
    str | None, typer.Option(help="How to read a task's file: boolq, copa, persona ... (austeer evaluate --templates).")
]
Momentum = Annotated[
    Path | None, typer.Option("--momentum", help="A momentum file of other pairs. [default: part of the data]")
]
Sites = Annotated[str, typer.Option(help="Sites, separated by commas.")]
Operations = Annotated[str, typer.Option(help="Operations, separated by commas.")]
Ks = Annotated[str, typer.Option("--ks", help="Numbers of AUs, separated by commas.")]
MaxKl = Annotated[
    float, typer.Option(help="Limit on the side effect: KL divergence on neutral text, nats a token.", min=1e-6)
]
Budget = Annotated[
    str | None, typer.Option(help="Time for all of it: 90s, 5m, 1h. [default: as long as it takes]", show_default=False)
]
Neutral = Annotated[
    Path | None, typer.Option(help="Text that should not change, a paragraph a line. [default: packaged texts]")
]
Limit = Annotated[int | None, typer.Option(help="Use at most so many items of the data.", min=8)]
Seed = Annotated[int, typer.Option(help="Of the split into measured, tuned and held-out parts.")]
ForceAnew = Annotated[bool, typer.Option("--force", help="Start anew over an earlier search in --out.")]


def read_options(
    sites: str | None, operations: str | None, ks: str, budget: str | None, neutral: Path | None, out: Path, quiet: bool
) -> dict[str, Any]:
    """Arguments that :func:`austeer.tune` and :func:`austeer.compare` share; ``quiet``: without progress bars."""
    show = False if quiet else None
    return {
        "budget": parse_budget(budget),
        "ks": parse_counts("--ks", ks),
        "neutral": read_neutral(neutral),
        "sites": None if sites is None else common.split_names(sites),
        "operations": None if operations is None else common.split_names(operations),
        "folder": out,
        "step": bars(show),
        "progress": show,
    }


def write_result(result: Any, figure: Path, draw: Callable[[Any, Path], None], json: bool) -> None:
    """Writes a result and beside it its figure; with ``--json`` prints the result, too."""
    common.write_json(figure.with_name("result.json"), result.to_json())
    draw(result, figure)
    if json:
        common.emit({"out": figure.parent, **result.to_json()})


def groups_line(split: dict[str, Any]) -> str:
    """What keeps items in one part of the data together, and what intervals are taken over."""
    from ..pairs.groups import BY

    return f"groups of items, which parts of the data do not share: {BY[split['grouped_by']]}"


def load_data(source: str, template: str | None, limit: int | None) -> Task:
    """The task, or pairs as a task; a sample of it if it is larger than ``limit``."""
    from ..tasks import load_task

    task = load_task(source, template)
    return task if limit is None else task.take(limit)


def read_neutral(path: Path | None) -> list[str] | None:
    from ..errors import PairsError

    if path is None:
        return None
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"--neutral: {path} cannot be read ({error}); expected UTF-8 text") from error
    if len(texts) < 2:
        raise PairsError(f"--neutral: found {len(texts)} texts in {path}, expected at least 2, one a line")
    return texts


def parse_budget(text: str | None) -> float | None:
    """Seconds.

    Raises:
        TaskError: no time.
    """
    from ..errors import TaskError

    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text.strip())
    if not found or float(found[1]) == 0:
        raise TaskError(f"--budget: found {text!r}, expected a time such as 90s, 5m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]


def parse_counts(name: str, text: str) -> list[int]:
    from ..errors import TaskError

    parts = common.split_names(text)
    if not parts or not all(part.isdecimal() and int(part) for part in parts):
        raise TaskError(f"{name}: found {text!r}, expected positive whole numbers with commas between, such as 10,100")
    return sorted({int(part) for part in parts})


def bars(show: bool | None) -> Step:
    """Progress bars for the stages of a search."""
    from ..utils.progress import Progress

    @contextmanager
    def step(what: str, total: int) -> Iterator[Callable[[int], None]]:
        with Progress(what, total, "", show) as bar:
            yield bar.advance

    return step


def open_folder(out: Path, force: bool) -> None:
    """Refuses what is no folder, and a search whose figure could not be drawn; ``force`` removes an earlier search."""
    from ..errors import AusteerError
    from ..utils.figures import require_matplotlib

    require_matplotlib()  # before minutes of work, not after
    if out.exists() and not out.is_dir():
        raise AusteerError(f"{out}: found a file, expected a folder for the search and its result")
    if force:
        for name in ("search.jsonl", "momentum.safetensors", "momentum.checkpoint", "result.json"):
            (out / name).unlink(missing_ok=True)
