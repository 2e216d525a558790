"""Where atomic units live in each model family.

A site is one activation tensor of each decoder layer; its last dimension counts the atomic units (AUs). The paper's
public code steers three of them; ``neuron`` is the strict reading of its definition for the feed-forward block:

=========== ======================================== ======
name        tensor                                   side
=========== ======================================== ======
attention   input of the attention output projection input
ffn         output of the MLP module                 output
layer       output of the decoder layer              output
neuron      input of the MLP's down projection       input
=========== ======================================== ======
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import SiteError

SITE_NAMES = ("attention", "ffn", "layer", "neuron")


@dataclass(frozen=True)
class Layout:
    """Attribute paths of a model family.

    Attributes:
        layers: the list of decoder layers, from the model without its head.
        attention: the attention output projection, from a layer.
        ffn: the MLP module, from a layer.
        down: the MLP's down projection, from a layer; its output is the output of ``ffn``.
    """

    layers: str
    attention: str
    ffn: str
    down: str


_LLAMA = Layout(layers="layers", attention="self_attn.o_proj", ffn="mlp", down="mlp.down_proj")

#: Family (``config.model_type``) -> attribute paths.
LAYOUTS: dict[str, Layout] = dict.fromkeys(
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "olmo2",
        "granite",
        "cohere",
        "cohere2",
        "glm4",
        "smollm3",
        "stablelm",
    ),
    _LLAMA,
)


@dataclass(frozen=True)
class Site:
    """One steerable tensor: the input or the output of ``path``.

    Attributes:
        name: one of ``SITE_NAMES``.
        layer: counted from 0 at the first decoder layer.
        path: the module whose input or output it is, from the model's root.
        side: "input" or "output".
        width: the number of AUs.
        projection: path of the linear layer that reads (input side) or makes (output side) the tensor, if one does:
            its weight can be folded and its product fused. Otherwise None.
    """

    name: str
    layer: int
    path: str
    side: str
    width: int
    projection: str | None


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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its head: what has to run to fill every site."""
    model = unwrap(model)
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        model = model.get_base_model()  # type: ignore[operator]
    return getattr(model, getattr(model, "base_model_prefix", "") or "_", model)


def text_config(model: nn.Module):
    config = getattr(unwrap(model), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise SiteError(f"{type(model).__name__}: found no config, expected a Transformers model")
    return config.get_text_config()


def find_sites(
    model: nn.Module, names: str | Iterable[str] | None = None, layout: Layout | None = None
) -> dict[str, list[Site]]:
    """The sites of a model: for each name, one ``Site`` a layer, first layer first.

    Args:
        model: a Transformers model, with or without its head.
        names: any of ``SITE_NAMES``; all of them by default.
        layout: attribute paths by hand, for a model whose family is not known.

    Raises:
        SiteError: an unknown site or family, or modules that are not where the layout says.
    """
    names = list(dict.fromkeys(SITE_NAMES if names is None else [names] if isinstance(names, str) else names))
    for name in names:
        if name not in SITE_NAMES:
            raise SiteError(f"site {name!r} is not known; expected one of {', '.join(SITE_NAMES)}")
    model = unwrap(model)
    config = text_config(model)
    if layout is not None and not isinstance(layout, Layout):
        raise SiteError(
            f"layout: found {type(layout).__name__}, expected austeer.Layout(layers=..., attention=..., ...)"
        )
    layout = layout or LAYOUTS.get(config.model_type)
    if layout is None:
        raise SiteError(
            f"model family {config.model_type!r} is not known; known are {', '.join(sorted(LAYOUTS))}. Give the "
            "attribute paths by hand: layout=austeer.Layout(layers='layers', attention='self_attn.o_proj', ffn='mlp', "
            "down='mlp.down_proj') with this model's names"
        )
    decoder = decoder_of(model)
    layers = _module(decoder, layout.layers, f"{type(model).__name__} ({config.model_type})")
    root = next(path for path, module in model.named_modules() if module is layers)
    sites: dict[str, list[Site]] = {name: [] for name in names}
    for number, layer in enumerate(layers.children()):
        where = f"layer {number} of {type(model).__name__} ({config.model_type})"
        for name in names:
            sites[name].append(_site(name, number, f"{root}.{number}", layer, layout, config.hidden_size, where))
    return sites


def _site(name: str, number: int, base: str, layer: nn.Module, layout: Layout, hidden_size: int, where: str) -> Site:
    if name == "layer":
        return Site(name, number, base, "output", hidden_size, None)
    if name == "attention":
        width = in_features(_module(layer, layout.attention, where))
        return Site(name, number, f"{base}.{layout.attention}", "input", width, f"{base}.{layout.attention}")
    down = _module(layer, layout.down, where)
    if name == "neuron":
        return Site(name, number, f"{base}.{layout.down}", "input", in_features(down), f"{base}.{layout.down}")
    _module(layer, layout.ffn, where)
    return Site(name, number, f"{base}.{layout.ffn}", "output", hidden_size, f"{base}.{layout.down}")


def in_features(module: nn.Module) -> int:
    """The input width of a linear layer, also of a quantised or wrapped one."""
    width = getattr(module, "in_features", None)
    if not isinstance(width, int):
        raise SiteError(f"{type(module).__name__}: found no in_features, expected a linear layer")
    return width


def _module(parent: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        found = ", ".join(name for name, _ in parent.named_children())
        raise SiteError(
            f"{where} has no module {path!r}; found {found}. Give this model's paths with layout=austeer.Layout(...)"
        ) from error


def fingerprint(model: nn.Module, sites: dict[str, list[Site]]) -> Fingerprint:
    """What ``sites`` were found on."""
    config = text_config(model)
    full = unwrap(model).config
    name = str(getattr(full, "_name_or_path", "") or type(unwrap(model)).__name__)
    return Fingerprint(
        model_type=config.model_type,
        layers=len(next(iter(sites.values()))),
        widths={name: found[0].width for name, found in sites.items()},
        name=Path(name).name if Path(name).exists() else name,  # a local folder's place says nothing elsewhere
        revision=getattr(full, "_commit_hash", None),
    )


def input_device(model: nn.Module) -> torch.device:
    """Where a model expects its token ids: its embedding's device (the first real one for an offloaded model)."""
    weight = unwrap(model).get_input_embeddings().weight  # type: ignore[operator]
    if weight.device.type != "meta":
        return weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
