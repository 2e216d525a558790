"""Finds the layout of a model whose family is not in the table, from its structure and the usual names.

No forward pass is run. What is ambiguous is refused, with what was found and how to say it by hand.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

from ..errors import SiteError
from . import linear
from .families import Layout
from .structure import has_module

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
#: What mixes tokens in attention's place: state spaces, convolutions, recurrences.
_MIXER = re.compile(r"mamba|ssm|conv|recurrent|temporal|rglru|lstm", re.IGNORECASE)
_NO_ATTENTION = re.compile(r"norm|cross|drop|(^|_)ln(_|$)", re.IGNORECASE)

#: Last part of the name of an output projection, and of a down projection, where more than one layer has its shape.
_OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj", "proj_out", "output", "o")
_DOWN_NAMES = (
    *("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "linear_2", "proj_2", "lin2", "wo"),
    *("down", "output"),
)


def detect(decoder: nn.Module, config, family: str) -> Layout:
    """The layout of a decoder-only language model without its head.

    Looked for are: the one list of as many modules as ``config`` has layers; in each layer one attention module with
    one output projection, one MLP module with one down projection, or else a mixture of experts. In some layers, not
    in all, a state space, a convolution or a recurrence may stand in attention's place.

    Args:
        config: of the text model; ``num_hidden_layers`` and ``hidden_size`` are read.
        family: names the model in errors.

    Raises:
        SiteError: one of these is not there, or there is more than one.
    """
    try:
        if getattr(config, "is_encoder_decoder", False):
            raise SiteError("it has an encoder and a decoder, expected a decoder alone")
        path, layers = _layers(decoder, config)
        found = [_Found(layer, config.hidden_size, f"layer {i}") for i, layer in enumerate(layers)]
        layout = Layout(
            layers=path,
            attention=_distinct(f.attention for f in found if f.attention),
            ffn=_distinct(f.ffn for f in found),
            down=_distinct(f.down for f in found if f.down),
            experts=_distinct(path for f in found for path in f.experts),
        )
        if not layout.attention:
            raise SiteError(f"looked for attention, found {found[0].mixers[0]} in its place in every layer")
        _check_unambiguous(layout, layers, found)
    except SiteError as error:
        raise SiteError(
            f"model family of {family} is not known, and its structure was not understood: {error}. Give the attribute "
            "paths by hand: layout=austeer.Layout(layers='layers', attention='self_attn.o_proj', ffn='mlp', "
            "down='mlp.down_proj') with this model's names; the first from the language model without its head, the "
            "others from a layer"
        ) from error
    return layout


class _Found:
    """What one decoder layer has, as paths from the layer."""

    def __init__(self, layer: nn.Module, width: int, where: str):
        self.width, self.where = width, where
        attentions = [
            name
            for name, child in layer.named_children()
            if (_ATTENTION.search(name) or _ATTENTION.search(type(child).__name__))
            and not _NO_ATTENTION.search(name)
            and any(_linears(child))
        ]
        self.mixers = [name for name, child in layer.named_children() if _MIXER.search(name) and any(_linears(child))]
        self.attention: str | None = None
        if attentions or not self.mixers:
            attention = self._one("attention module", attentions, layer)
            self.attention = self._narrowing(layer, attention, _OUTPUT_NAMES, "attention output projection")
        self.down: str | None = None
        self.experts: tuple[str, ...] = ()
        blocks = [
            name
            for name, child in layer.named_children()
            if name not in (*attentions, *self.mixers)
            and not _ATTENTION.search(name)
            and (any(_linears(child)) or _holds_experts(child))
            and not _sized(child)
        ]
        if not blocks and any(_sized(child) for _, child in layer.named_children()):
            self.ffn = self.down = self._narrowing(layer, "", _DOWN_NAMES, "down projection")  # no MLP module
            return
        beside = [name for name, child in layer.named_children() if _sized(child) and name in _DOWN_NAMES]
        self.ffn = self._one("MLP module", [*blocks, *beside], layer)
        block = layer.get_submodule(self.ffn)
        if _holds_experts(block):
            self.experts = self._experts(self.ffn, block)
            return
        self._refuse_norms(block)
        if any(isinstance(module, nn.Embedding) for module in block.modules()):  # Doge keeps its experts so
            raise SiteError(f"{self.where}: found an embedding in {self.ffn}, expected linear layers alone")
        self.down = self._narrowing(layer, self.ffn, _DOWN_NAMES, "down projection")
        if _takes_residual(block):
            self.ffn = self.down

    def _one(self, what: str, found: list[str], parent: nn.Module) -> str:
        if len(found) != 1:
            children = ", ".join(name for name, _ in parent.named_children())
            raise SiteError(
                f"{self.where}: looked for one {what}, found {', '.join(found) or 'none'} among {children or 'nothing'}"
            )
        return found[0]

    def _narrowing(self, layer: nn.Module, block: str, names: tuple[str, ...], what: str) -> str:
        """The one linear layer of ``block`` with ``width`` outputs; by its name if several have them."""
        if not block:
            linears = {name: child for name, child in layer.named_children() if _sized(child)}
        else:
            linears = {f"{block}.{name}": child for name, child in _linears(layer.get_submodule(block))}
        found = [path for path, child in linears.items() if (linear.sizes(child) or (0, 0))[1] == self.width]
        if len(found) > 1:
            found = [path for path in found if path.rpartition(".")[2] in names] or found
        if len(found) != 1:
            raise SiteError(
                f"{self.where}: looked for one {what} ({self.width} outputs) in {block or 'it'}, found "
                f"{', '.join(found) or 'none'} among {', '.join(linears) or 'no linear layers'}"
            )
        return found[0]

    def _refuse_norms(self, block: nn.Module) -> None:
        """A norm behind the down projection would make another tensor of its output, and order is not seen here."""
        for name, child in block.named_modules():
            if _is_norm(child, self.width):
                raise SiteError(
                    f"{self.where}: {self.ffn}.{name} ({type(child).__name__}) may follow the down projection"
                )

    def _experts(self, path: str, block: nn.Module) -> tuple[str, ...]:
        """The modules that make the block's output; none if it is not certain that these are all."""
        fused = [name for name, child in block.named_modules() if _fused_experts(child)]
        rest = [(name, child) for name, child in _linears(block) if (linear.sizes(child) or (0, 0))[1] == self.width]
        shared = [name for name, _ in rest if name.rpartition(".")[2] in _DOWN_NAMES]
        inner = {name.rpartition(".")[0] for name in shared}  # gate and up projections beside them
        explained = all(name in shared or name.rpartition(".")[0] in inner for name, _ in rest)
        unclear = any(_is_norm(child, self.width) or isinstance(child, nn.ModuleList) for child in block.modules())
        if len(fused) != 1 or not explained or unclear:
            return ()
        return tuple(f"{path}.{name}" for name in fused + shared)


