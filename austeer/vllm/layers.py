"""Steering inside a vLLM model: a small module beside each steered one, called by a hook on it.

All of it is traced when vLLM compiles the model. The lists and the row buffer are buffers, inputs of the compiled
graph, and stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from ..errors import SiteError
from ..models.families import LAYOUTS, alternatives
from ..models.sites import SITE_NAMES, Fingerprint
from ..plans.fit import check_architecture
from ..plans.plan import Plan
from .sets import Lists

steer_columns_op = torch.ops.austeer.steer_columns_.default

INPUT_SIDES = ("attention", "neuron")
#: float64 would be computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME = "austeer"


class Steer(nn.Module):
    """Steers each token at its set's AUs, maybe in place: memory grows with the longest list, not with the width.

    Float32, rounded once; twice at AUs at which push and another operation of one set meet.

    Args:
        lists: applied one after the other.
        rows: int32 [tokens that a batch can have], each token's set; -1 for none.
        width: the site's.

    Attributes:
        in_place: whether the operation ``steer_columns_`` runs, or its definition. On a GPU the one is one kernel. On a
            CPU vLLM's compiler fuses the other, where the operation, a dozen of PyTorch's, costs ten times as much.
    """

    rows: Tensor

    def __init__(self, lists: Sequence[Lists], rows: Tensor, width: int):
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.width, self.in_place, self.magnitudes = width, rows.is_cuda, [group.magnitude for group in lists]
        for number, group in enumerate(lists):
            for name in ("index", "gamma", "shift"):
                self.register_buffer(f"{name}_{number}", getattr(group, name).to(rows.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != self.width:
            raise SiteError(
                f"found a {x.dtype} tensor of {x.dim()} dimensions at a steered site, expected [tokens, {self.width}] "
                "of float32, bfloat16 or float16; a quantised activation cannot be steered"
            )
        rows = self.rows.narrow(0, 0, x.shape[0])
        for number, magnitude in enumerate(self.magnitudes):
            index, gamma, shift = (getattr(self, f"{name}_{number}") for name in ("index", "gamma", "shift"))
            if self.in_place:
                steer_columns_op(x, index, gamma, shift, magnitude, rows)
            else:
                x = reference.steer_columns(x, index, gamma, shift, magnitude, rows)
        return x


def _at_input(module: nn.Module, args: tuple) -> tuple:
    return (getattr(module, NAME)(args[0]), *args[1:])


def _at_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return getattr(module, NAME)(output)


def _at_layer(module: nn.Module, args: tuple, output: tuple) -> tuple:
    # The residual is added by the next layer's norm; what is steered is the sum. What is not keeps its bits.
    hidden, residual = output
    wide = residual.float()
    plain = hidden.float() + wide
    steered = getattr(module, NAME)(plain.clone())
    return torch.where(steered == plain, hidden, (steered - wide).to(hidden.dtype)), residual


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


def structure(tables: Mapping[tuple[str, int], Sequence[Lists]]) -> str:
    """A digest of all that decides the compiled graph: where there are lists, of which kinds and shapes."""
    shapes = [
        [site, layer, [[list(group.index.shape), group.magnitude] for group in lists]]
        for (site, layer), lists in tables.items()
    ]
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def install(
    model: nn.Module,
    model_type: str,
    tables: Mapping[tuple[str, int], Sequence[Lists]],
    layers: range,
    rows: Tensor,
    part: tuple[int, int] = (0, 1),
) -> Sequence[str]:
    """Puts the steering of this process's layers on a model; returns the steered sites as "site layer".

    Args:
        rows: the row buffer; the lists go to its device.
        part: this process's number in its tensor-parallel group, and how many there are: the inputs of projections are
            split among them, in order.
    """
    done = []
    for (site, layer), lists in tables.items():
        if layer not in layers:
            continue
        module = site_module(model, model_type, site, layer)
        rank, size = part if site in INPUT_SIDES else (0, 1)
        width = site_width(model, model_type, site, layer) // size
        with torch.inference_mode(False):
            mine = [_slice(group, rank * width, width) for group in lists]
            module.add_module(NAME, Steer(mine, rows, width))
        if site in INPUT_SIDES:
            module.register_forward_pre_hook(_at_input)
        else:
            module.register_forward_hook(_at_layer if site == "layer" else _at_output)
        done.append(f"{site} {layer}")
    return done


def _slice(lists: Lists, first: int, width: int) -> Lists:
    """The AUs from ``first`` on, ``width`` of them, as columns from 0; the others' entries are not used."""
    index = lists.index - first
    return replace(lists, index=index.masked_fill((index < 0) | (index >= width), -1))
