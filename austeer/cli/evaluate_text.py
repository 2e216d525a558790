"""What ``austeer evaluate`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from .common import console, emit
from .search_text import show_alpha, show_value

if TYPE_CHECKING:
    from ..tasks import Evaluation, IntervalEstimate

LEGEND = (
    "exact match: what the model itself writes, greedily, is {what}; p: McNemar's exact test{of}\n"
    "intervals: 95 %, Wilson's for shares, Student's over groups of items for the rest; KL, rise: KL divergence and "
    "rise of the cross-entropy on neutral text, nats a token"
)
OPTIONS = (
    "accuracy: the wanted option is the likeliest; log-odds: of the wanted option against the best other one, nats, "
    "and their change\n"
)


def show(result: Evaluation) -> None:
    """The table of an evaluation."""
    from ..errors import count_of
    from ..pairs.chat import describe_form
    from ..pairs.groups import BY

    numeric = result.kind == "numeric"
    console.print(
        escape(
            f"{result.task}: {count_of(result.items, 'item')} in {count_of(result.groups, 'group')}, {result.model}"
            f"{', ' + describe_form(result.chat_template) if result.chat_template else ''}, "
            f"{result.seconds['task']:.0f} s"
        )
    )
    share = ["exact match"] if numeric else ["accuracy", "exact match"]
    columns = [*share, "p", *([] if numeric else ["log-odds", "change"]), "KL", "rise"]
    table = Table("variant", "alpha", "AUs", *columns, box=None, pad_edge=False)
    for row in result.variants:
        shares = [_share(value) for value in (row.accuracy, row.exact) if value is not None]
        odds = [] if row.margin is None else [f"{row.margin.value:+.2f}", _signed(row.margin_change)]
        p = [value for value in (row.accuracy_p, row.exact_p) if value is not None]
        table.add_row(
            escape(row.name),
            "" if row.alpha is None else show_alpha(row.alpha),
            str(row.k or ""),
            *shares,
            " ".join(f"{value:.2g}" for value in p),
            *odds,
            "" if row.kl is None else f"{row.kl:.3f}",
            "" if row.rise is None else f"{row.rise:+.3f}",
        )
    console.print(table)
    if result.between:
        tests = Table("between", "and", "p", box=None, pad_edge=False)
        for pair in result.between:
            p = [value for value in (pair.accuracy_p, pair.exact_p) if value is not None]
            tests.add_row(escape(pair.first), escape(pair.second), " ".join(f"{value:.2g}" for value in p))
        console.print(tests)
    what, of = ("the right number", "") if numeric else ("the wanted option", ", of accuracy and of exact match")
    console.print(("" if numeric else OPTIONS) + LEGEND.format(what=what, of=of))
    console.print(f"groups: {BY[result.grouped_by]}")


def show_lm_eval(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table of lm-eval's metrics: a row for each task and metric, a column for each variant."""
    table = Table("task", "metric", *map(escape, scores), box=None, pad_edge=False)
    first = next(iter(scores.values()))
    for task, metrics in first.items():
        for metric in metrics:
            if metric.endswith("_stderr"):
                continue
            cells = []
            for found in scores.values():
                error = found[task].get(f"{metric}_stderr")
                spread = "" if not isinstance(error, float) else f" ± {error:.4f}"
                cells.append(f"{found[task][metric]:.4f}{spread}")
            table.add_row(escape(task), escape(metric), *cells)
    console.print(table)


def list_templates(as_json: bool) -> None:
    """The shipped templates with their fields."""
    from ..tasks import shipped

    found = shipped()
    if as_json:
        emit({name: _about(template) for name, template in found.items()})
        return
    table = Table("template", "kind", "fields of a row", "what it is", box=None, pad_edge=False)
    for name, template in found.items():
        table.add_row(name, template.kind, ", ".join(template.required), template.description)
    console.print(table)


def _about(template) -> dict[str, Any]:
    return {
        "kind": template.kind,
        "description": template.description,
        "fields": list(template.required),
        "prompt": template.prompt,
        "options": list(template.options),
    }


def _share(estimate: IntervalEstimate) -> str:
    return escape(f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]")


def _signed(estimate: IntervalEstimate | None) -> str:
    return "" if estimate is None else show_value(estimate.value, estimate.low, estimate.high)