def _layers(decoder: nn.Module, config) -> tuple[str, nn.ModuleList]:
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or not isinstance(getattr(config, "hidden_size", None), int):
        raise SiteError("looked for num_hidden_layers and hidden_size in its config, found none")
    lists = {
        path: module
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(any(_linears(item)) for item in module)
    }
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        children = ", ".join(name for name, _ in decoder.named_children())
        raise SiteError(
            f"looked for one list of {count} decoder layers, found {', '.join(outer) or 'none'} in "
            f"{type(decoder).__name__} (with {children or 'nothing'})"
        )
    return outer[0], lists[outer[0]]


def _check_unambiguous(layout: Layout, layers: nn.ModuleList, found: list[_Found]) -> None:
    """Layers of several kinds share one list of alternatives: each layer must pick its own from it."""
    for layer, own in zip(layers, found):
        for field in ("attention", "ffn", "down"):
            paths = [path for path in getattr(layout, field) if has_module(layer, path)]
            if paths[:1] != [path for path in [getattr(own, field)] if path]:
                raise SiteError(f"{own.where}: looked for one {field}, found {', '.join(paths)}")


def _distinct(paths) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))


def _sized(module: nn.Module) -> bool:
    return linear.sizes(module) is not None


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The linear layers in a module; what a wrapped one (LoRA) is made of is not looked at."""
    for name, child in module.named_children():
        if _sized(child):
            yield prefix + name, child
        else:
            yield from _linears(child, f"{prefix}{name}.")


def _fused_experts(module: nn.Module) -> bool:
    return any(name.startswith("down") and p is not None and p.dim() == 3 for name, p in module._parameters.items())


def _holds_experts(module: nn.Module) -> bool:
    return any(
        _fused_experts(child) or (isinstance(child, nn.ModuleList) and "expert" in name.lower())
        for name, child in module.named_modules()
    )


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = module._parameters.get("weight")
    if weight is None:
        return "norm" in type(module).__name__.lower()
    return tuple(weight.shape) == (width,)


def _takes_residual(module: nn.Module) -> bool:
    """Whether the module adds the residual itself: its forward needs a second tensor, or names it so."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(needed) > 1 or any("residual" in p.name for p in parameters)
