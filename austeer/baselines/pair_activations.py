"""Last-token activations of pairs, text by text: for what counters do not tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..counters import Counters
from ..errors import CaptureError
from ..forward.batch_size import automatic_batch_tokens
from ..forward.capture import LastTokens
from ..forward.causality import plain_batches
from ..forward.tokens import check_vocabulary, length_limit, tokenise
from ..models.sites import Site
from ..models.structure import evaluating, input_device, vocabulary_size
from ..pairs.pairs import Pairs


@dataclass(frozen=True)
class PairActivations:
    """Last-token activations of pairs whose two texts differ, at one site.

    Attributes:
        positive, negative: [pairs, layers, width], as the model made them. number: each pair's place among those given.
    """

    positive: Tensor
    negative: Tensor
    number: list[int]

    def counters(self) -> Counters:
        """What a momentum counts of them."""
        m = self.positive.double() - self.negative.double()
        return Counters((m > 0).sum(0), (m < 0).sum(0), m.sum(0), m.square().sum(0))


@torch.no_grad()
def pair_activations(model: nn.Module, tokenizer, pairs: Pairs, sites: list[Site]) -> PairActivations:
    """Runs every text once; the activations of all pairs are held, on the CPU.

    Args:
        sites: those of one name, one a layer.

    Raises:
        CaptureError: an activation is NaN or infinite. PairsError: a text without a token, another model's tokenizer.
    """
    found = tokenise(
        tokenizer, pairs.items, length_limit(model, None), special=not pairs.chat_template, source=pairs.source
    )
    ids = found.positive + found.negative
    check_vocabulary(vocabulary_size(model), ids)
    name = sites[0].name
    capture = LastTokens(model, {name: sites}, len(ids))
    tokens = automatic_batch_tokens(model, input_device(model))
    with evaluating(model), capture.attached():
        for batch in plain_batches(model, ids, tokens):
            capture.run(batch)
    values = capture.buffers[name].cpu()
    if not values.isfinite().all():
        raise CaptureError(
            f"{pairs.source}: found NaN or infinity at site {name!r}, expected finite activations. Load the model in "
            "bfloat16 or float32"
        )
    count = len(found.number)
    return PairActivations(values[:count], values[count:], found.number)
