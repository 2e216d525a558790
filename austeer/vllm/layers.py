"""Steering inside a vLLM model: a small module beside each steered one, called by a hook on it.

All of it is traced when vLLM compiles the model. The lists and the row buffer are buffers, inputs of the compiled
graph, and stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from austeer_kernels import reference

from ..errors import SiteError
from ..models.families import LAYOUTS, alternatives
from ..models.sites import SITE_NAMES
from .tables import Place, Row, Structure

steer_columns_op = torch.ops.austeer.steer_columns_.default

INPUT_SIDES = ("attention", "neuron")
#: float64 would be computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME = "austeer"


class Steer(nn.Module):
    """Steers each token at its row's AUs, maybe in place: work grows with the longest list, not with the width.

    Float32, rounded once; twice at AUs at which push and another operation of one row meet.

    Args:
        room: AUs of a row, at most, for each kind of list; applied one after the other.
        slots: rows of the lists.
        rows: int32 [tokens that a batch can have], each token's row; -1 for none.
        width: the site's, of this process.
        first: the AU of the site that column 0 is.

    Attributes:
        in_place: whether the operation ``steer_columns_`` runs, or its definition. On a GPU the one is one kernel. On a
            CPU vLLM's compiler fuses the other, where the operation, a dozen of PyTorch's, costs ten times as much.
    """

    rows: Tensor

    def __init__(self, room: Mapping[str, int], slots: int, rows: Tensor, width: int, first: int = 0):
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.kinds, self.width, self.first, self.in_place = list(room), width, first, rows.is_cuda
        for kind, count in room.items():
            index = torch.full((slots, count), -1, dtype=torch.int64, device=rows.device)
            self.register_buffer(f"index_{kind}", index, persistent=False)
            for name in ("gamma", "shift"):
                self.register_buffer(f"{name}_{kind}", torch.zeros(slots, count, device=rows.device), persistent=False)

    def lists(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """index int64, gamma and shift float32 [slots, AUs of the longest list] of a kind."""
        return getattr(self, f"index_{kind}"), getattr(self, f"gamma_{kind}"), getattr(self, f"shift_{kind}")

    def fill(self, row: int, kind: str, units: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Writes one row, index, gamma and shift [AUs] of the whole site; None empties it. Where it is stays."""
        index, gamma, shift = self.lists(kind)
        index[row].fill_(-1)
        if units is None:
            return
        columns = units[0] - self.first
        columns = columns.masked_fill((columns < 0) | (columns >= self.width), -1)
        for target, source in zip((index, gamma, shift), (columns, *units[1:])):
            target[row, : len(source)].copy_(source)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != self.width:
            raise SiteError(
                f"found a {x.dtype} tensor of {x.dim()} dimensions at a steered site, expected [tokens, {self.width}] "
                "of float32, bfloat16 or float16; a quantised activation cannot be steered"
            )
        rows = self.rows.narrow(0, 0, x.shape[0])
        for kind in self.kinds:
            lists, magnitude = self.lists(kind), kind == "push"
            if self.in_place:
                steer_columns_op(x, *lists, magnitude, rows)
            else:
                x = reference.steer_columns(x, *lists, magnitude, rows)
        return x


class Tables:
    """The lists of all steered modules of this process; a row of all of them is written at once.

    Args:
        modules: by the site and layer. places: of the structure, by number.
    """

    def __init__(self, modules: Mapping[tuple[str, int], Steer], places: Sequence[Place]):
        self._modules, self._places = modules, places
        self._filled: dict[int, set[int]] = {}

    def fill(self, number: int, row: Row) -> None:
        """Puts the AUs of ``row`` into the rows of a number, in place of what was there."""
        new = dict(row.by_place())
        with torch.inference_mode(False), torch.no_grad():
            for place in self._filled.get(number, set()) | set(new):
                site, layer, kind = self._places[place]
                if (site, layer) in self._modules:  # of this process
                    self._modules[site, layer].fill(number, kind, new.get(place))
        self._filled[number] = set(new)


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


def install(
    model: nn.Module, structure: Structure, layers: range, rows: Tensor, part: tuple[int, int] = (0, 1)
) -> Tables:
    """Puts the steering of this process's layers on a model, with empty lists.

    Args:
        rows: the row buffer; the lists are on its device.
        part: this process's number in its tensor-parallel group, and how many there are: the inputs of projections are
            split among them, in order.

    Raises:
        SiteError: the model's sites are not those of the structure.
    """
    room: dict[tuple[str, int], dict[str, int]] = {}
    for (site, layer, kind), count in structure.room.items():
        if layer in layers:
            room.setdefault((site, layer), {})[kind] = count
    modules = {}
    for (site, layer), kinds in room.items():
        module = site_module(model, structure.model.model_type, site, layer)
        width, expected = site_width(model, structure.model.model_type, site, layer), structure.model.widths[site]
        if width != expected:
            raise SiteError(f"site {site!r}, layer {layer}: found {width} AUs, expected {expected} as in the config")
        rank, size = part if site in INPUT_SIDES else (0, 1)
        width //= size
        with torch.inference_mode(False):
            modules[site, layer] = Steer(kinds, structure.slots, rows, width, rank * width)
        module.add_module(NAME, modules[site, layer])
        if site in INPUT_SIDES:
            module.register_forward_pre_hook(_at_input)
        else:
            module.register_forward_hook(_at_layer if site == "layer" else _at_output)
    return Tables(modules, structure.places)
