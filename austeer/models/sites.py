"""Where atomic units live in a model.

A site is one activation tensor of each decoder layer; its last dimension counts the atomic units (AUs). The paper's
public code steers three of them; ``neuron`` is the strict reading of its definition for the feed-forward block:

=========== ======================================== ======
name        tensor                                   side
=========== ======================================== ======
attention   input of the attention output projection input
ffn         output of the MLP module, before the     output
            residual is added
layer       output of the decoder layer              output
neuron      input of the MLP's down projection       input
=========== ======================================== ======

Where a state space, a convolution or a recurrence stands in attention's place, ``attention`` is a site of the other
layers only, which keep their numbers.
In a mixture of experts ``ffn`` is the block's summed output, and there is no ``neuron``: each expert has its own.
A tensor is [batch, tokens, width], or [batch * tokens, width] in the families that flatten it (OPT and Llama 4's
mixtures at ``ffn``, OPT at ``neuron``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import SiteError
from . import linear
from .detect import detect
from .families import AS_IT_IS, LAYOUTS, Layout, Paths, alternatives
from .structure import decoder_of, has_module, name_of, text_config, unwrap

SITE_NAMES = ("attention", "ffn", "layer", "neuron")


@dataclass(frozen=True)
class Site:
    """One steerable tensor: the input or the output of ``path``.

    Attributes:
        name: one of ``SITE_NAMES``.
        layer: counted from 0 at the first decoder layer.
        path: the module whose input or output it is, from the model's root.
        side: "input" or "output".
        width: the number of AUs.
        projection: path of the linear layer that reads (input side) or makes (output side) the tensor, if one alone
            does: its product can be fused. Otherwise None.
        parts: paths of all the modules whose weights can be scaled in place of the tensor: the projection, or in a
            mixture of experts the routed experts' module and the shared experts' down projections. None at ``layer``.
        bias: path of the linear layer by whose bias the tensor can be shifted: the one that reads it (input side), or
            one whose output is part of it (output side). None if none is known.
        bias_factor: what that output is multiplied by before.
    """

    name: str
    layer: int
    path: str
    side: str
    width: int
    projection: str | None
    parts: tuple[str, ...] = ()
    bias: str | None = None
    bias_factor: float = 1.0


@dataclass(frozen=True)
class Fingerprint:
    """What a momentum or a plan was made for. ``name`` and ``revision`` inform; the rest must match to steer."""

    model_type: str
    layers: int
    widths: dict[str, int]
    name: str
    revision: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fingerprint:
        """Raises TypeError or ValueError where ``data`` is not a fingerprint."""
        fingerprint = cls(**data)
        if not isinstance(fingerprint.widths, dict):
            raise ValueError("widths must be an object: site -> width")
        sizes = [fingerprint.layers, *fingerprint.widths.values()]
        if not all(isinstance(n, int) and n > 0 for n in sizes) or not isinstance(fingerprint.model_type, str):
            raise ValueError("sizes must be positive integers and model_type a string")
        return fingerprint


class _NotHere(SiteError):
    """The model is understood, and has no such site."""


class _OtherKind(SiteError):
    """A layer without the site, in a model in which others may have it."""


def available(model: nn.Module, names: Iterable[str], layout: Layout | None = None) -> tuple[str, ...]:
    """Those of some sites that a model has; raises SiteError for a family that is not understood."""
    found = find_sites(model, None, layout)
    return tuple(name for name in names if name in found)


def find_sites(
    model: nn.Module, names: str | Iterable[str] | None = None, layout: Layout | None = None
) -> dict[str, list[Site]]:
    """The sites of a model: for each name, one ``Site`` for each layer that has it, first layer first.

    Example:
        >>> sites = austeer.find_sites(model)
        >>> list(sites), len(sites["ffn"])
        (['attention', 'ffn', 'layer', 'neuron'], 3)
        >>> sites["attention"][0].path, sites["attention"][0].side, sites["attention"][0].width
        ('model.layers.0.self_attn.o_proj', 'input', 48)

    Args:
        model: a Transformers model, with or without its head, also one that reads images and text.
        names: any of ``SITE_NAMES``; by default those that the model has.
        layout: attribute paths by hand. By default those of the model's family, or, if that is not known, what
            :func:`austeer.models.detect.detect` finds.

    Raises:
        SiteError: an unknown site, one that this model does not have (``neuron`` in a mixture of experts, or one whose
            width differs between layers), a family that is not known and was not understood, or modules that are not
            where the layout says.
    """
    wanted = SITE_NAMES if names is None else [names] if isinstance(names, str) else names
    for name in (wanted := list(dict.fromkeys(wanted))):
        if name not in SITE_NAMES:
            raise SiteError(f"site {name!r} is not known; expected one of {', '.join(SITE_NAMES)}")
    model = unwrap(model)
    config = text_config(model)
    family = f"{type(model).__name__} ({config.model_type})"
    if layout is not None and not isinstance(layout, Layout):
        raise SiteError(
            f"layout: found {type(layout).__name__}, expected austeer.Layout(layers=..., attention=..., ...)"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SiteError(f"{family}: found an encoder and a decoder, expected a decoder alone")
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise SiteError(f"{family}: found slow_but_exact, which bypasses the projections; set it to False")
    decoder = decoder_of(model)
    layout = layout or LAYOUTS.get(config.model_type)
    detected = layout is None
    layout = layout or detect(decoder, config, family)
    layers = decoder.get_submodule(_first(decoder, layout.layers, family))
    root = next(path for path, module in model.named_modules() if module is layers)
    sites: dict[str, list[Site]] = {}
    for name in wanted:
        try:
            sites[name] = list(_sites(name, root, layers, layout, config, family, detected))
            _check_widths(name, sites[name], family)
            _check_distinct(model, sites[name], family)
        except _NotHere:
            if names is not None:
                raise
            sites.pop(name, None)
    return sites


def _sites(
    name: str, root: str, layers: nn.Module, layout: Layout, config: Any, family: str, detected: bool
) -> Iterator[Site]:
    """Raises SiteError if no layer has the site."""
    missing: _OtherKind | None = None
    found = False
    for number, layer in enumerate(layers._modules.values()):  # children() would leave out repeated ones
        if layer is None:
            continue
        where = f"layer {number} of {family}"
        try:
            yield _site(name, number, f"{root}.{number}", layer, layout, config, where, detected)
            found = True
        except _OtherKind as error:
            missing = missing or error
    if missing is not None and not found:
        raise missing


def _site(
    name: str, number: int, base: str, layer: nn.Module, layout: Layout, config: Any, where: str, detected: bool
) -> Site:
    if name == "layer":
        bias, factor = _last_bias(base, layer, layout, config)
        return Site(name, number, base, "output", config.hidden_size, None, bias=bias, bias_factor=factor)
    if name == "attention":
        path = _first(layer, layout.attention, where, _OtherKind)
        width, projection = in_features(layer.get_submodule(path)), f"{base}.{path}"
        return Site(name, number, projection, "input", width, projection, (projection,), projection)
    ffn = f"{base}.{_first(layer, layout.ffn, where)}"
    experts = [path for path in alternatives(layout.experts) if has_module(layer, path)]
    no_down = not any(has_module(layer, path) for path in alternatives(layout.down))
    if no_down and (experts or not layout.down or detected):
        if name == "neuron":
            why = "its feed-forward block is a mixture of experts" if experts else "its layout names none"
            raise _NotHere(
                f"site 'neuron': {where} has no one down projection ({why}), expected one in every layer; "
                "use 'ffn', the block's summed output"
            )
        parts, shared = tuple(f"{base}.{path}" for path in experts), _ffn_bias(base, layer, layout)
        return Site(name, number, ffn, "output", config.hidden_size, None, parts, shared)
    down = _first(layer, layout.down, where)
    width, projection = in_features(layer.get_submodule(down)), f"{base}.{down}"
    if name == "neuron":
        return Site(name, number, projection, "input", width, projection, (projection,), projection)
    return Site(name, number, ffn, "output", config.hidden_size, projection, (projection,), projection)


def _ffn_bias(base: str, layer: nn.Module, layout: Layout) -> str | None:
    """The linear layer whose bias adds to the output of ``ffn``: the down projection or the ungated shared experts'."""
    for path in (*alternatives(layout.down), layout.shared):
        if path and has_module(layer, path):
            return f"{base}.{path}"
    return None


