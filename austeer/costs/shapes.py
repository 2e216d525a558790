"""What a model takes, read off its shapes: parameters, operations, and bytes of activations and counters.

Shapes are all that is looked at, so a model on the meta device (:func:`austeer.models.skeleton.skeleton`) will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from ..errors import SiteError
from ..models import linear
from ..models.sites import Site, layers_of
from ..models.structure import decoder_of, text_config


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has, each counted once, tied ones too.

    Attributes:
        total: all. layers: of each decoder layer.
        embedding: of the rest of the decoder: embeddings and norms.
        unused: of what a measurement does not run: an untied head, what encodes images.
    """

    total: int
    layers: tuple[int, ...]
    embedding: int
    unused: int


def count_parameters(model: nn.Module, layers: Sequence[Site]) -> Parameters:
    """Where a model's parameters are; ``layers``: the sites ``layer`` of all its layers."""
    seen: set[int] = set()

    def count(module: nn.Module) -> int:
        own = {id(p): p.numel() for p in module.parameters() if id(p) not in seen}
        seen.update(own)
        return sum(own.values())

    of_layers = tuple(count(model.get_submodule(site.path)) for site in layers)
    embedding, unused = count(decoder_of(model)), count(model)
    return Parameters(sum(of_layers) + embedding + unused, of_layers, embedding, unused)


@dataclass(frozen=True)
class LayerWork:
    """What a decoder layer does for a token. Widths are numbers of values.

    Attributes:
        active: entries of the matrices that a token is multiplied with; of a mixture's experts those that run.
        attention: width of all queries, and of all heads' outputs together; 0 in linear attention.
        peak: the most values that the layer holds at once of a token (:func:`layer_work`).
        largest: inputs and outputs of its largest matrix.
        experts: how many of how many routed experts run; None without a mixture. All, where nothing says how many.
    """

    active: int
    attention: int
    peak: int
    largest: tuple[int, int]
    experts: tuple[int, int] | None = None

    def flops(self, positions: int, squares: int) -> int:
        """Floating-point operations of the products of one pass.

        2 for each entry of a matrix and each position; 2 for each pair of positions in a row and each value of a
        query, and of an output. Norms, activations, rotations and linear attention's recurrence are left out.

        Args:
            positions: padding included. squares: sum over all rows of length * length.
        """
        return 2 * self.active * positions + 2 * self.attention * squares


def layer_works(model: nn.Module, sites: Mapping[str, Sequence[Site]]) -> list[LayerWork]:
    """The work of each decoder layer; ``sites``: "layer" and "attention" at least.

    Raises:
        SiteError: layers without attention, whose work is not known.
    """
    layers, attention = sites["layer"], sites["attention"]
    if len(attention) < len(layers):
        raise SiteError(
            f"costs: found attention in layers {layers_of(attention)} of {len(layers)} alone, expected it in every "
            "layer: what the others take is not known"
        )
    return [layer_work(model, *pair) for pair in zip(layers, attention)]


def layer_work(model: nn.Module, layer: Site, attention: Site) -> LayerWork:
    """What a decoder layer does for a token, from its sites ``layer`` and ``attention``.

    Of one token it holds at once, with hidden size h, whichever is the most:

    - attention: 2 h (the residual stream and its norm) + 3 times the outputs of the projections before the last one
      (as they are, rotated, and on the way there);
    - the MLP: 4 h + the outputs of its first projections + the input of its last;
    - experts, of which k run, of inner width i: 4 h + k max(h + 4 i, 4 h), for tokens are copied to their experts.

    Peaks measured on the CPU in float32 and bfloat16 are 0.8 to 1.9 times this in every family but two: Falcon (up to
    5: it writes its attention's scores down) and Qwen3-Next (up to 8, without the kernels of its linear attention).
    """
    config = text_config(model)
    hidden = config.hidden_size
    block, inside = model.get_submodule(layer.path), f"{layer.path}."
    before = attention.path.removeprefix(inside).rpartition(".")[0]  # the attention module, from the layer
    experts = dict(experts_of(block, config))
    active = outputs = wide = 0
    for path, module in block.named_modules():
        run, of = share_of(path, experts)
        for name, p in module._parameters.items():
            if p is not None and p.dim() >= 2 and not name.endswith("bias") and not isinstance(module, nn.Embedding):
                active += p.numel() * run // of
        size = linear.sizes(module)
        if size is None or run != of:
            continue
        if path == before or path.startswith(f"{before}."):
            outputs += size[1] if f"{inside}{path}" != attention.path else 0
        else:  # the last projection gives h again, which is among the 4 h
            wide += size[1] if size[1] != hidden else size[0]
    routed = max((_routed(block.get_submodule(path), run, hidden) for path, (run, _) in experts.items()), default=0)
    kinds = getattr(config, "layer_types", None)
    queries = config.num_attention_heads * config.qk_head_dim if hasattr(config, "qk_head_dim") else attention.width
    return LayerWork(
        active=active,
        attention=0 if kinds and kinds[layer.layer] == "linear_attention" else queries + attention.width,
        peak=max(2 * hidden + 3 * outputs, 4 * hidden + wide, 4 * hidden + routed),
        largest=max(((p.shape[-1], p.shape[-2]) for p in block.parameters() if p.dim() >= 2), key=prod),
        experts=next(iter(experts.values()), None),
    )


