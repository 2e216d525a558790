"""The gate of the momentum benchmark: counts are those of a naive loop, up to comparisons that rounding can turn.

A batch, a pad or a shared prompt changes the order of sums, and the sign of a difference that is as small as that is
anybody's. How small is measured: by the same texts alone and in a batch, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from austeer import Pair
from austeer.models.structure import input_device

from .graphs import WrongResultError
from .peers import SITES, Counts, reading, stacked_momentum


@dataclass(frozen=True)
class Bounds:
    """What rounding may do in a dtype."""

    error: float  #: the most that batching may move an activation, as a share of the layer's largest
    near: float  #: the largest share of comparisons that may be near ties: with more, the gate would test little
    differing: float  #: the largest share of AUs whose count may differ


BOUNDS = {torch.float32: Bounds(1e-4, 0.02, 0.01), torch.bfloat16: Bounds(0.2, 0.5, 1.0)}  # 0.13 in 32 random layers
#: Two activations err in a difference, and what ran here is not every way to make a batch.
MARGIN = 4


@torch.no_grad()
def naive_activations(model: PreTrainedModel, tokenizer, texts: Sequence[str]) -> dict[str, Tensor]:
    """site -> [texts, layers, width] at the last token, each text alone and unpadded."""
    device = input_device(model)
    kept: dict[str, list[Tensor]] = {site: [] for site in SITES}
    with reading(model, lambda site, x: kept[site].append(x[0, -1].clone())):
        for text in texts:
            model.get_decoder()(tokenizer(text, return_tensors="pt")["input_ids"].to(device), use_cache=False)
    return {site: torch.stack(rows).unflatten(0, (len(texts), -1)) for site, rows in kept.items()}


class Gate:
    """Checks the counts of any way to measure some of ``pairs``.

    Raises:
        WrongResultError: batches move activations by more than rounding can, or so many comparisons are near ties that
            the gate would not notice a wrong result.
    """

    def __init__(self, model: PreTrainedModel, tokenizer, pairs: Sequence[Pair]):
        batched = stacked_momentum.activations(model, tokenizer, pairs)
        naive = naive_activations(model, tokenizer, [pair.prompt + pair.positive for pair in pairs])
        other = naive_activations(model, tokenizer, [pair.prompt + pair.negative for pair in pairs])
        self.bounds = BOUNDS[next(iter(naive.values())).dtype]
        self.delta: dict[str, Tensor] = {}  # float32 [pairs, layers, width]: its signs are exact
        self.near: dict[str, Tensor] = {}  # bool, of the same shape
        for site in SITES:
            alone, together = (torch.stack(found).float() for found in ((naive[site], other[site]), batched[site]))
            error, scale = (t.abs().amax((0, 1, 3)) for t in (together - alone, alone))  # [layers]
            if not (error <= self.bounds.error * scale).all():
                raise WrongResultError(
                    f"{site}: a batch moves activations by up to {float((error / scale).max()):.1e} of the largest, "
                    f"expected at most {self.bounds.error:.0e}: more than rounding"
                )
            self.delta[site] = alone[0] - alone[1]
            self.near[site] = self.delta[site].abs() <= MARGIN * error[:, None]
        if self.near_share > self.bounds.near:
            raise WrongResultError(
                f"{self.near_share:.1%} of comparisons are near ties, expected at most {self.bounds.near:.0%}: "
                "these pairs cannot tell right from wrong"
            )

    @property
    def near_share(self) -> float:
        """The share of comparisons that rounding could turn."""
        return sum(float(near.float().mean()) for near in self.near.values()) / len(self.near)

    def check(self, name: str, counts: Counts, chosen: Sequence[int]) -> int:
        """How many of the counts of the ``chosen`` pairs (their numbers) differ from the naive loop's.

        Raises:
            WrongResultError: one differs by more than its near ties, or too many differ.
        """
        differing = total = 0
        for site in SITES:
            delta, near = self.delta[site][list(chosen)], self.near[site][list(chosen)]
            ties = near.sum(0)  # [layers, width]
            for what, counted, wins in zip(("positive", "negative"), counts[site], (delta > 0, delta < 0)):
                found = counted.to(wins.device)
                certain = (wins & ~near).sum(0)
                wrong = (found < certain) | (found > certain + ties)
                if wrong.any():
                    layer, unit = (int(i) for i in wrong.nonzero()[0])
                    raise WrongResultError(
                        f"{name}: {site}, layer {layer}, AU {unit}: found a {what} count of {int(found[layer, unit])}, "
                        f"expected {int(wins.sum(0)[layer, unit])}, and of {len(chosen)} pairs "
                        f"{int(ties[layer, unit])} are near ties; a wrong result gets no time"
                    )
                differing += int((found != wins.sum(0)).sum())
                total += found.numel()
        if differing > self.bounds.differing * total:
            raise WrongResultError(
                f"{name}: {differing} of {total} counts differ from the naive loop's, expected at most "
                f"{self.bounds.differing:.0%}; a wrong result gets no time"
            )
        return differing
