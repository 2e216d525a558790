"""Whether a model's attention is causal, asked of the model itself; and batches for models that need them even.

In a causal model no later token changes an earlier one, so texts may be padded on the right without a mask, share a
beginning, and be scored in one pass. With bidirectional attention (PaliGemma, ``is_causal=False``) none of this holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import SiteError, TaskError
from ..models.families import Layout
from ..models.sites import layers_path
from ..models.structure import (
    decoder_of,
    evaluating,
    first_layers,
    first_tensor,
    input_device,
    text_config,
    unwrap,
    vocabulary_size,
)
from .packing import Batch, batches
from .tokens import made_up
from .tree_masks import longest_short_text

#: Tokens of the probe; what changes is the second half.
LENGTH = 16

#: How far rounding may move hidden states, as a part of their root mean square: experts see other tokens beside them.
#: A half of the text that is seen moves them by 0.1 and more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.03}

_found: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()


def is_causal(
    model: nn.Module, layout: Layout | None = None, unsteered: Callable[[], AbstractContextManager] = nullcontext
) -> bool:
    """Whether later tokens leave the hidden states of earlier ones as they are.

    Two passes of a few tokens through the first layer of each kind, once for a model and its settings.

    Args:
        layout: attribute paths, where they are not those of the model's family.
        unsteered: entered for these passes, where rows of a batch have plans.
    """
    decoder = decoder_of(unwrap(model))
    settings = _settings(decoder)
    found = _found.get(decoder)
    if found is None or found[0] != settings:
        with unsteered():
            found = _found[decoder] = settings, _probe(model, decoder, layout)
    return found[1]


def expect_causal(model: nn.Module, unsteered: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """Raises TaskError where a pass over a text shows each token what comes after it: its probability means nothing."""
    if not is_causal(model, unsteered=unsteered):
        raise TaskError(
            f"{type(unwrap(model)).__name__}: found bidirectional attention, in which each token sees those after it; "
            "expected a causal model to score text with. Numeric tasks, where the model writes, can be evaluated"
        )


def plain_batches(model: nn.Module, texts: Sequence[Sequence[int]], tokens: int) -> Iterator[Batch]:
    """Batches of whole texts that ``model`` may run: of one length each where its attention is not causal."""
    return batches(texts, tokens, False, longest_short_text(model), even=not is_causal(model))


def _settings(decoder: nn.Module) -> object:
    """What decides about the mask, as far as it can be changed on a model."""
    config = text_config(decoder)
    names = ("_attn_implementation", "is_causal", "use_bidirectional_attention")
    return [getattr(config, name, None) for name in names] + [
        module.is_causal for module in decoder.modules() if hasattr(module, "is_causal")
    ]


@torch.no_grad()
def _probe(model: nn.Module, decoder: nn.Module, layout: Layout | None) -> bool:
    context = getattr(text_config(model), "max_position_embeddings", None) or LENGTH
    device, length = input_device(model), min(LENGTH, context)
    kept, vocabulary = length - length // 2, vocabulary_size(model)
    text = made_up(length, vocabulary)
    texts = (text, text[:kept] + [(token + 1) % vocabulary for token in text[kept:]])
    with evaluating(model), _few_layers(model, layout):
        # Not by calling the decoder: a compiled one would be compiled for this.
        first, second = (
            _hidden(decoder.forward(input_ids=torch.tensor([text], device=device)))[0, :kept] for text in texts
        )
    difference, scale = ((t.double().square().mean().sqrt()) for t in (first - second, first))
    coarse = TOLERANCE[torch.bfloat16]
    # 8-bit products choose the columns they leave in 16 bits by all tokens of a batch.
    quantised = getattr(unwrap(model), "is_quantized", False)
    tolerance = coarse if quantised else TOLERANCE.get(first.dtype, coarse)
    return not bool(difference > tolerance * scale)  # NaN is for others to find


def _hidden(output) -> Tensor:
    hidden = getattr(output, "last_hidden_state", None)
    return first_tensor(output) if hidden is None else hidden


def _few_layers(model: nn.Module, layout: Layout | None):
    """The model down to the first layer of each kind; whole where its layers are not known."""
    try:
        path = layers_path(model, layout)
    except SiteError:
        return nullcontext()
    layers = list(unwrap(model).get_submodule(path).children())
    named = list(getattr(text_config(model), "layer_types", None) or ())
    named = named if len(named) == len(layers) else [""] * len(layers)
    kinds = [
        (name, *((type(module), getattr(module, "is_causal", None)) for module in layer.modules()))
        for name, layer in zip(named, layers)
    ]
    return first_layers(model, path, 1 + max(kinds.index(kind) for kind in set(kinds)))