def _last_bias(base: str, layer: nn.Module, layout: Layout, config: Any) -> tuple[str | None, float]:
    """The linear layer whose bias adds to a layer's output, and what its own output is multiplied by."""
    factor = residual_factor(layout, config, layer)
    return (_ffn_bias(base, layer, layout), factor) if factor else (None, 1.0)


def residual_factor(layout: Layout, config: Any, layer: nn.Module | None = None) -> float | None:
    """What a layer multiplies the output of ``ffn`` by, to add it to its own; None where it does more, or is unknown.

    Args:
        config: the language model's. layer: where it keeps the number itself, as Granite's do, that one counts.
    """
    if not layout.residual or getattr(config, "do_layer_norm_before", True) is False:  # OPT-350m: a norm follows
        return None
    if layout.residual == AS_IT_IS:
        return 1.0
    return float(getattr(layer, layout.residual, getattr(config, layout.residual)))


def _check_widths(name: str, sites: list[Site], family: str) -> None:
    for site in sites:
        if site.width != sites[0].width:
            raise _NotHere(
                f"site {name!r} of {family}: found a width of {sites[0].width} in layer {sites[0].layer} and "
                f"{site.width} in layer {site.layer}, expected one width in all layers; use another site"
            )


def _check_distinct(model: nn.Module, sites: list[Site], family: str) -> None:
    first: dict[nn.Module, Site] = {}
    for site in sites:
        other = first.setdefault(model.get_submodule(site.path), site)
        if other is not site:
            raise SiteError(
                f"site {site.name!r} of {family}: found one module in layers {other.layer} and {site.layer} "
                f"({site.path}), expected each layer to have its own; its AUs would be those of both"
            )


