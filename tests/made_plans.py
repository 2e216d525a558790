"""Small plans by hand, for tests of the vLLM plugin."""

from __future__ import annotations

import torch

from austeer.models.sites import Fingerprint
from austeer.plans.plan import Plan

WIDTHS = {"attention": 8, "ffn": 6, "layer": 6}
MODEL = Fingerprint("llama", 3, WIDTHS, "a model", None)


def plan(operation, *units):
    """A plan of (site, layer, index, beta, delta)."""
    site, *columns = zip(*units)
    layer, index, beta, delta = map(torch.tensor, columns)
    return Plan(tuple(site), layer.int(), index.int(), beta.float(), delta.float(), operation, MODEL, pairs=4)


SHIFT = plan("shift", ("attention", 1, 3, 1.0, 0.5), ("layer", 2, 0, -1.0, -2.0))
PUSH = plan("push", ("attention", 1, 3, 0.5, 9.0), ("attention", 1, 4, -1.0, 9.0))
SCALE = plan("scale", ("attention", 0, 7, 0.25, 9.0))
