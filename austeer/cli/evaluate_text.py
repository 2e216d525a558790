"""What ``austeer evaluate`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..utils.tables import show_table, signed
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
    rows = []
    for row in result.variants:
        shares = [_share(value) for value in (row.accuracy, row.exact) if value is not None]
        odds = [] if row.margin is None else [signed(row.margin.value, 2), _change(row.margin_change)]
        p = [value for value in (row.accuracy_p, row.exact_p) if value is not None]
        rows.append(
            [
                row.name,
                "" if row.alpha is None else show_alpha(row.alpha),
                str(row.k or ""),
                *shares,
                " ".join(f"{value:.2g}" for value in p),
                *odds,
                "" if row.kl is None else f"{row.kl:.3f}",
                "" if row.rise is None else signed(row.rise, 3),
            ]
        )
    show_table(["variant", "alpha", "AUs", *columns], rows)
    if result.between:
        tests = []
        for pair in result.between:
            p = [value for value in (pair.accuracy_p, pair.exact_p) if value is not None]
            tests.append([pair.first, pair.second, " ".join(f"{value:.2g}" for value in p)])
        console.print()
        show_table(["between", "and", "p"], tests)
    what, of = ("the right number", "") if numeric else ("the wanted option", ", of accuracy and of exact match")
    console.print(("" if numeric else OPTIONS) + LEGEND.format(what=what, of=of))
    console.print(f"groups: {BY[result.grouped_by]}")


def show_lm_eval(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table of lm-eval's metrics: a row for each task and metric, a column for each variant."""
    rows = []
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
            rows.append([task, metric, *cells])
    show_table(["task", "metric", *scores], rows)


def list_templates(as_json: bool) -> None:
    """The shipped templates with their fields."""
    from ..tasks import shipped

    found = shipped()
    if as_json:
        emit({name: _about(template) for name, template in found.items()})
        return
    rows = [[name, t.kind, ", ".join(t.required), t.description] for name, t in found.items()]
    show_table(["template", "kind", "fields of a row", "what it is"], rows, prose=(2, 3))


def _about(template) -> dict[str, Any]:
    return {
        "kind": template.kind,
        "description": template.description,
        "fields": list(template.required),
        "prompt": template.prompt,
        "options": list(template.options),
    }


def _share(estimate: IntervalEstimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _change(estimate: IntervalEstimate | None) -> str:
    return "" if estimate is None else show_value(estimate.value, estimate.low, estimate.high)