def in_features(module: nn.Module) -> int:
    """The input width of a linear layer, also of a quantised or wrapped one."""
    found = linear.sizes(module)
    if found is None:
        raise SiteError(f"{type(module).__name__}: found no in_features, expected a linear layer")
    return found[0]


def _first(parent: nn.Module, paths: Paths, where: str, error: type[SiteError] = SiteError) -> str:
    """The first of the alternatives that ``parent`` has."""
    for path in alternatives(paths):
        if has_module(parent, path):
            return path
    found = ", ".join(name for name, _ in parent.named_children())
    raise error(
        f"{where} has no module {' or '.join(map(repr, alternatives(paths)))}; found {found}. "
        "Give this model's paths with layout=austeer.Layout(...)"
    )


def site_at(sites: Sequence[Site], layer: int) -> Site:
    """The site of one layer among those of one name; raises SiteError, with the layers that have it."""
    for site in sites:
        if site.layer == layer:
            return site
    raise SiteError(
        f"site {sites[0].name!r}: found no such site in layer {layer}, expected one of the layers that have it: "
        f"{layers_of(sites)}"
    )


def layers_of(sites: Sequence[Site]) -> str:
    """The numbers of the layers that have a site, for messages."""
    return ", ".join(str(site.layer) for site in sites)


def layers_path(model: nn.Module, layout: Layout | None = None) -> str:
    """The path of the list of decoder layers, from the model's root."""
    return find_sites(model, ["layer"], layout)["layer"][0].path.rpartition(".")[0]


def fingerprint(model: nn.Module, sites: dict[str, list[Site]]) -> Fingerprint:
    """What ``sites`` were found on."""
    config = text_config(model)
    full = unwrap(model).config
    name = name_of(model)
    return Fingerprint(
        model_type=config.model_type,
        layers=_layer_count(unwrap(model), next(iter(sites.values()))[0]),
        widths={name: found[0].width for name, found in sites.items()},
        name=Path(name).name if Path(name).exists() else name,  # a local folder's place says nothing elsewhere
        revision=getattr(full, "_commit_hash", None),
    )


def _layer_count(model: nn.Module, site: Site) -> int:
    """How many decoder layers the list has that a site's layer is in."""
    parts = site.path.split(".")
    lists = (model.get_submodule(".".join(parts[:i])) for i, part in enumerate(parts) if part == str(site.layer))
    layers = next(module for module in lists if isinstance(module, nn.ModuleList))
    return sum(layer is not None for layer in layers._modules.values())


def ascending(layers: Iterable[Any], count: int) -> tuple[int, ...]:
    """The layers that a file names; raises ValueError unless they are ascending numbers below ``count``."""
    found = tuple(layers)
    if not found or any(type(n) is not int or not 0 <= n < count for n in found) or list(found) != sorted({*found}):
        raise ValueError(f"layers {list(found)} are not ascending numbers below {count}")
    return found
