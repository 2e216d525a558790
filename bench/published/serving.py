"""How exactly a plan runs elsewhere: the rows that the engines' tests wrote, as a table."""

from __future__ import annotations

from .load import Result
from .tables import table


def exactness(result: Result) -> str:
    """One row for each way to run a plan, operation and site: the error beside the size of the steering itself."""
    rows = [
        [
            row["target"],
            row["operation"],
            row["site"],
            f"{row['effect']:.3g}",
            f"{row['difference']:.1e}",
            f"{row['effect'] / row['difference']:,.0f}" if row["difference"] else "exact",
        ]
        for row in result.content["rows"]
    ]
    heads = ["runs in", "operation", "site", "steering moves a logit by", "off the formula by", "ratio"]
    return table(heads, rows)
