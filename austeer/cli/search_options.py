"""What ``austeer tune`` and ``austeer compare`` share: data, limits, the folder, progress and tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..tuning.held_out import HeldOut, Unsteered
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
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")]
Limit = Annotated[int | None, typer.Option(help="Use at most so many items of the data.", min=8)]
Seed = Annotated[int, typer.Option(help="Of the split into measured, tuned and held-out parts.")]


def load_data(source: str, template: str | None, limit: int | None, chat: bool, tokenizer):
    """The task, or pairs as a task; a sample of it if it is larger than ``limit``."""
    from ..tasks import load_task

    task = load_task(source, template)
    if limit is not None:
        task = task.take(limit)
    return task.with_chat_template(tokenizer) if chat else task


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
    from .common import split_names

    parts = split_names(text)
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
    """Refuses what is no folder; with ``force`` removes what an earlier search wrote there."""
    from ..errors import AusteerError

    if out.exists() and not out.is_dir():
        raise AusteerError(f"{out}: found a file, expected a folder for the search and its result")
    if force:
        for name in ("search.jsonl", "momentum.safetensors", "momentum.checkpoint", "result.json"):
            (out / name).unlink(missing_ok=True)


def held_out_table(
    unsteered: Unsteered, rows: Sequence[HeldOut], extra: Callable[[HeldOut], str] | None = None
) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ["alpha", "AUs", escape("effect, nats [95 %]"), "up", "accuracy", "p", "KL", *(["time"] if extra else [])]
    table.add_column("setting")
    for name in names:  # only what a setting is called may be broken
        table.add_column(name, no_wrap=True)
    table.add_row("unsteered", "", "", "", "", f"{unsteered.accuracy:.1%}")
    for row in rows:
        interval = "" if row.low is None else f" [{row.low:+.2f}, {row.high:+.2f}]"
        cells = [
            escape(f"{row.method} {row.operation}, {row.detail or row.site}"),
            show_alpha(row.alpha),
            str(row.k),
            escape(f"{row.effect:+.2f}{interval}"),
            f"{row.share:.0%}",
            f"{row.accuracy:.1%}",
            f"{row.p:.2g}",
            f"{row.kl:.3f}",
        ]
        table.add_row(*cells, *([extra(row)] if extra else []))
    return table


def show_alpha(alpha: float | dict[str, float]) -> str:
    if isinstance(alpha, dict):
        return "\n".join(f"{site} {value:.3g}" for site, value in alpha.items())
    return f"{alpha:.3g}"


LEGEND = (
    "effect: mean change of log p(wanted) - log p(best other option), with its 95 % interval over groups of items; up: "
    "share of items that moved the wanted way;\np: McNemar's exact test of the accuracy against unsteered; KL: of the "
    "next token on held-out neutral text against unsteered, nats a token"
)
