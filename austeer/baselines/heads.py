"""Attention heads as slices of the site "attention"."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..errors import SelectionError
from ..models.sites import Site, find_sites
from ..models.structure import text_config
from ..momentum.momentum import Momentum

SITE = "attention"


def head_size(model: nn.Module, width: int) -> int:
    """How many AUs of the site one attention head has.

    Raises:
        SelectionError: the site's width is no multiple of the config's number of heads.
    """
    count = getattr(text_config(model), "num_attention_heads", None)
    if not isinstance(count, int) or count < 1 or width % count:
        raise SelectionError(
            f"attention heads: found {count!r} heads and a width of {width} at site {SITE!r}, expected a number that "
            "divides it; this method needs a model whose heads are slices of that site"
        )
    return width // count


def attention_sites(model: nn.Module, momentum: Momentum) -> tuple[list[Site], Momentum]:
    """The sites of the measured layers, and the momentum with their width in its fingerprint."""
    sites = [site for site in find_sites(model, [SITE])[SITE] if site.layer in momentum.layers]
    widths = {**momentum.model.widths, SITE: sites[0].width}
    return sites, replace(momentum, model=replace(momentum.model, widths=widths))
