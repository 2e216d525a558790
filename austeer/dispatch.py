"""Which path a site takes, and why not a cheaper one."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .errors import SteeringError
from .fold import Fold, why_not_fold
from .paths import Columns, Dense, Fused, Path, why_not_fused
from .sites import Site

PATHS: dict[str, type[Path]] = {"fold": Fold, "fused": Fused, "columns": Columns, "dense": Dense}


def choose(mode: str, projection: nn.Module | None, operation: str, storages: Counter, site: Site) -> tuple[str, str]:
    """The path of a site, and why not a cheaper one."""
    if mode in ("columns", "dense"):
        return mode, "as asked"
    refusal = why_not_fused(projection) if mode == "fused" else why_not_fold(projection, operation, storages)
    kind = "fused" if mode == "fused" else Fold.name
    if refusal is None:
        return kind, "as asked" if mode != "auto" else ""
    if mode != "auto":
        raise SteeringError(
            f"mode {mode!r} is not possible at site {site.name!r} of layer {site.layer} ({site.path}): {refusal}. "
            "Use mode='auto' or 'columns'"
        )
    return "columns", f"no fold: {refusal}"
