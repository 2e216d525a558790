"""Whether a model runs shared prompts as it should: asked of the model itself, with texts made up for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..models.sites import Site
from ..models.structure import evaluating, text_config, vocabulary_size
from .capture import LastTokens
from .packing import Batch, batches
from .tokens import made_up
from .tree_masks import forms

#: How far a shared prompt may move an activation, relative to the largest of its site and layer: rounding, which a
#: deep model amplifies (some compute a part of it in float32 always). A mask or positions that are not honoured move
#: them by 0.2 and more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}

#: How far a branch of the probe lies from its beginning: positions that are not honoured should show.
FAR = 60

#: What a decoder says to a foreign mask.
_FOREIGN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def tree_form(
    model: nn.Module, sites: Mapping[str, Sequence[Site]], device: torch.device
) -> tuple[str | None, float | None]:
    """How the model takes trees of texts (:data:`austeer.forward.tree_masks.FORMS`), and how far they move an
    activation.

    Two short passes: texts that share a beginning, as a tree and each by itself. None where every form that it
    might take gives something else, or there is none.
    """
    context = getattr(text_config(model), "max_position_embeddings", None)
    texts = _texts(vocabulary_size(model), context or 2 * FAR)
    capture = LastTokens(model, sites, len(texts), device)
    possible = list(forms(capture.model, capture.decoder))
    if not possible:
        return None, None
    alone = _run(capture, batches(texts, 10**6, share=False))
    found: list[tuple[float, str]] = []
    for form in possible:
        capture.tree = form
        try:
            error = _error(_run(capture, batches(texts, 10**6)), alone)
        except _FOREIGN:
            continue
        dtype = next(iter(alone.values())).dtype
        if error <= TOLERANCE[dtype]:
            return form, error
        found.append((error, form))
    return None, min(found)[0] if found else None


def _texts(vocabulary: int, context: int) -> list[list[int]]:
    """A beginning that three texts share, one of them in part; the first text is long and parts it from the others."""

    def some(start: int, count: int) -> list[int]:
        return made_up(count, vocabulary, start)

    prompt = some(11, 8)
    texts = [prompt + some(3, FAR), prompt + some(29, 3), prompt[:4] + some(17, 3)]
    return [text[:context] for text in texts]


@torch.no_grad()
def _run(capture: LastTokens, texts: Iterable[Batch]) -> dict[str, torch.Tensor]:
    with evaluating(capture.model), capture.attached():
        for batch in texts:
            capture.run(batch)
    return {name: buffer.clone() for name, buffer in capture.buffers.items()}


def _error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference in any layer, relative to the largest value there; infinite where either is no number."""
    worst = 0.0
    for name, values in expected.items():
        difference = (found[name].double() - values.double()).abs().amax((0, 2))  # [layers]
        scale = values.double().abs().amax((0, 2))
        error = torch.where(difference == 0, 0.0, difference / scale).nan_to_num(nan=float("inf")).max()
        worst = max(worst, float(error))
    return worst
