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
from .sets import ServingError
from .tables import Place, Row, Structure

steer_columns_op = torch.ops.austeer.steer_columns_.default

INPUT_SIDES = ("attention", "neuron")
#: float64 would be computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAME, JUDGE = "austeer", "austeer_judge"


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
        gamma[row].zero_()
        shift[row].zero_()
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
            if kind == "direction":
                index, direction, strength = lists
                x = reference.ablate_columns(x, index, direction, strength[:, 0], rows)
            elif self.in_place:
                steer_columns_op(x, *lists, magnitude, rows)
            else:
                x = reference.steer_columns(x, *lists, magnitude, rows)
        return x


class Judge(nn.Module):
    """Scores the last tokens of prompts by their rows' probes: above 0 where one fires.

    Args:
        slots: rows. rows: int32 [tokens that a batch can have], the row of each token to judge; -1 for all others.
        scores: float32 [as many], where the scores go. width: the site's.
    """

    rows: Tensor
    scores: Tensor
    probes: Tensor
    here: Tensor

    def __init__(self, slots: int, rows: Tensor, scores: Tensor, width: int):
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("scores", scores, persistent=False)
        probes = torch.zeros(slots, width + 1, device=rows.device)  # directions and, behind them, thresholds
        self.register_buffer("probes", probes, persistent=False)
        here = torch.zeros(slots, dtype=torch.bool, device=rows.device)
        self.register_buffer("here", here, persistent=False)

    def fill(self, row: int, probe: Tensor | None) -> None:
        """Writes one row's probe, [width + 1]; None: it has none here."""
        self.here[row].fill_(probe is not None)
        if probe is not None:
            self.probes[row].copy_(probe)

    def forward(self, x: Tensor) -> None:
        rows, scores = (t.narrow(0, 0, x.shape[0]) for t in (self.rows, self.scores))
        row = rows.clamp(min=0)
        probe = self.probes.index_select(0, row)
        score = (x.float() * probe[:, :-1]).sum(-1) - probe[:, -1]
        scores.copy_(torch.where((rows >= 0) & self.here.index_select(0, row), score, scores))


class Tables:
    """The lists of all steered modules of this process, and its probes; a row of all of them is written at once.

    Args:
        modules: by the site and layer. places: of the structure, by number. judges: by the number of the probe's place.
    """

    def __init__(
        self,
        modules: Mapping[tuple[str, int], Steer],
        places: Sequence[Place],
        judges: Mapping[int, Judge] | None = None,
    ):
        self._modules, self._places, self._judges = modules, places, judges or {}
        self._filled: dict[int, set[int]] = {}

    def fill(self, number: int, row: Row) -> None:
        """Puts the AUs of ``row`` into the rows of a number, in place of what was there."""
        new = dict(row.by_place())
        with torch.inference_mode(False), torch.no_grad():
            for place in self._filled.get(number, set()) | set(new):
                site, layer, kind = self._places[place]
                if (site, layer) in self._modules:  # of this process
                    self._modules[site, layer].fill(number, kind, new.get(place))
            probed = row.probed.tolist()
            for place, judge in self._judges.items():
                judge.fill(number, row.probe if place in probed else None)
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


def _judge_input(module: nn.Module, args: tuple) -> None:
    getattr(module, JUDGE)(args[0])


def _judge_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
    # Of a layer the residual is added by the next one's norm; what is judged is the sum.
    getattr(module, JUDGE)(output if isinstance(output, Tensor) else output[0].float() + output[1].float())


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
    model: nn.Module,
    structure: Structure,
    layers: range,
    rows: Tensor,
    part: tuple[int, int] = (0, 1),
    judged: tuple[Tensor, Tensor] | None = None,
) -> Tables:
    """Puts the steering of this process's layers on a model, with empty lists.

    Args:
        rows: the row buffer; the lists are on its device. judged: the rows of tokens to judge, and where scores go.
        part: this process's number in its tensor-parallel group, and how many there are: the inputs of projections are
            split among them, in order.

    Raises:
        SiteError: the model's sites are not those of the structure.
        ServingError: a direction, or a probe, at a site of which this process has a part.
    """
    judges = _install_judges(model, structure, layers, part, *judged) if judged is not None else {}
    room: dict[tuple[str, int], dict[str, int]] = {}
    for (site, layer, kind), count in structure.room.items():
        if layer in layers:
            room.setdefault((site, layer), {})[kind] = count
    modules = {}
    for (site, layer), kinds in room.items():
        module, width = _module_and_width(model, structure, site, layer)
        rank, size = part if site in INPUT_SIDES else (0, 1)
        if size > 1 and "direction" in kinds:
            raise _split(f"'ablate' at site {site!r}", size)
        width //= size
        with torch.inference_mode(False):
            modules[site, layer] = Steer(kinds, structure.slots, rows, width, rank * width)
        module.add_module(NAME, modules[site, layer])
        if site in INPUT_SIDES:
            module.register_forward_pre_hook(_at_input)
        else:
            module.register_forward_hook(_at_layer if site == "layer" else _at_output)
    return Tables(modules, structure.places, judges)


def _install_judges(
    model: nn.Module, structure: Structure, layers: range, part: tuple[int, int], rows: Tensor, scores: Tensor
) -> dict[int, Judge]:
    judges = {}
    for number, (site, layer) in enumerate(structure.probes):
        if layer not in layers:
            raise ServingError(
                "probes: found them with pipeline parallelism, whose other processes would not hear what they decide; "
                "use tensor parallelism"
            )
        if part[1] > 1 and site in INPUT_SIDES:
            raise _split(f"a probe at site {site!r}", part[1])
        module, width = _module_and_width(model, structure, site, layer)
        with torch.inference_mode(False):
            judges[number] = Judge(structure.slots, rows, scores, width)
        module.add_module(JUDGE, judges[number])
        if site in INPUT_SIDES:
            module.register_forward_pre_hook(_judge_input)
        else:
            module.register_forward_hook(_judge_output)
    return judges


def _module_and_width(model: nn.Module, structure: Structure, site: str, layer: int) -> tuple[nn.Module, int]:
    model_type, expected = structure.model.model_type, structure.model.widths[site]
    width = site_width(model, model_type, site, layer)
    if width != expected:
        raise SiteError(f"site {site!r}, layer {layer}: found {width} AUs, expected {expected} as in the config")
    return site_module(model, model_type, site, layer), width


def _split(what: str, size: int) -> ServingError:
    return ServingError(
        f"found {what} in a group of {size} processes, each of which has a part of it; use 'ffn' or 'layer', or no "
        "tensor parallelism"
    )