def experts_of(block: nn.Module, config) -> Iterator[tuple[str, tuple[int, int]]]:
    """The modules that hold the experts of a mixture, and how many of how many run for a token."""
    for path, module in block.named_modules():
        fused = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
        listed = isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2].lower()
        if isinstance(module, nn.Conv1d) or not (fused or listed):
            continue
        count = len(module) if isinstance(module, nn.ModuleList) else fused[0].shape[0]
        run = None
        # Llama 4's take every token: no choice is handed to them.
        if listed or len(inspect.signature(module.forward).parameters) > 1:
            around = block.get_submodule(path.rpartition(".")[0])  # has the router
            asked = (getattr(m, "top_k", None) for m in around.modules())
            run = next((k for k in asked if isinstance(k, int)), getattr(config, "num_experts_per_tok", None))
        yield path, (run or count, count)


def share_of(path: str, experts: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """How many of how many experts run for a token, for a module of a layer; (1, 1) outside of all experts."""
    return next((e for name, e in experts.items() if f"{path}.".startswith(f"{name}.")), (1, 1))


def _routed(experts: nn.Module, run: int, hidden: int) -> int:
    """Values that the experts that run hold of a token."""
    if isinstance(experts, nn.ModuleList):
        inner = max((size[0] for m in experts.modules() if (size := linear.sizes(m)) and size[1] == hidden), default=0)
    else:
        down = next(p for name, p in experts._parameters.items() if p is not None and name.startswith("down"))
        inner = prod(down.shape[1:]) // hidden
    return run * max(hidden + 4 * inner, 4 * hidden)


def batch_bytes(
    model: nn.Module, work: Sequence[LayerWork], rows: int, length: int, itemsize: int, tree: bool = False
) -> int:
    """Bytes of activations at the peak of one forward pass without a cache.

    rows * length * itemsize * (the largest ``LayerWork.peak``), and beside it, of each row, length * length times:

    - under eager attention the scores of all heads, and their softmax in float32: heads * (8 + itemsize) bytes,
      or heads * 8 in float32;
    - in a batch of trees the masks: itemsize + 10 bytes (with what they are made from) for each kind of layer.
    """
    config = text_config(model)
    square = 0
    if getattr(config, "_attn_implementation", None) == "eager":
        square += config.num_attention_heads * (8 + (itemsize if itemsize < 4 else 0))
    if tree:
        square += (itemsize + 10) * len(set(getattr(config, "layer_types", None) or ["full_attention"]))
    return rows * length * itemsize * max(w.peak for w in work) + rows * length * length * square


def counter_bytes(sites: Mapping[str, Sequence[Site]]) -> int:
    """Of the counters of all sites: 40 an AU, and as many for one half of the pairs."""
    return 80 * sum(site.width for found in sites.values() for site in found)


def buffer_bytes(sites: Mapping[str, Sequence[Site]], block_pairs: int, itemsize: int) -> int:
    """Of the last-token activations of a block: two texts a pair, of every AU."""
    return 2 * block_pairs * itemsize * sum(site.width for found in sites.values() for site in found)
