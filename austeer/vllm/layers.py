"""Steering inside a vLLM model: a small module beside each steered one, called by a hook on it.

All of it is traced when vLLM compiles the model. The tables and the row buffer are buffers, inputs of the compiled
graph, and stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import SiteError
from ..models.families import LAYOUTS, alternatives
from ..models.sites import SITE_NAMES, Fingerprint
from ..plans.fit import check_architecture
from ..plans.plan import Plan

INPUT_SIDES = ("attention", "neuron")
#: float64 would be computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME = "austeer"


class Steer(nn.Module):
    """x + scale * x + push * |x| + shift, each token with its own row of the tables; float32 with one rounding.

    Args:
        tables: float32 [sets + 1, width] by term.
        rows: int32 [tokens that a batch can have].
    """

    rows: Tensor

    def __init__(self, tables: Mapping[str, Tensor], rows: Tensor):
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        for term, table in tables.items():
            self.register_buffer(term, table, persistent=False)
        self.terms = tuple(tables)
        self.width = next(iter(tables.values())).shape[1]

    def change(self, x: Tensor) -> Tensor:
        """What is added to x, [tokens, width] of any floating dtype, as float32."""
        if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != self.width:
            raise SiteError(
                f"found a {x.dtype} tensor of {x.dim()} dimensions at a steered site, expected [tokens, {self.width}] "
                "of float32, bfloat16 or float16; a quantised activation cannot be steered"
            )
        rows = self.rows.narrow(0, 0, x.shape[0])
        wide = x.float()
        factors = {"scale": wide, "push": wide.abs()}
        changes = []
        for term in self.terms:
            strength = getattr(self, term).index_select(0, rows)
            changes.append(strength * factors[term] if term in factors else strength)
        return sum(changes[1:], start=changes[0])

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() + self.change(x)).to(x.dtype)


def _at_input(module: nn.Module, args: tuple) -> tuple:
    return (getattr(module, NAME)(args[0]), *args[1:])


def _at_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return getattr(module, NAME)(output)


def _at_layer(module: nn.Module, args: tuple, output: tuple) -> tuple:
    # The residual is added by the next layer's norm; what is steered is the sum.
    hidden, residual = output
    change = getattr(module, NAME).change(hidden + residual)
    return (hidden.float() + change).to(hidden.dtype), residual


def site_module(model: nn.Module, model_type: str, site: str, layer: int) -> nn.Module:
    """The module of a vLLM model whose input or output a site is.

    Raises:
        SiteError: there is none of the usual names.
    """
    if model_type not in LAYOUTS or site not in SITE_NAMES:
        raise SiteError(f"found site {site!r} of model_type {model_type!r}, which has no known layout")
    layout = LAYOUTS[model_type]
    paths = {"attention": layout.attention, "ffn": layout.ffn, "layer": "", "neuron": layout.down}[site]
    prefix = f"model.layers.{layer}"
    tried = [f"{prefix}.{path}".rstrip(".") for path in alternatives(paths)]
    for path in tried:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise SiteError(f"{type(model).__name__}: found no module at {' or '.join(tried)}, where site {site!r} should be")


def site_width(model: nn.Module, model_type: str, site: str, layer: int) -> int:
    """How many AUs a site has, over all processes of a tensor-parallel group."""
    module = site_module(model, model_type, "neuron" if site in ("ffn", "layer") else site, layer)
    return module.input_size if site in INPUT_SIDES else module.output_size  # type: ignore[return-value]


def check_fits(name: str, plan: Plan, model: nn.Module, model_type: str, layers: range, count: int) -> None:
    """Checks a plan of a set against a vLLM model, whose weights need not be loaded.

    Args:
        name: the set's, for messages. layers: those that this process has, of ``count``.

    Raises:
        PlanError: it was measured on another model.
    """
    widths = {site: site_width(model, model_type, site, layers.start) for site in plan.sites}
    engine = Fingerprint(model_type, count, widths, "the engine's", None)
    check_architecture(plan, engine, f"set {name!r}: the plan")


def structure(tables: Mapping[tuple[str, int], Mapping[str, Tensor]]) -> str:
    """A digest of all that decides the compiled graph: where there are tables, of which terms and shapes."""
    shapes = [
        [site, layer, {term: list(t.shape) for term, t in terms.items()}] for (site, layer), terms in tables.items()
    ]
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def install(
    model: nn.Module,
    model_type: str,
    tables: Mapping[tuple[str, int], Mapping[str, Tensor]],
    layers: range,
    rows: Tensor,
    part: tuple[int, int] = (0, 1),
) -> Sequence[str]:
    """Puts the steering of this process's layers on a model; returns the steered sites as "site layer".

    Args:
        rows: the row buffer; the tables go to its device.
        part: this process's number in its tensor-parallel group, and how many there are: the inputs of projections are
            split among them, in order.
    """
    done = []
    for (site, layer), terms in tables.items():
        if layer not in layers:
            continue
        module = site_module(model, model_type, site, layer)
        rank, size = part if site in INPUT_SIDES else (0, 1)
        with torch.inference_mode(False):
            mine = {term: t.chunk(size, dim=1)[rank].to(rows.device).contiguous() for term, t in terms.items()}
            module.add_module(NAME, Steer(mine, rows))
        if site in INPUT_SIDES:
            module.register_forward_pre_hook(_at_input)
        else:
            module.register_forward_hook(_at_layer if site == "layer" else _at_output)
        done.append(f"{site} {layer}")
    return done
